"""`CONTRIBUTING.md` followed to the letter in a copy of the tree: the op and backend that it adds pass all tests."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: What a checkout holds and the steps need.
FOLDERS = ("bench", "common", "csrc", "kernels", "launch", "lightningdit", "tests", "vavae")
SECTIONS = ("Add an op", "Add a backend")
#: Options for the document's own pytest commands: they leave out what compiles C++, and write no cache into the tree.
ADDED = "-p no:cacheprovider --deselect tests/test_kernels_ops.py::test_compiles_with_inductor"
#: A file's name before its content, or commands.
STEP = re.compile(r"^`(\S+)`\n\n```python\n(.*?)^```$|^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def steps(document: str) -> list[tuple[str, str]]:
    """(path, content) of each file to write and ("", commands) of each block to run, in the order of the sections."""
    parts = {part.partition("\n")[0]: part for part in document.split("\n## ")}
    return [(path, content or commands) for title in SECTIONS for path, content, commands in STEP.findall(parts[title])]


def follow(steps: list[tuple[str, str]], tree: Path) -> list[str]:
    """Take the steps in the tree; what the commands print. Raises AssertionError where one fails."""
    said = []
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": path, "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ADDED}
    for name, text in steps:
        if name:
            (tree / name).parent.mkdir(exist_ok=True)
            (tree / name).write_text(text)
        else:
            command = ["bash", "-euc", text]
            done = subprocess.run(command, cwd=tree, env=environment, text=True, capture_output=True)
            assert done.returncode == 0, f"{text}\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
            said.append(done.stdout)
    return said


def contents(tree: Path) -> dict[str, bytes]:
    files = (path for path in tree.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(tree)): path.read_bytes() for path in files}


@pytest.fixture
def tree(tmp_path):
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_its_steps_add_an_op_and_a_backend_without_an_edit_of_tests_or_benches(tree):
    before = contents(tree)
    found = steps((ROOT / "CONTRIBUTING.md").read_text())
    said = follow(found, tree)
    assert [int(re.search(r"(\d+) passed", text)[1]) > 40 for text in said] == [True, True]
    changed = {name for name, content in contents(tree).items() if before.get(name) != content}
    pages = {"README.md", "bench/results/README.md"}  # the second has a row of it for each GPU
    assert changed == {name for name, _ in found if name} | {"kernels/__init__.py"} | pages
    assert "| `squared_relu` | The square of the rectified input | ✓ |" in (tree / "README.md").read_text()


def test_every_step_is_read():
    document = (ROOT / "CONTRIBUTING.md").read_text()
    found = [path for path, _ in steps(document)]
    sections = document.partition("## Add an op")[2].partition("## Run one test")[0]
    assert found.count("") == sections.count("```sh\n") == 2 and len(found) == sections.count("```\n") == 8


def test_the_programs_and_files_that_it_names_are_there():
    named = r"python -m ([\w.]+)|\b((?:bench|csrc|kernels|launch|tests)/[\w/]+\.\w+)"
    for module, path in re.findall(named, (ROOT / "CONTRIBUTING.md").read_text()):
        names = [path] if path else [f"{module.replace('.', '/')}{end}" for end in (".py", "/__main__.py")]
        added = "squared_relu" in path or module == "pytest"
        assert added or any((ROOT / name).is_file() for name in names), (module, path)
