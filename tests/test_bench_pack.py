"""`bench/pack.sh`: its choice of wheels and versions, the printed lines, and its exit status.

pip finds its packages in a folder made by the test, without a network.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

from bench import pack
from tests.test_csrc_setup import NVCC, project

ROOT = Path(__file__).parents[1]
HERE = "{}.{}".format(*sys.version_info)
OTHERS = {p: h for p in ("3.12", "3.13", "3.14", "3.11") if p != HERE and (h := pack.find_headers(p))}
PYPROJECT = """
[project]
dependencies = ["torch==2.0", "ldit-alpha==1.0; platform_system == 'Linux'", "torch-fidelity==0.1"]
[project.optional-dependencies]
peers = ["ldit-peer==3.0"]
"""
#: Says what the last of the printed lines gives it.
GPU = """#!/usr/bin/env bash
echo "revision $GIT_REVISION, arguments $*"
python3 -c 'import ldit_alpha, ldit_beta; print("imported", ldit_alpha.__file__)'
ls kernels
"""


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Puts a wheel where pip looks."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)

    def add(name: str, version: str, *needs: str, tag: str = "py3-none-any", size: int = 0) -> str:
        file, about = f"{name}-{version}-{tag}.whl", f"{name}-{version}.dist-info"
        fields = [("Metadata-Version", "2.1"), ("Name", name), ("Version", version)]
        fields += [("Requires-Dist", need) for need in needs]
        with ZipFile(folder / file, "w") as wheel:
            wheel.writestr(f"{name}.py", f"#{'.' * size}\n")
            wheel.writestr(f"{about}/METADATA", "".join(f"{key}: {value}\n" for key, value in fields))
            wheel.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
            wheel.writestr(f"{about}/RECORD", "")
        return file

    return add


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A checkout with pins of its own; no headers of any Python are found."""
    root = tmp_path / "tree"
    for folder in ("bench", "kernels"):
        (root / folder).mkdir(parents=True)
    for name, text in {"pyproject.toml": PYPROJECT, "bench/gpu.sh": GPU, ".gitignore": "build/\n*.so\n"}.items():
        (root / name).write_text(text)
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "--message", "first")
    monkeypatch.setattr(pack, "find_headers", lambda python: None)
    return root


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True).stdout


def packed(folder: Path) -> set[str]:
    return {path.name for path in (folder / "wheels").glob("*")}


def printed_lines(output: str) -> str:
    """What stands indented below the sentence about the other machine."""
    return "".join(line[4:] for line in output.split("On the other machine")[1].splitlines(True) if line[:4].isspace())


def test_packages_of_this_project_that_an_image_lacks():
    assert {r.name for r in pack.pinned(ROOT, ())} == {"deepspeed", "lpips", "pydantic", "packaging", "tqdm"}
    known = {r.name for r in pack.pinned(ROOT, pack.IN_IMAGE | pack.OPTIONAL | {"liger-kernel"})}
    assert known >= pack.IN_IMAGE | pack.OPTIONAL, "every name is that of a pinned package"


def test_wheels_of_the_pins_and_of_their_dependencies(index, tree, tmp_path, monkeypatch, capsys):
    here = metadata.version("packaging")
    index(
        "ldit_alpha",
        "1.0",
        "LDIT.beta>=1",
        "packaging>=20",
        "torch>1",
        "ldit-other; python_version < '3.12'",
        "ldit-other; sys_platform == 'darwin'",
        "ldit-other; extra == 'more'",
    )
    index("ldit_alpha", "2.0")
    for version in (here, "99.0"):
        index("packaging", version)
    for version in ("1.0", "1.5"):
        for tag in ("cp311-cp311", "cp312-cp312", "cp313-cp313"):
            index("ldit_beta", version, tag=f"{tag}-manylinux_2_17_x86_64.manylinux2014_x86_64")
    index("ldit_beta", "1.6", tag="cp312-cp312-manylinux_2_17_aarch64")
    index("ldit_beta", "1.7", tag="cp312-cp312-manylinux_2_39_x86_64")
    out = tmp_path / "out"
    (out / "wheels").mkdir(parents=True)
    (out / "wheels" / "ldit_alpha-0.9-py3-none-any.whl").touch()
    (out / "_cuda.cpython-310-x86_64-linux-gnu.so").touch()
    assert pack.main([str(out)], tree) == 0
    beta = "ldit_beta-1.5-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"
    assert packed(out) == {"ldit_alpha-1.0-py3-none-any.whl", f"packaging-{here}-py3-none-any.whl", beta}
    printed = capsys.readouterr().out
    assert beta in printed and "no extension, because there are no headers of Python 3.12 here" in printed
    assert not list(out.glob("*.so")), "one of an earlier run, for another Python"

    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert pack.main([str(out)], tree) == 0, "what is there is not fetched again"
    assert pack.main([str(out), "--python", "3.13"], tree) == 1
    assert "not packed: LDIT.beta>=1 (" in capsys.readouterr().err
    assert beta in packed(out), "nothing is removed as long as something is missing"
    assert git(tree, "status", "--porcelain") == ""


