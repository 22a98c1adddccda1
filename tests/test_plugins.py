"""The pytest plugins for a GPU's tests: the time limit, and a lost device."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kernels
from bench import ops
from tests.plugins import deadline, lost_device

ROOT = Path(__file__).parents[1]
#: Each test says where it ran; the second one loses the device of its process.
TESTS = """
import os
import pytest
import tests.plugins.lost_device

place = []
tests.plugins.lost_device.lost = lambda: "illegal address" if place else ""

@pytest.mark.parametrize("number", range(4))
def test_on_a_device(number):
    with open(f"{os.environ['RAN']}/{number}", "w") as file:
        file.write(str(os.getpid()))
    if number == 1:
        place.append(os.getpid())
        assert False, "an illegal memory access was encountered"
"""


@pytest.fixture
def run(tmp_path):
    """Runs those tests with more arguments for pytest; returns its output and number → process of what was run."""
    (tmp_path / "test_device.py").write_text(TESTS)
    (tmp_path / "ran").mkdir()

    def run(*arguments: str) -> tuple[str, dict[str, str]]:
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
            "tests.plugins.lost_device",
            "-p",
            "tests.plugins.deadline",
            str(tmp_path),
        ]
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        variables |= {"PYTHONPATH": str(ROOT), "RAN": str(tmp_path / "ran"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=variables)
        return done.stdout + done.stderr, {path.name: path.read_text() for path in (tmp_path / "ran").iterdir()}

    return run


def test_a_run_stops_after_the_test_that_lost_the_device(run):
    printed, ran = run()
    assert set(ran) == {"0", "1"} and "1 failed, 1 passed" in printed
    assert "test_on_a_device[1] lost the device: illegal address" in printed


def test_another_process_takes_the_tests_that_are_left(run):
    printed, ran = run("-n", "1", "--minutes", "60")
    assert set(ran) == set("0123"), printed
    assert ran["0"] == ran["1"] != ran["2"] == ran["3"]
    assert "crashed while running 'test_device.py::test_on_a_device[1]'" in printed
    assert "3 passed" in printed and "an illegal memory access" in printed


def item(name: str, case: str, dtype: torch.dtype) -> SimpleNamespace:
    op = kernels.OPS[name]
    params = {"op": op, "case": next(c for c in op.cases if c.id == case), "dtype": dtype, "device": "cuda"}
    return SimpleNamespace(callspec=SimpleNamespace(params=params), name=f"test[{name}-{case}]")


def test_the_representative_tests_come_first():
    """By the rule of the bench; tests of anything else, in which order they stood, after them."""
    representative = [item(name, ops.representative(op), torch.bfloat16) for name, op in kernels.OPS.items()]
    others = [
        item("swiglu", "XL_bias", torch.bfloat16),
        item("swiglu", "XL", torch.float32),
        item("swiglu", "odd", torch.bfloat16),
        item("swiglu", "odd", torch.float64),
        SimpleNamespace(name="test_XL-bfloat16-cuda"),
        SimpleNamespace(callspec=SimpleNamespace(params={"op": "swiglu", "case": "XL"})),
    ]
    items = [*others[:3], *representative, *others[3:]]
    deadline.pytest_collection_modifyitems(items)
    assert items == representative + others and len(representative) == len(kernels.OPS)


def test_all_processes_have_the_same_end():
    first = SimpleNamespace(stash={}, getoption=lambda name: 2.0)
    deadline.pytest_configure(first)
    node = SimpleNamespace(workerinput={}, config=first)
    deadline.pytest_configure_node(node)
    late = SimpleNamespace(stash={}, getoption=first.getoption, workerinput=node.workerinput)
    deadline.pytest_configure(late)
    assert late.stash == first.stash


def test_a_device_is_lost_when_it_says_so(monkeypatch):
    assert lost_device.lost() == "" or torch.cuda.is_available()

    def refuse():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nSearch for …")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert lost_device.lost() == ""
    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    assert lost_device.lost() == "CUDA error: an illegal memory access was encountered"
