"""Rules for all tests: each asserts something, draws the same numbers every time, fails where a child hangs."""

import ast
import multiprocessing
import os
import random
import re
import signal
import tomllib
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import children, conftest

ROOT = Path(__file__).parent.parent
#: Calls that fail by themselves, by the end of their names.
FAILING = {"raises", "warns", "fail", "assert_close", "assert_allclose", "assert_array_equal", "opcheck"}


@cache
def module(path: Path) -> tuple[dict[str, ast.AST], dict[str, tuple[Path, str]]]:
    """(functions and methods of a file by name, names it imports from this repository: their file, and name there)."""
    tree = ast.parse(path.read_text())
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    imports = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                whole = ROOT / node.module.replace(".", "/") / f"{alias.name}.py"
                inside = [ROOT / f"{node.module.replace('.', '/')}{end}" for end in (".py", "/__init__.py")]
                found = next((file for file in (whole, *inside) if file.is_file()), None)
                if found is not None:
                    imports[alias.asname or alias.name] = (found, "" if found == whole else alias.name)
    return functions, imports


def asserts(path: Path, name: str, seen: frozenset = frozenset()) -> bool:
    """Whether a function of a file can fail: it asserts, or calls what does, in this repository."""
    functions, imports = module(path)
    if (path, name) in seen:
        return False
    seen |= {(path, name)}
    if name not in functions:
        return name in imports and asserts(*imports[name], seen)
    body = list(ast.walk(functions[name]))
    if any(isinstance(node, ast.Assert) for node in body):
        return True
    for call in (node.func for node in body if isinstance(node, ast.Call)):
        if isinstance(call, ast.Name) and (call.id in FAILING or asserts(path, call.id, seen)):
            return True
        if isinstance(call, ast.Attribute):
            owner = imports.get(call.value.id) if isinstance(call.value, ast.Name) else None
            if call.attr in FAILING or (owner and not owner[1] and asserts(owner[0], call.attr, seen)):
                return True
    return False


def named_tests(path: Path) -> list[str]:
    return [name for name in module(path)[0] if name.startswith("test")]


@pytest.mark.parametrize("path", sorted(ROOT.glob("tests/**/test_*.py")), ids=lambda path: path.stem)
def test_every_test_asserts_something(path):
    assert named_tests(path) and not [name for name in named_tests(path) if not asserts(path, name)]


def test_tests_that_assert_nothing_are_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "helper.py").write_text("def check(x):\n    assert x\ndef run(x):\n    return x\n")
    path = tmp_path / "tests" / "test_file.py"
    path.write_text("""
import pytest
from tests import helper
from tests.helper import check, run
def again(x):
    again(x)
    if x: check(x)
def test_asserts(): assert run(1)
def test_raises():
    with pytest.raises(ValueError): run(1)
def test_calls(): again(1)
def test_calls_a_module(): helper.check(1)
def test_runs(): run(1)
def test_runs_a_module(): helper.run(check)
def test_does_nothing(x=check): print("assert")
""")
    good = ["test_asserts", "test_raises", "test_calls", "test_calls_a_module"]
    assert [name for name in named_tests(path) if asserts(path, name)] == good
    assert len(named_tests(path)) == len(good) + 3


@pytest.fixture(scope="module")
def drawn():
    return torch.rand(3)


def test_what_a_test_draws_is_of_its_name_alone(drawn, request):
    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()

    found = draw()
    conftest.seed(request.node.nodeid)
    assert found == draw() != draw() and torch.initial_seed() == zlib.crc32(request.node.nodeid.encode())
    conftest.seed("drawn")
    assert torch.equal(drawn, torch.rand(3))


def pause_on_one_rank():
    if os.environ["RANK"] == "1":
        signal.pause()


def test_a_child_that_hangs_fails_its_test(monkeypatch):
    """It is killed, which must not look like the SIGKILL that a test sends."""
    monkeypatch.setattr(children, "_context", multiprocessing.get_context("fork"))
    with pytest.raises(TimeoutError, match=r"pause_on_one_rank: after 0\.5 s still running: ranks \[(0, )?1(, 2)?\]"):
        children.call(pause_on_one_rank, world_size=3, limit=0.5)


def test_files_that_take_long_are_among_those_that_come_first():
    seconds = dict.fromkeys(conftest.LONGEST, 40.0) | {"test_a.py": 60.0, "test_b.py": 15.0, "test_c.py": 0.1}
    assert conftest.left_out(seconds) == ["test_a.py"]
    assert not [name for name in conftest.LONGEST if not (ROOT / "tests" / name).is_file()]
    assert len(set(conftest.LONGEST)) == len(conftest.LONGEST)


def test_every_marker_is_used():
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    tests = "".join(path.read_text() for path in ROOT.glob("tests/**/*.py"))
    assert {marker.split(":")[0] for marker in markers} <= set(re.findall(r"pytest\.mark\.(\w+)", tests))


@pytest.fixture(scope="module")
def other_threads() -> int:
    """A fixture of a whole file that leaves another number of threads."""
    torch.set_num_threads(conftest.THREADS + 1)
    return torch.get_num_threads()


def test_a_test_computes_with_the_threads_that_the_run_began_with(other_threads):
    assert torch.get_num_threads() == conftest.THREADS == other_threads - 1
