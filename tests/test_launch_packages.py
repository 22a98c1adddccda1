"""A package of another project under the name of one of ours is named before any program imports it."""

import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
from packaging.version import Version

import kernels
from launch.__main__ import PROGRAMS, main
from launch.runtime import packages

ROOT = Path(__file__).parents[1]
OTHERS = "raise RuntimeError('the package of another project was imported')"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that this project is installed in, first on Python's path; nothing of it is imported yet."""
    site = tmp_path / "lib" / "site-packages"
    for name in packages.PACKAGES:
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_bytes((ROOT / name / "__init__.py").read_bytes())
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(packages, "ROOT", site)
    return site


def another(folder: Path, file: str, monkeypatch) -> Path:
    """A file of another project in `folder`, which comes first on Python's path."""
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(OTHERS)
    monkeypatch.syspath_prepend(folder)
    return path


def test_our_own_packages_are_ours(site):
    assert packages.foreign_packages() == {}


@pytest.mark.parametrize("name", packages.PACKAGES)
@pytest.mark.parametrize("file", ["{}/__init__.py", "{}.py"])
def test_a_package_found_first_is_named_with_its_folder(name, file, site, tmp_path, monkeypatch):
    path = another(tmp_path / "work", file.format(name), monkeypatch)
    (sentence,) = packages.foreign_packages().values()
    assert sentence == (
        f"`import {name}` gives {path}, which is not this project's {site / name / '__init__.py'}; "
        f"start from a folder other than {tmp_path / 'work'}, and take that off PYTHONPATH"
    )


def test_one_that_was_installed_elsewhere_is_to_be_uninstalled(site, tmp_path, monkeypatch):
    another(tmp_path / "other" / "site-packages", "kernels/__init__.py", monkeypatch)
    assert "pip uninstall kernels" in packages.foreign_packages()["kernels"]


def test_a_file_of_ours_that_was_overwritten_is_named(site, monkeypatch):
    path = another(site, "kernels/__init__.py", monkeypatch)
    (sentence,) = packages.foreign_packages().values()
    assert sentence.startswith(f"{path} is not this project's") and "install this project again" in sentence


def test_a_file_of_ours_that_was_removed_is_named(site, monkeypatch):
    """As uninstalling the other package leaves it: a folder, which Python would import as an empty package."""
    (site / "kernels" / "__init__.py").unlink()
    monkeypatch.setattr(packages, "find_spec", lambda name: PathFinder.find_spec(name, [str(site)]))
    (sentence,) = packages.foreign_packages().values()
    assert str(site / "kernels" / "__init__.py") in sentence and "install this project again" in sentence


def test_a_file_of_ours_that_cannot_be_read_is_named(site, monkeypatch):
    """As an installation by another user with a strict umask leaves it."""
    path, read = site / "kernels" / "__init__.py", Path.read_bytes

    def refuse(self):
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert packages.foreign_packages() == {"kernels": f"this project's {path} cannot be read: Permission denied"}


def test_in_a_checkout_the_file_is_to_be_restored(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "ROOT", tmp_path)
    monkeypatch.delitem(sys.modules, "kernels")
    another(tmp_path, "kernels/__init__.py", monkeypatch)
    assert "restore it" in packages.foreign_packages()["kernels"]


@pytest.mark.parametrize("program", sorted(set(PROGRAMS) - {"doctor"}))
def test_every_program_ends_with_that_sentence(program, site, tmp_path, monkeypatch, capsys):
    path = another(tmp_path, "kernels/__init__.py", monkeypatch)
    assert main([program]) == 2
    assert capsys.readouterr().err.startswith(f"error: `import kernels` gives {path}, ")


@pytest.mark.parametrize(
    "command",
    [
        ("launch", "train", "lightningdit", "digits.yaml"),
        ("launch", "doctor"),
        ("bench.ops",),
        ("bench.triage", "out"),
    ],
)
def test_the_processes_end_without_a_traceback(command, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(OTHERS)
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
    )
    said = done.stdout if "doctor" in command else done.stderr
    assert f"`import kernels` gives {tmp_path / 'kernels' / '__init__.py'}, which is not this project's" in said
    assert done.returncode in (1, 2) and "Traceback" not in done.stdout + done.stderr
    assert "doctor" in command or len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("program", ["status", "train"])
def test_a_python_that_lacks_a_package_is_named(program):
    """As that of the system, where the project's environment is not active."""
    done = subprocess.run([sys.executable, "-S", "-m", "launch", program], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {sys.executable} has no package ")
    assert len(done.stderr.splitlines()) == 1 and "launch doctor" in done.stderr


def test_libraries_that_look_for_the_public_package_find_ours_too_old():
    """They ask for its version, which is that of the module where no distribution of the name is installed."""
    assert Version(kernels.__version__) < Version("0.1")
