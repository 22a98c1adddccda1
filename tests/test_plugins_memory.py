"""The pytest plugin that lets a test begin when the memory of the GPU that it takes is free."""

import os
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import kernels
from kernels.testing import checks as op_checks
from kernels.testing import tolerance
from kernels.testing.cases import Case
from tests.plugins import memory
from tests.plugins.memory import GIB, PART, Peak, needed, parts_of, reserved
from tests.plugins.op_parameters import OpParameters

ROOT = Path(__file__).parents[1]
SWIGLU = kernels.OPS["swiglu"]


def case_of(name: str) -> Case:
    return next(case for case in SWIGLU.cases if case.id == name)


def test_a_peak_counts_tensors_that_live_at_once():
    with Peak() as peak:
        a = torch.empty(1000, device="meta")
        b = a.view(10, 100) * 2
        del a, b
        c = torch.empty(500, device="meta")
        c.add_(1)
        del c
    assert peak.bytes == 8000


PRODUCTION = [(op, case) for op in kernels.OPS.values() for case in op.cases if case.production]


@pytest.mark.parametrize(("op", "case"), PRODUCTION, ids=[f"{op.name}-{case.id}" for op, case in PRODUCTION])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_counted_for_a_test_covers_its_check(op, case, dtype, monkeypatch):
    """The checks of `kernels.testing.checks`, on tensors without memory, with the reference for a backend."""

    def compared(inputs, got, eager, fp64):
        for name, result in got.items():
            (result.double() - fp64[name]).abs().max()

    monkeypatch.setattr(tolerance, "random_like", torch.empty_like)
    monkeypatch.setattr(op_checks, "assert_within_tolerance", compared)
    monkeypatch.setattr(op_checks, "same_bits", lambda a, b: True)
    if dtype not in op.dtypes & case.dtypes:
        pytest.skip(f"no case in {dtype}")
    checks = [op_checks.check_forward, *([op_checks.check_gradients] if op.differentiable else [])]
    for check in checks:
        with Peak() as peak:
            check(op, op.backend("reference"), case, dtype, "meta")
        assert peak.bytes <= needed(OpParameters(op, case, dtype)) < 60 * GIB


def test_parts_of_a_device():
    assert parts_of(78 * GIB, 8) == 31 and parts_of(78 * GIB, 1) == 38 and parts_of(8 * GIB, 8) == 1


def test_a_part_is_held_by_one_process_at_a_time(tmp_path):
    """Of seven parts three times three do not fit."""
    running, most, ran = [], [], []

    def run(count: int) -> None:
        with reserved(tmp_path, 7, count):
            running.append(min(count, 7))
            most.append(sum(running))
            time.sleep(0.05)
            running.remove(min(count, 7))
        ran.append(count)

    threads = [threading.Thread(target=run, args=(count,)) for count in (3, 3, 3, 9, 1, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(ran) == [1, 3, 3, 3, 3, 9] and max(most) == 7 and 6 in most


def test_a_request_for_more_than_there_is_gets_all_parts(tmp_path):
    entered = threading.Event()

    def run() -> None:
        with reserved(tmp_path, 3, 1):
            entered.set()

    with reserved(tmp_path, 3, 9):
        thread = threading.Thread(target=run)
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(30)
    thread.join()


TESTS = """
import os
import time
import weakref
import pytest
import torch
import kernels

torch.cuda.is_available = lambda: True
torch.cuda.mem_get_info = lambda: (0, {total})
torch.cuda.empty_cache = lambda: None
OP = kernels.OPS["swiglu"]
CASES = {{case.id: case for case in OP.cases}}
kept, mark = [], pytest.mark

class Memory:
    pass

@mark.gpu
@pytest.mark.parametrize("op", [OP], ids=["swiglu"])
@pytest.mark.parametrize("case", [CASES[name] for name in {cases}], ids={cases})
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_device(op, case, dtype):
    assert not [ref for ref in kept if ref() is not None], "the last test's memory is still taken"
    memory = Memory()
    kept.append(weakref.ref(memory))
    begun = time.monotonic()
    time.sleep(1)
    with open(f"{{os.environ['RAN']}}/{{case.id}}-{{dtype}}", "w") as file:
        file.write(f"{{begun}} {{time.monotonic()}}")
    assert case.id != "XL_bias", "what its frames hold is given back"
"""


def run(folder: Path, total: int, cases: list[str], *arguments: str) -> tuple[str, list[tuple[float, float]]]:
    """What pytest prints of such tests, and when each was running."""
    (folder / "test_memory.py").write_text(TESTS.format(total=total, cases=cases))
    (folder / "ran").mkdir()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        *arguments,
        "-p",
        "tests.plugins.memory",
        str(folder),
    ]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    variables |= {"PYTHONPATH": str(ROOT), "RAN": str(folder / "ran"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=variables)
    spans = [tuple(map(float, path.read_text().split())) for path in (folder / "ran").iterdir()]
    return done.stdout + done.stderr, sorted(spans)


def overlap(spans: list[tuple[float, float]]) -> bool:
    return any(after[0] < before[1] for before, after in pairwise(spans))


def test_processes_wait_for_the_memory_of_their_tests(tmp_path):
    """XL takes 16 and 14 GB; of a GPU of 24 GiB it has two in turn, of one of 78 GiB at once."""
    need = needed(OpParameters(SWIGLU, case_of("XL"), torch.float32))
    assert 20 * GIB // 2 < need < 20 * GIB and needed(OpParameters(SWIGLU, case_of("odd"), torch.float32)) < PART
    (tmp_path / "small").mkdir()
    (tmp_path / "large").mkdir()
    printed, spans = run(tmp_path / "small", 24 * GIB, ["XL"], "-n", "2", "--maxschedchunk", "1")
    assert "2 passed" in printed and not overlap(spans), printed
    printed, spans = run(tmp_path / "large", 78 * GIB, ["XL"], "-n", "2", "--maxschedchunk", "1")
    assert "2 passed" in printed and overlap(spans), printed


def test_the_memory_of_a_failed_test_is_given_back(tmp_path):
    printed, spans = run(tmp_path, 78 * GIB, ["XL_bias", "L_bias", "L"])
    assert len(spans) == 6 and "4 passed" in printed and "2 failed" in printed, printed


def test_a_process_without_a_device_reserves_nothing(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    hook = memory.pytest_runtest_protocol(
        type("Item", (), {"get_closest_marker": lambda self, name: True, "config": None})()
    )
    next(hook)
    with pytest.raises(StopIteration) as ended:
        hook.send("ran")
    assert ended.value.value == "ran"
