"""The table of mistakes is alive, and its program tells what is found from what is not. It runs the table by hand."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.mutations import ROOT, KernelMistake, Mistake, mutated
from tests.mutations.__main__ import summary, try_all
from tests.mutations.table import MISTAKES


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_can_be_planted_and_its_tests_are_there(name):
    mistake = MISTAKES[name]
    text = mutated(mistake)
    assert text != (ROOT / mistake.file).read_text()
    if isinstance(mistake, KernelMistake):
        return
    ast.parse(text)
    assert mistake.tests
    for test in mistake.tests.split():
        file, _, function = test.partition("::")
        content = (ROOT / "tests" / file).read_text()
        assert re.search(rf"^def {function.partition('[')[0]}\(", content, re.MULTILINE), test


def test_there_are_eighty_and_some_of_each_package():
    packages = {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()} - {"tests", "build"}
    assert len(MISTAKES) >= 80
    assert {name.partition("/")[0] for name in MISTAKES} == packages | {"csrc"}
    assert len({(m.file, m.old, m.new) for m in MISTAKES.values()}) == len(MISTAKES)


@pytest.fixture
def tree(tmp_path) -> Path:
    """A repository of one function and its tests."""
    root = tmp_path / "repository"
    (root / "tests").mkdir(parents=True)
    (root / "double.py").write_text("def double(x):\n    return 2 * x\n")
    (root / "tests" / "test_double.py").write_text("""
import double, pytest
def test_of_two(): assert double.double(2) == 4
@pytest.mark.parametrize("x", [0, 1])
def test_of_all(x): assert double.double(x) == 2 * x
def test_that_fails(): assert False
""")
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=root, check=True)
    return root


def test_the_program_tells_found_from_not_found(tree, capsys):
    def mistake(new: str, tests: str) -> Mistake:
        return Mistake("double.py", "2 * x", new, " ".join(f"test_double.py::{test}" for test in tests.split()))

    outcomes = try_all(
        {
            "a/found": mistake("3 * x", "test_of_two"),
            "a/square": mistake("x * x", "test_of_two"),
            "a/found by the second": mistake("x * x", "test_of_two test_of_all"),
            "b/killed": mistake("__import__('os').abort()", "test_of_all[0]"),
            "b/no such text": Mistake("double.py", "4 * x", "", "test_double.py::test_of_two"),
            "b/fails anyway": mistake("3 * x", "test_that_fails"),
        },
        jobs=2,
        root=tree,
    )
    found = {name: outcome.found for name, outcome in outcomes.items()}
    assert found == {
        "a/found": True,
        "a/square": False,
        "a/found by the second": True,
        "b/killed": True,
        "b/no such text": None,
        "b/fails anyway": None,
    }
    assert (tree / "double.py").read_text() == "def double(x):\n    return 2 * x\n"
    capsys.readouterr()
    assert summary(outcomes) == 1
    said = capsys.readouterr().out
    assert "found: 3 of 6 mistakes, 50.0 %" in said.replace("%", " %") and "not found: a/square\n" in said
    assert summary({"a/found": outcomes["a/found"]}) == 0
