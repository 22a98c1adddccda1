"""`bench/gpu.sh` with an interpreter that only records its arguments, and the collection of the tests it would run."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Imports that must not be needed on a GPU machine with torch, triton, pytest, numpy, safetensors and pydantic.
LACKING = (
    "deepspeed",
    "timm",
    "lpips",
    "torch_fidelity",
    "torchdiffeq",
    "yaml",
    "tqdm",
    "tensorboard",
    "sklearn",
    "matplotlib",
    "PIL",
    "torchvision",
    "scipy",
    "nvidia.dali",
)

PARTS = ["machine", "build", "tests", "step", "ops", "gemms", "sampling", "tokenizer", "data", "images"]
PARTS += ["more", "regress"]
#: Those that keep to a share of the time left, in percent of it.
SHARES = {"step": 35, "ops": 25, "gemms": 20, "sampling": 35, "tokenizer": 60, "images": 30, "more": 85}
FAKE = """#!/usr/bin/env bash
case "$*" in
    "-c import xdist") exit 0 ;;
    "-m pytest "*) name=tests ;;
    *" --after-quick "*) name=more ;;
    *" --images "*) name=images ;;
    "-m bench."*) name=${2#bench.} ;;
    setup.py*) name=build ;;
    *) name=machine ;;
esac
printf '%s\\n' "$*" > "$CALLS/$name"
[[ $name == ops ]] && echo 'so far: swiglu XL bfloat16 forward  triton    151.0 µs' \\
    && echo 'swiglu XL bfloat16 forward  triton    150.0 µs ±0.1%  93.1% of the memory limit' \\
    && echo 'swiglu XL bfloat16 forward  eager     900.0 µs' && echo 'rows: 2 ok'