@pytest.mark.parametrize("name", ["ldit-peer", "torch", "Torch_Fidelity"])
def test_packages_by_name(index, tree, tmp_path, name):
    index("ldit_alpha", "1.0")
    files = {
        "ldit-peer": index("ldit_peer", "3.0", "torch"),
        "torch": index("torch", "2.0"),
        "Torch_Fidelity": index("torch_fidelity", "0.1"),
    }
    assert pack.main([str(tmp_path / "out"), "--with", name], tree) == 0
    assert packed(tmp_path / "out") == {"ldit_alpha-1.0-py3-none-any.whl", files[name]}


def test_a_wheel_is_built_of_a_package_published_as_source(index, tree, tmp_path):
    source = tmp_path / "deepspeed-9.9"
    source.mkdir()
    program = "import os\nfrom setuptools import setup\nassert os.environ['DS_BUILD_OPS'] == '0'\nsetup(%s)\n"
    (source / "setup.py").write_text(program % "name='deepspeed', version='9.9', py_modules=[]")
    with tarfile.open(tmp_path / "index" / "deepspeed-9.9.tar.gz", "w:gz") as archive:
        archive.add(source, source.name)
    wheels = pack.Wheels(tmp_path / "out", HERE)
    wheels.folder.mkdir()
    assert wheels.get(Requirement("deepspeed==9.9")).name == "deepspeed-9.9-py3-none-any.whl"


def test_two_needs_that_no_version_meets(index, tree, tmp_path, capsys):
    index("ldit_alpha", "1.0", "ldit-beta", "ldit-gamma")
    index("ldit_beta", "2.0")
    index("ldit_gamma", "1.0", "ldit-beta<2")
    assert pack.main([str(tmp_path / "out")], tree) == 1
    assert "not packed: ldit-beta<2 (a package needs it, another took ldit_beta-2.0" in capsys.readouterr().err


def test_a_wheel_that_cannot_be_had_is_named_and_the_others_are_packed(index, tree, tmp_path, capsys):
    index("ldit_alpha", "1.0", "ldit-absent>=2", "ldit-beta")
    index("ldit_beta", "1.0")
    assert pack.main([str(tmp_path / "out")], tree) == 1
    told = capsys.readouterr()
    assert told.err.strip() == "not packed: ldit-absent>=2 (No matching distribution found for ldit-absent>=2)"
    assert len(packed(tmp_path / "out")) == 2 and "bash bench/gpu.sh" in told.out


def test_more_than_the_limit(index, tree, tmp_path, monkeypatch, capsys):
    index("ldit_alpha", "1.0", size=600_000)
    monkeypatch.setattr(pack, "LIMIT_MB", 0.5)
    assert pack.main([str(tmp_path / "out")], tree) == 1
    assert capsys.readouterr().err == "0.6 MB are more than 0.5: leave out a --with, or an architecture\n"
    (tree / "large").write_bytes(bytes(1_500_000))
    monkeypatch.setattr(pack, "LIMIT_MB", 2)
    assert pack.main([str(tmp_path / "out")], tree) == 0, "what git does not track does not count"
    git(tree, "add", "large")
    assert pack.main([str(tmp_path / "out")], tree) == 1


