"""An installation: the files of sdist and wheel, and every program away from a checkout."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.config import ConfigError, load
from launch.config_files import SHIPPED
from tests import toy
from tests.run_rows import rows
from tests.test_house import PACKAGES

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"
KINDS = {path.name: "vavae" if "vavae" in path.name else "lightningdit" for path in SHIPPED.glob("*.yaml")}


@pytest.mark.parametrize("name", KINDS)
def test_a_shipped_config_is_found_by_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, notes = load(name, kind=KINDS[name])
    same, others = load(SHIPPED / name, kind=KINDS[name])
    assert run == same and notes == [f"not here, so the one in {SHIPPED}", *others]
    assert all(note.startswith(("deepspeed.file", f"extends {SHIPPED}", f"{SHIPPED}")) for note in others)


def test_a_file_of_that_name_here_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("digits.yaml").write_text((SHIPPED / "digits.yaml").read_text().replace("max_steps: ", "max_steps: 1"))
    run, notes = load("digits.yaml", kind="lightningdit")
    assert run.train.max_steps > load(SHIPPED / "digits.yaml", kind="lightningdit")[0].train.max_steps
    assert notes == [f"the one here, not that in {SHIPPED}"]


def test_a_link_that_leads_nowhere_is_no_reason_to_take_another_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("digits.yaml").symlink_to("moved.yaml")
    with pytest.raises(ConfigError, match="cannot read config: digits"):
        load("digits.yaml", kind="lightningdit")


@pytest.mark.parametrize("path", ["no_such.yaml", "./digits.yaml", "configs/digits.yaml", "/digits.yaml", ""])
def test_a_path_is_looked_for_where_it_says(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="cannot read config"):
        load(path, kind="lightningdit")


def run(*command, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """A child that knows nothing of this checkout but what it is given."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env = inherited | {"LIGHTNINGDIT_CUDA": "0", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | env
    return subprocess.run([str(part) for part in command], cwd=cwd, env=env, text=True, capture_output=True)


def done(*command, cwd: Path, **env: str) -> str:
    """Output of a child that ends with 0."""
    child = run(*command, cwd=cwd, **env)
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout


def build(kind: str, tree: Path, out: Path) -> Path:
    """The sdist or wheel of a source tree, made by its build backend in this environment."""
    done(sys.executable, "-c", BUILD.format(kind), out, cwd=tree)
    (made,) = out.iterdir()
    return made


def interpreter(environment: Path) -> Path:
    """Python of a new environment that has the packages of this one, but for this project."""
    venv.create(environment)
    python = environment / "bin" / "python"
    site = Path(done(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd="/").strip())
    # A line of a .pth file puts a folder on the path without reading the .pth files in it: no editable install.
    (site / "packages.pth").write_text("\n".join(path for path in sys.path if Path(path).name.endswith("-packages")))
    return python


def install(python: Path, what: Path, *options: str) -> None:
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    done(*pip, "--no-build-isolation", "--no-compile", "--force-reinstall", *options, what, cwd=what.parent)


def tracked() -> set[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, text=True, capture_output=True)
    if listed.returncode:
        pytest.skip("this is no checkout of git, which would tell what belongs to the project")
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}