[[ $name == "${TIME_IS_UP:-}" ]] && echo "${SAYS:-time is up}, not measured: swiglu L bfloat16"
[[ $name == step ]] && echo 'LightningDiT-XL/1 batch 128 trainer 700.0 images/s'
[[ $name == sampling ]] && echo 'LightningDiT-XL/1 batch 64 bfloat16 auto   5.10 images/s'
[[ $name == tokenizer ]] && echo 'encode batch 32 bfloat16 auto   2100.0 images/s'
[[ $name == gemms ]] && echo "LightningDiT-XL/1 batch 128: 690.0 TFLOP/s mean over the step's products, torch"
[[ $name == data ]] && echo 'best against best: 7.0x the way that opens one file per sample'
[[ $name == images ]] && echo 'dali over pil with the same workers: 4.00x (tar, 16 workers)'
[[ $name == regress ]] && { echo 'rows of ours: 1 unchanged'; exit "${GATE:-0}"; }
[[ $name == tests ]] && echo "${CRASHED:-}" && echo '12 passed, 3 skipped in 5s'
[[ " $FAILING " == *" $name "* ]] && exit 3
exit 0
"""


@pytest.fixture
def script(tmp_path):
    """Runs gpu.sh; returns its exit status, its output and the commands it gave to Python, by part."""
    python = tmp_path / "python"
    python.write_text(FAKE)
    python.chmod(0o755)
    calls = tmp_path / "calls"
    calls.mkdir()

    def run(*arguments: str, failing: str = "", **environment: str):
        variables = {**os.environ, "PYTHON": str(python), "CALLS": str(calls), "FAILING": failing, **environment}
        command = ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
        return done.returncode, done.stdout + done.stderr, {p.name: p.read_text().strip() for p in calls.iterdir()}

    return run


def limits(printed: str) -> dict[str, int]:
    """Part → its limit in seconds, as announced."""
    heads = [line.removeprefix("== ") for line in printed.splitlines() if line.startswith("== ") and "at most" in line]
    return {head.split(",")[0]: int(head.split("at most ")[1].split()[0]) for head in heads}


def told(call: str) -> float:
    """The minutes a part is told to keep to."""
    words = call.split()
    return float(words[words.index("--minutes") + 1])


def test_every_part_runs_in_order_within_the_time(script, tmp_path):
    status, printed, calls = script("results", "20")
    out = tmp_path / "results"
    assert status == 0, printed
    assert list(limits(printed)) == PARTS
    assert "-m gpu" in calls["tests"] and "tests/test_kernels_ops.py" in calls["tests"]
    assert all(f"--out {out}/rows.jsonl" in calls[part] for part in ("data", *SHARES))
    assert all("--quick" in calls[part] for part in ("step", "ops", "sampling", "tokenizer"))
    assert calls["regress"].startswith(f"-m bench.regress {out}/rows.jsonl ")
    given = limits(printed)
    assert 170 <= given["tests"] <= 180 and 1160 <= given["regress"] <= 1200
    for part, percent in SHARES.items():
        assert 1180 * percent <= 100 * given[part] <= 1200 * percent, "what a part leaves goes to the next ones"
    for part in ("tests", "regress", *SHARES):
        assert 0.8 * given[part] <= 60 * told(calls[part]) <= 0.9 * given[part]
    summary = (out / "summary.txt").read_text()
    assert "12 passed, 3 skipped" in summary and "93.1% of the memory limit" in summary and "eager" not in summary
    assert "so far" not in summary
    assert "700.0 images/s" in summary and "7.0x the way" in summary and "rows of ours: 1 unchanged" in summary
    assert "4.00x (tar" in summary
    assert "5.10 images/s" in summary and "2100.0 images/s" in summary and "690.0 TFLOP/s mean" in summary
    assert summary.endswith("all parts ok\n") and printed.endswith(summary)
    assert {path.name for path in out.iterdir()} == {"summary.txt", "log.txt", "logs.tgz"}  # and rows.jsonl
    with tarfile.open(out / "logs.tgz") as logs:
        assert set(logs.getnames()) == {"logs", *(f"logs/{part}.log" for part in PARTS)}
        assert b"12 passed" in logs.extractfile("logs/tests.log").read()
    lines = (out / "log.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines[1::2]] == PARTS and all(line.startswith("== ") for line in lines[::2])


def test_the_gate_without_committed_rows_is_no_failure(script, tmp_path):
    status, _, _ = script(str(tmp_path / "results"), GATE="2")
    summary = (tmp_path / "results" / "summary.txt").read_text()
    assert status == 0 and "regress      nothing to compare with" in summary and summary.endswith("all parts ok\n")
    status, printed, _ = script(str(tmp_path / "results"), GATE="1")
    assert status == 1 and "not ok: regress" in printed


def test_the_gate_is_given_the_kinds_that_the_run_left_out(script, tmp_path):
    out = str(tmp_path / "results")
    always = "--partial step --partial sampling --partial tokenizer"
    assert script(out)[2]["regress"].endswith(always)
    for part in ("ops", "more"):
        for why in ({"TIME_IS_UP": part}, {"TIME_IS_UP": part, "SAYS": "the time is up"}, {"failing": part}):
            assert script(out, **why)[2]["regress"].endswith(f"{always} --partial op")


def test_with_time_everything_is_measured(script, tmp_path):
    _, _, calls = script(str(tmp_path / "results"), "40")
    assert not any("--quick" in calls[part] for part in ("step", "sampling", "tokenizer")) and "--quick" in calls["ops"]


def test_below_twenty_minutes_it_is_a_triage(script, tmp_path):
    status, printed, calls = script("results", "19", "--only", "bare", failing="")
    out = tmp_path / "results"
    assert status == 0 and calls == {"triage": f"-m bench.triage {out} --minutes 19 --only bare"}, printed
    status, _, calls = script("results", "8", failing="triage")
    assert status == 3 and calls["triage"].endswith("--minutes 8") and not list(out.iterdir())


@pytest.mark.parametrize(
    ("told", "without"),
    [
        ("worker 'gw3' crashed while running 'tests/t.py::test_forward[swiglu-cuda-odd-float16-cuda]'", "cuda"),
        (
            "!! _pytest.outcomes.Exit: tests/t.py::test_f[swiglu-triton-odd-float16-cuda] lost the device: why !!",
            "triton",
        ),
        ("FAILED tests/t.py::test_forward[swiglu-cuda-odd-float16-cuda] - AssertionError", ""),
    ],
)
def test_a_backend_that_lost_the_device_is_not_timed(told, without, script, tmp_path):
    ops = script(str(tmp_path / "results"), CRASHED=told)[2]["ops"]
    assert [name for name in ("cuda", "triton") if f"--without {name} " in ops] == ([without] if without else [])
    summary = (tmp_path / "results" / "summary.txt").read_text()
    assert ("crashed while" in summary or "lost the device" in summary) == bool(without)


@pytest.mark.parametrize("failing", ["tests", "step", "machine tests ops"])
def test_a_failing_part_is_reported_and_does_not_stop_the_others(failing, script, tmp_path):
    status, _, calls = script(str(tmp_path / "results"), failing=failing)
    assert status == 1 and set(calls) == set(PARTS)
    summary = (tmp_path / "results" / "summary.txt").read_text()
    assert summary.endswith(f"not ok: {failing}\n") and summary.count("failed with status 3") == len(failing.split())


def test_a_part_that_hangs_is_cut_off(script, tmp_path):
    """`timeout` says so with the status 124; here it says so at once."""
    (tmp_path / "bin").mkdir()
    timeout = tmp_path / "bin" / "timeout"
    timeout.write_text("#!/usr/bin/env bash\nexit 124\n")
    timeout.chmod(0o755)
    status, _, calls = script("results", PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert status == 1 and not calls
    assert (tmp_path / "results" / "summary.txt").read_text().count("cut off") == len(PARTS)


@pytest.mark.parametrize("arguments", [(), ("out", "soon"), ("out", "0"), ("out", "-1"), ("out", "20", "--only")])
def test_wrong_arguments_are_refused(arguments, script):
    status, printed, calls = script(*arguments)
    assert status != 0 and "usage: bash bench/gpu.sh OUT_DIR [MINUTES [OPTION …]]" in printed and not calls


def test_gpu_tests_are_collected_without_the_other_packages(script, tmp_path):
    """With the very command of the script, in a process that finds nothing else."""
    _, _, calls = script("results", "20")
    command = calls["tests"].split()[2:]
    hide = f"""