@pytest.mark.parametrize("place", ["tree/build/packed", "a folder"])
def test_the_printed_lines_work_as_they_are(index, tree, tmp_path, monkeypatch, capsys, place):
    index("ldit_alpha", "1.0", "ldit-beta")
    index("ldit_beta", "1.0")

    def build(root, headers, python, target):
        (target / f"_cuda.{python}.so").touch()
        return target / f"_cuda.{python}.so", ""

    monkeypatch.setattr(pack, "find_headers", lambda python: tmp_path)
    monkeypatch.setattr(pack, "version_of", lambda headers: HERE)
    monkeypatch.setattr(pack, "build_extension", build)
    assert pack.main([str(tmp_path / place), "--python", HERE], tree) == 0
    lines = printed_lines(capsys.readouterr().out)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "TMPDIR": str(tmp_path / "temporary")}
    (tmp_path / "temporary").mkdir()
    done = subprocess.run(["bash", "-euc", lines], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, lines + done.stderr
    assert f"revision {git(tree, 'rev-parse', 'HEAD').strip()}, arguments OUT 8" in done.stdout
    assert f"imported {tmp_path / 'temporary'}/" in done.stdout and f"_cuda.{HERE}.so" in done.stdout
    assert lines.startswith("pack=build/packed\n" if place.startswith("tree") else f"pack='{tmp_path / place}'  # or ")
    assert git(tree, "status", "--porcelain") == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tree/packed"], "tree/packed, in the tree; allowed: outside, or where git ignores files"),
        (["tree"], "in the tree; allowed"),
        (["out", "--with", "ldit-nothing"], "--with ldit-nothing is not pinned in pyproject.toml; allowed: ldit-alpha"),
        (["out", "--headers", "tree"], "which has no Python.h of Python 3.12"),
    ],
)
def test_refusals(tree, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert pack.main(arguments, tree) == 2
    assert message in capsys.readouterr().err and not Path("out").exists()
    assert git(tree, "status", "--porcelain") == ""


def test_headers_of_another_version_are_not_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setattr(pack.shutil, "which", lambda name: None)
    for folder, minor in (("3.99.0", 99), ("3.98.1", 7)):
        headers = tmp_path / "versions" / folder / "include" / f"python3.{folder.split('.')[1]}"
        headers.mkdir(parents=True)
        (headers / "Python.h").touch()
        macros = f"#define PY_MAJOR_VERSION\t3\n#define PY_MINOR_VERSION\t{minor}\n#define PY_MICRO_VERSION\t0\n"
        (headers / "patchlevel.h").write_text(macros)
    assert pack.find_headers("3.99").parts[-3] == "3.99.0"
    assert pack.find_headers("3.98") is None and pack.find_headers("3.9") != tmp_path


@pytest.mark.skipif(NVCC is None or not OTHERS, reason="there is no nvcc, or there are no headers of another Python")
def test_an_extension_for_another_python(tmp_path, monkeypatch):
    """Made by the Python that runs this, and asked by the other, where that is installed."""
    python, headers = next(iter(OTHERS.items()))
    monkeypatch.setenv("LIGHTNINGDIT_CUDA_ARCHS", "sm_90a")
    root, out = tmp_path / "tree", tmp_path / "out"
    root.mkdir()
    out.mkdir()
    project(root, "__global__ void nothing() {}\nint answer() { return 42; }\n")
    extension, reason = pack.build_extension(root, headers, python, out)
    assert extension.name == f"_cuda.cpython-{python.replace('.', '')}-x86_64-linux-gnu.so" and not reason
    assert "GLIBC 2." in pack.libraries_asked_for(extension)
    assert not list((root / "kernels").glob("*.so")), "the one in the tree is for the Python that runs here"
    kernel = next(root.rglob("one.o")).stat().st_mtime_ns
    if interpreter := shutil.which(headers.parents[1] / "bin" / f"python{python}"):
        shutil.copy(extension, root / "kernels")
        runtime = Path(metadata.distribution("nvidia-cuda-runtime").locate_file("nvidia/cu13/lib"))
        environment = os.environ | {"LD_LIBRARY_PATH": str(runtime)}
        program = "import kernels._cuda as c; print(c.answer())"
        run = subprocess.run([interpreter, "-c", program], cwd=root, env=environment, capture_output=True, text=True)
        assert run.stdout.strip() == "42", run.stderr
    (root / "csrc" / "binding.cpp").write_text("no_such_name\n")
    with pytest.raises(RuntimeError, match=r"(?s)does not compile.*no_such_name"):
        pack.build_extension(root, headers, python, out)
    assert next(root.rglob("one.o")).stat().st_mtime_ns == kernel, "what had been compiled was compiled again"
    monkeypatch.setenv("LIGHTNINGDIT_CUDA", "0")
    assert pack.build_extension(root, headers, python, out) == (None, "LIGHTNINGDIT_CUDA is 0")


def test_the_script_runs_from_any_folder(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "pack.sh"), "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "usage: bash bench/pack.sh" in done.stdout, done.stderr
