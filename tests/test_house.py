"""The arrows of the house, read from the imports themselves."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("kernels", "lightningdit", "vavae", "launch")
ALLOWED = {
    "kernels": {"kernels"},
    "lightningdit": {"lightningdit", "kernels"},
    "vavae": {"vavae", "kernels"},
    "launch": {"launch", "lightningdit", "vavae", "kernels"},
}
# Package → the only place it may be imported in.
HOME = {"triton": "kernels/", "deepspeed": "launch/engine.py", "timm": "vavae/foundation.py"}


def imported(path: Path) -> set[str]:
    """Top-level names of every import in a file, at any depth of nesting."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(path.relative_to(ROOT).parts[0] if node.level else node.module.split(".")[0])
    return names


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_downwards_only(package):
    house = {*PACKAGES, "bench", "tests"}
    wrong = {str(p.relative_to(ROOT)): imported(p) & house - ALLOWED[package] for p in sources(package)}
    assert sources(package)
    assert not {path: names for path, names in wrong.items() if names}


@pytest.mark.parametrize("library", HOME)
def test_a_library_is_imported_in_its_one_place(library):
    users = [str(p.relative_to(ROOT)) for package in PACKAGES for p in sources(package) if library in imported(p)]
    assert all(user.startswith(HOME[library]) for user in users), users


def test_imported_packages_are_declared():
    """Whatever the packages import comes with Python, is of this repository, or is on the list of pinned versions."""
    import sys
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {r.split("=")[0].split(";")[0].strip().lower() for r in project["dependencies"]}
    names = {"yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit-learn", "torch_fidelity": "torch-fidelity"}
    known = set(sys.stdlib_module_names) | set(PACKAGES) | {"scipy", "packaging"}  # scipy: with scikit-learn
    used = set().union(*(imported(p) for package in PACKAGES for p in sources(package)))
    assert not {n for n in used if names.get(n, n).lower() not in declared and n not in known}


def test_versions_are_pinned_in_one_place():
    """No other tracked file names a version of a pinned distribution."""
    listed = subprocess.run(["git", "ls-files", "*.sh", "*.py", "*.yml", "*.txt", "*.cfg"], cwd=ROOT, text=True,
                            capture_output=True, check=True).stdout.split()
    assert not [f for f in listed if (ROOT / f).exists() and "torch==2" in (ROOT / f).read_text() and f != __name__
                and not f.startswith("tests/")]


def test_the_packages_under_test_are_these():
    """`kernels` is also the name of a public distribution."""
    for package in PACKAGES:
        assert Path(__import__(package).__file__).parent == ROOT / package