import sys
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        if not any(name == lacking or name.startswith(lacking + ".") for lacking in {LACKING}):
            return self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Hiding, sys.meta_path)
import bench.data, bench.gemms, bench.images, bench.ops, bench.regress, bench.sampling, bench.step, bench.tokenizer
import bench.triage.__main__, pytest, bench.triage.check, bench.triage.machine, bench.triage.profile
sys.exit(pytest.main({command!r} + ["--collect-only"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", hide],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    collected = [line for line in lines if "::" in line]
    assert len(collected) > 100 and "error" not in lines[-1]
    assert "-XL-bfloat16-cuda" in collected[0], "the most representative first"


def test_no_file_with_gpu_tests_is_left_out(script):
    """The marker may come from a fixture, which is not to be seen in the file."""
    _, _, calls = script("results", "20")
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-m", "gpu", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    files = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert files <= {word for word in calls["tests"].split() if word.startswith("tests/test_")}


def test_tests_that_begin_too_late_are_skipped(tmp_path):
    (tmp_path / "test_late.py").write_text("def test_one(): assert False\ndef test_two(): assert False\n")
    from tests.plugins import deadline

    for minutes, status in (("0", pytest.ExitCode.OK), ("1", pytest.ExitCode.TESTS_FAILED)):
        arguments = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, "--minutes", minutes, str(tmp_path)]
        assert pytest.main(arguments, plugins=[deadline]) == status
