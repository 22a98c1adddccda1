"""What pytest-benchmark is given: the samples of the one clock, on a CPU; and that without a GPU nothing is timed."""

import json
import os
import tomllib
from pathlib import Path
from statistics import median

import pytest
import torch

import kernels
from bench import ops, step
from bench.baselines import Adapter, Provider
from bench.measure import timing
from bench.measure.rows import Log
from bench.measure.timing import HostDevice
from bench.plugins import samples
from bench.workloads.providers import providers_for
from bench.workloads.variants import TrainingVariant
from kernels.backends.device import cuda_reasons
from kernels.testing.tolerance import reference
from lightningdit.config import ModelConfig

ROOT = Path(__file__).parents[1]
SWIGLU = kernels.OPS["swiglu"]
JOB = ops.OpJob(SWIGLU, next(case for case in SWIGLU.cases if case.id == "odd"), torch.float32)
OK = {"status": "ok", "reason": "", "kind": "op", "provider": "triton", "fraction": 0.9, "method": "graph"}

PLAYED = """
import json
import pytest
from bench.plugins.samples import REPLAY, play
from bench.measure.timing import Timing

@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize("number", [0, 1])
def test_row(benchmark, number):
    row, seconds = json.loads({told!r})[number]
    play(benchmark, row, Timing(4, "graph", seconds) if seconds else None)
"""


@pytest.fixture
def pytest_benchmark(tmp_path, monkeypatch):
    """Plays rows and their samples to pytest-benchmark in a session of its own: what it wrote, and what it printed."""
    pytest.importorskip("pytest_benchmark")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # where that is set, pytest-benchmark times nothing

    def run(*told: tuple[dict, list[float]]):
        path = tmp_path / f"test_played_{abs(hash((str(tmp_path), str(told))))}.py"  # imported once in a process
        path.write_text(PLAYED.format(told=json.dumps(told)))
        out = tmp_path / "out.json"
        arguments = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, "--import-mode=importlib"]
        status = pytest.main([*arguments, f"--rootdir={tmp_path}", f"--benchmark-json={out}", str(path)])
        return status, json.loads(out.read_text())["benchmarks"] if out.exists() else []

    return run


def test_its_statistics_are_of_our_samples(pytest_benchmark):
    first, second = [3e-6, 1e-6, 2e-6, 8e-6], [5e-3, 7e-3, 6e-3]
    status, found = pytest_benchmark((OK, first), (OK, second))
    assert status == 0
    for entry, seconds in zip(found, (first, second), strict=True):
        stats = entry["stats"]
        assert stats["rounds"] == len(seconds) and stats["min"] == min(seconds) and stats["max"] == max(seconds)
        assert stats["median"] == pytest.approx(median(seconds), rel=1e-12)
    assert found[0]["extra_info"] == {"fraction": 0.9, "method": "graph"}


def test_what_has_no_number_is_not_timed(pytest_benchmark, capsys):
    lacking = OK | {"status": "unavailable", "reason": "not installed", "provider": "apex"}
    peer = OK | {"status": "incorrect", "reason": "its result", "provider": "liger"}
    assert pytest_benchmark((lacking, []), (peer, [])) == (0, [])
    wrong = OK | {"status": "incorrect", "reason": "our result"}
    status, found = pytest_benchmark((lacking, []), (wrong, []))
    assert status == 1 and not found and "incorrect: our result" in capsys.readouterr().out


def absent():
    raise ModuleNotFoundError("No module named 'no_such_package'")


def test_samples_of_an_op_are_kept(monkeypatch):
    monkeypatch.setattr(timing, "FOOTPRINT", 20_000)
    monkeypatch.setattr(timing, "ITERATION_BYTES", 60_000)
    everybody = [Provider("eager", lambda: Adapter(reference(SWIGLU))),
                 Provider("zeros", lambda: Adapter(lambda gate_up, bias=None: gate_up.chunk(2, -1)[0] * 0)),
                 Provider("absent", absent)]  # fmt: skip
    monkeypatch.setattr(ops, "providers_for", lambda *_: everybody)
    bench = samples.OpBench(HostDevice(), Log("cpu"), None, seconds=0.01)
    found = bench.measured(JOB)
    for direction in ("forward", "backward"):
        row, kept = samples.row_of(found, direction, "eager")
        assert row["direction"] == direction and kept.median * 1e6 == row["p50_us"]
        assert samples.row_of(found, direction, "zeros")[1] is None
        row, kept = samples.row_of(found, direction, "absent")
        assert row["status"] == "unavailable" and kept is None
    assert found["forward", "eager"][1] is not found["backward", "eager"][1]


def test_samples_of_a_step_are_kept():
    variants = (
        TrainingVariant("plain-eager", "plain", compile="none"),
        TrainingVariant("bare", "bare", kernels="no such backend"),
    )
    config = ModelConfig(input_size=4, patch_size=1, in_channels=4, hidden_size=16, depth=1, num_heads=2, num_classes=5,
                         use_swiglu=True, use_rope=True, use_rmsnorm=True)  # fmt: skip
    bench = samples.StepBench(HostDevice(), Log("cpu"), None, seconds=0.01, rounds=2)
    found = bench.measured(step.StepJob("tiny", config, 2, variants))
    row, kept = found["plain-eager"]
    assert kept.median * 1e3 == row["p50_ms"] and found["bare"][0]["status"] == "failed" and found["bare"][1] is None


def test_a_group_is_measured_once():
    asked = []
    last = samples.Last(lambda question: asked.append(question) or len(asked))
    assert [last("a"), last("a"), last("b"), last("a")] == [1, 1, 2, 3]


def test_every_provider_of_every_comparison_has_an_entry_and_without_a_gpu_it_is_skipped(capsys):
    pytest.importorskip("pytest_benchmark")
    if not cuda_reasons():
        pytest.skip("there is a GPU")
    select = "[swiglu-XL-float32- or test_step"
    assert pytest.main([str(ROOT / "bench"), "-q", "-p", "no:cacheprovider", "-rs", "-k", select]) == 0
    skipped = [line for line in capsys.readouterr().out.splitlines() if line.startswith("SKIPPED")]
    count = 2 * len(list(providers_for(SWIGLU)))
    assert f"[{count}]" in skipped[0] and all("CUDA" in line for line in skipped)
    assert f"[{len(step.QUICK)}]" in skipped[1]


def test_the_tests_of_this_repository_are_those_in_tests():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert options["testpaths"] == ["tests"] and "python_files" not in options
