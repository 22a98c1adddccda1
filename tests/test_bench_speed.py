"""`pytest bench/` on a CPU, with stand-ins for device, events and sizes; and that without a GPU nothing is timed."""

import json
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch

import kernels
from bench import ops, step
from bench.baselines import Adapter, Provider
from bench.measure import ceilings, timing
from bench.measure.ceilings import Ceilings
from bench.triage.rehearsal import TINY
from bench.workloads import providers
from bench.workloads.variants import TrainingVariant
from kernels.backends import device
from kernels.backends.device import cuda_reasons
from kernels.testing.tolerance import reference

ROOT = Path(__file__).parents[1]
SWIGLU = kernels.OPS["swiglu"]
SMALL = TINY.model_copy(update={"depth": 1})


class HostEvent:
    """In place of `torch.cuda.Event`: the host's clock."""

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: "HostEvent") -> float:
        return 1000 * (end.at - self.at)


class StandIn(timing.HostDevice):
    """Estimates that everything takes long, so that few rounds are asked for."""

    def seconds(self, iteration, count):
        return [0.1 for _ in super().seconds(iteration, count)]


def absent():
    raise ModuleNotFoundError("No module named 'no_such_package'")


def zeros() -> Adapter:
    return Adapter(lambda gate_up, *, bias=None: gate_up.chunk(2, -1)[0] * 0)


def slow() -> Adapter:
    """Five milliseconds more than the reference."""
    return Adapter(lambda gate_up, *, bias=None: time.sleep(0.005) or reference(SWIGLU)(gate_up))


@pytest.fixture
def speed(tmp_path, monkeypatch):
    """Runs `bench/test_speed.py` in a session of its own: exit status, and what pytest-benchmark wrote."""
    pytest.importorskip("pytest_benchmark")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # where that is set, pytest-benchmark times nothing
    monkeypatch.setattr(device, "cuda_reasons", list)
    monkeypatch.setattr(timing, "CudaDevice", StandIn)
    monkeypatch.setattr(timing, "iteration_size", lambda moved, l2_bytes: (2, 4))
    monkeypatch.setattr(torch.cuda, "Event", HostEvent)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a CPU")
    limits = Ceilings(1e12, dict.fromkeys((torch.bfloat16, torch.float32), 1e12))
    monkeypatch.setattr(ceilings, "measure", lambda device, log: limits)
    job = ops.OpJob(SWIGLU, next(case for case in SWIGLU.cases if case.id == "odd"), torch.float32)
    monkeypatch.setattr(ops, "jobs", lambda found: [job])
    everybody = [
        Provider("eager", lambda: Adapter(reference(SWIGLU))),
        Provider("slow", slow),
        Provider("cuda", zeros),
        Provider("liger", zeros),
        Provider("absent", absent),
    ]
    for module in (ops, providers):
        monkeypatch.setattr(module, "providers_for", lambda *_: everybody)
    variants = (
        TrainingVariant("plain-eager", "plain", compile="none"),
        TrainingVariant("bare", "bare", kernels="reference", compile="none"),
        TrainingVariant("bare-lost", "bare", kernels="no such backend"),
    )
    monkeypatch.setattr(step, "jobs", lambda *_: iter([step.StepJob("tiny", SMALL, 2, variants)]))

    def run(*select: str):
        out = tmp_path / "out.json"
        sys.modules.pop("bench.test_speed", None)
        arguments = ["-q", "-rsf", "-p", "no:cacheprovider", f"--benchmark-json={out}", *select]
        return pytest.main([str(ROOT / "bench"), *arguments]), json.loads(out.read_text())["benchmarks"]

    yield run
    sys.modules.pop("bench.test_speed", None)


def test_providers_are_checked_and_timed_by_pytest_benchmark(speed, capsys, monkeypatch):
    status, found = speed()
    printed = capsys.readouterr().out
    assert status == 1
    stats = {(entry["group"], entry["params"].get("provider") or entry["params"]["variant"]): entry for entry in found}
    groups = [f"swiglu odd float32 {direction}" for direction in ("forward", "backward")]
    steps = {("tiny batch 2", "plain-eager"), ("tiny batch 2", "bare")}
    assert set(stats) == steps | {(group, name) for group in groups for name in ("eager", "slow")}
    eager, slow = (stats[groups[0], name] for name in ("eager", "slow"))
    assert 0.005 < slow["stats"]["median"] < 0.02, "of one call, where an iteration makes four"
    assert 0 < eager["stats"]["min"] <= eager["stats"]["median"] < slow["stats"]["min"]
    assert eager["extra_info"]["calls"] == 4 and 0 < eager["extra_info"]["fraction"] < 1
    trained = stats["tiny batch 2", "bare"]
    assert trained["extra_info"]["images_per_second"] == pytest.approx(2 / trained["stats"]["median"])
    assert all(entry["options"]["timer"].endswith("CUDA events") and entry["stats"]["rounds"] >= 5 for entry in found)
    assert printed.count("incorrect: result 0: error") >= 2, "ours fails, a baseline is skipped"
    for test in ("test_op[swiglu-odd-float32-forward-cuda]", "test_step[bare-lost]"):
        assert f"FAILED bench/test_speed.py::{test}" in printed
    assert "unavailable: not installed: No module named 'no_such_package'" in printed
    assert "FAILED bench/test_speed.py::test_op[swiglu-odd-float32-forward-liger]" not in printed


def test_a_first_loss_that_is_not_the_plain_models_is_not_timed(speed, capsys, monkeypatch):
    true = step.StepComparison.prepare

    def prepare(self, job, name, shared):
        ready = true(self, job, name, shared)
        ready.value *= 1.1 if name == "bare" else 1
        return ready

    monkeypatch.setattr(step.StepComparison, "prepare", prepare)
    status, found = speed("-k", "test_step and not lost")
    assert status == 1 and [entry["params"]["variant"] for entry in found] == ["plain-eager"]
    assert "incorrect: the first loss is" in capsys.readouterr().out


def test_every_provider_of_every_comparison_has_an_entry_and_without_a_gpu_it_is_skipped(capsys):
    pytest.importorskip("pytest_benchmark")
    if not cuda_reasons():
        pytest.skip("there is a GPU")
    select = "[swiglu-XL-float32- or test_step"
    assert pytest.main([str(ROOT / "bench"), "-q", "-p", "no:cacheprovider", "-rs", "-k", select]) == 0
    skipped = [line for line in capsys.readouterr().out.splitlines() if line.startswith("SKIPPED")]
    count = 2 * len(list(providers.providers_for(SWIGLU)))
    assert f"[{count}]" in skipped[0] and all("CUDA" in line for line in skipped)
    assert f"[{len(step.QUICK)}]" in skipped[1]


def test_the_tests_of_this_repository_are_those_in_tests():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert options["testpaths"] == ["tests"] and "python_files" not in options