@dataclass(frozen=True)
class Built:
    """A copy of the checkout, what was built of it, and the wheel that was built of the unpacked sdist."""

    tree: Path
    sdist: Path
    unpacked: Path
    wheels: tuple[Path, Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "a checkout"
    for name in tracked():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    sdist = build("sdist", tree, folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    wheels = (build("wheel", tree, folder / "wheel"), build("wheel", unpacked, folder / "again"))
    return Built(tree, sdist, unpacked, wheels)


def test_the_sdist_holds_what_git_does(built):
    held = {str(path.relative_to(built.unpacked)) for path in built.unpacked.rglob("*") if path.is_file()}
    made = {name for name in held if name.startswith(("build/", "lightningdit.egg-info/"))} | {"PKG-INFO", "setup.cfg"}
    assert held - made == tracked()


def test_a_wheel_holds_the_packages_and_their_data_alone(built):
    packages = {name for name in tracked() if name.split("/")[0] in PACKAGES}
    data = {name for name in packages if name.endswith((".yaml", ".json", ".html", ".css", ".js"))}
    modules = {name for name in packages if name.endswith(".py") and not name.startswith("launch/scripts/")}
    for wheel in built.wheels:
        with zipfile.ZipFile(wheel) as archive:
            assert {name for name in archive.namelist() if ".dist-info/" not in name} == data | modules


def test_the_extension_has_the_same_sources_in_the_sdist(built):
    sources = [load_setup(root).extension().sources for root in (ROOT, built.unpacked)]
    assert sources[0] == sources[1] and "csrc/binding.cpp" in sources[0]
    assert all((built.unpacked / name).is_file() for name in sources[1])


def load_setup(root: Path):
    spec = importlib.util.spec_from_file_location("project_setup", root / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> tuple[Path, Path]:
    """Python of an environment that the sdist's wheel is installed in, and the packages' folder there."""
    python = interpreter(tmp_path_factory.mktemp("environment") / "venv")
    install(python, built.wheels[1])
    return python, python.parents[1] / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"


def test_the_doctor_of_an_installation_knows_that_it_is_one(installed, tmp_path):
    python, site = installed
    text = done(python, "-m", "launch", "doctor", "--json", cwd=tmp_path)
    findings = json.loads(text)
    (own,) = [row for row in findings["this project"] if row["ok"] is not None]
    assert own == {"name": "packages", "value": "ours", "note": str(site), "ok": True}
    (extension,) = [row for row in findings["compilers"] if row["name"] == "cuda extension"]
    assert extension["value"] == "not installed" and "setup.py" not in text and "checkout is" in extension["note"]


def test_an_installation_plans_and_trains_with_a_shipped_config(installed, tmp_path):
    python, site = installed
    toy.write_random_latents(tmp_path / "latents", shape=(4, 8, 8))
    command = (
        "train",
        "lightningdit",
        "digits.yaml",
        "data.data_path=latents",
        "train.global_batch_size=4",
        "train.max_steps=2",
        "train.log_every=1",
        "deepspeed.file=zero1.json",
    )
    text = done(python, "-m", "launch", *command, "--dry-run", cwd=tmp_path)
    assert f"digits.yaml: not here, so the one in {site / 'launch' / 'configs'}" in text
    assert not (tmp_path / "output").exists()
    done(python, "-m", "launch", *command, cwd=tmp_path)
    assert [row["step"] for row in rows(tmp_path / "output/digits")] == [1, 2]


def test_an_installation_that_another_package_has_overwritten_says_so(installed, tmp_path):
    python, site = installed
    ours = (file := site / "kernels" / "__init__.py").read_text()
    file.write_text("import importlib.metadata\n\n__version__ = importlib.metadata.version('kernels')\n")
    try:
        child = run(python, "-m", "launch", "sample", "digits.yaml", cwd=tmp_path)
        found = done(python, "-c", "from launch.doctor import *; print(as_text({'': own_rows()}))", cwd=tmp_path)
    finally:
        file.write_text(ours)
    assert child.returncode == 2 and child.stderr.count("\n") == 1
    assert child.stderr.startswith(f"error: {file} is not this project's")
    assert "pip uninstall kernels" in child.stderr
    assert "✗ files: 1 altered" in found and "kernels/__init__.py" in found and found.rstrip().endswith("2 problems")


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="needs to run in a virtual environment")
def test_the_scripts_of_the_sdist_work_and_write_where_they_are_called(built, tmp_path):
    script = built.unpacked / "launch" / "quickstart.sh"
    assert "images in" in done("bash", script, "--until", "data", cwd=tmp_path, VIRTUAL_ENV=sys.prefix)
    assert (tmp_path / "output" / "quickstart" / "data" / "train").is_dir()


def test_a_checkout_is_installed_in_place(built, tmp_path):
    python = interpreter(tmp_path / "venv")
    install(python, built.tree, "--editable")
    statement = "from launch.runtime import packages; print(packages.ROOT, packages.foreign_packages())"
    assert done(python, "-c", statement, cwd=tmp_path).strip() == f"{built.tree} {{}}"
