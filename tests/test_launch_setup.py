"""The set-up script: an active environment with the right torch is used as it is, from any directory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.scripts.check_env import missing

ROOT = Path(__file__).parent.parent
IN_ENVIRONMENT = sys.prefix != sys.base_prefix


def set_up(tmp_path: Path, *extras: str, **env: str) -> subprocess.CompletedProcess:
    script = f'source "{ROOT}/launch/setup_env.sh"; setup_environment {" ".join(extras)} && echo "$PYTHON"'
    env = os.environ | {"LIGHTNINGDIT_CUDA": "0"} | env
    return subprocess.run(["bash", "-euc", script], cwd=tmp_path, env=env, text=True, capture_output=True)


@pytest.mark.skipif(not IN_ENVIRONMENT, reason="needs to run in a virtual environment")
def test_an_active_environment_is_used_as_it_is(tmp_path):
    done = set_up(tmp_path, "test", VIRTUAL_ENV=sys.prefix)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{sys.prefix}/bin/python"]
    assert "using the active environment" in done.stderr and "installing" not in done.stderr


def test_an_environment_of_another_torch_is_left_alone(tmp_path):
    """Its interpreter knows no torch: the script goes on to .venv, here one that is already complete."""
    fake = tmp_path / "env" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    (tmp_path / "launch" / "scripts").mkdir(parents=True)
    for name in ("launch/setup_env.sh", "launch/scripts/check_env.py", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    ready = tmp_path / ".venv" / "bin" / "python"
    ready.parent.mkdir(parents=True)
    ready.symlink_to(sys.executable)
    checksum = subprocess.run("cksum < pyproject.toml", shell=True, cwd=tmp_path, text=True, capture_output=True).stdout
    (tmp_path / ".venv/.installed").write_text(f"{checksum.strip()} test\n")
    script = f'source "{tmp_path}/launch/setup_env.sh"; setup_environment test && echo "$PYTHON"'
    env = os.environ | {"VIRTUAL_ENV": str(tmp_path / "env"), "CONDA_PREFIX": "", "LIGHTNINGDIT_CUDA": "0"}
    done = subprocess.run(["bash", "-euc", script], env=env, text=True, capture_output=True, cwd="/")
    assert done.stdout.split() == [str(ready)], done.stderr


def test_missing_packages_are_named(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["torch==2.11.0", "no-such-thing==1; platform_system == \'Linux\'"]\n'
        '[project.optional-dependencies]\ntest = ["pytest==9", "neither-this"]\n'
    )
    assert missing(tmp_path / "pyproject.toml", []) == ["no-such-thing==1; platform_system == 'Linux'"]
    assert missing(tmp_path / "pyproject.toml", ["test"])[1:] == ["neither-this"]


def test_the_public_package_of_the_same_name_is_mentioned(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["no-such-thing==1"]\n')
    command = [sys.executable, ROOT / "launch/scripts/check_env.py", "pyproject.toml"]
    info = tmp_path / "kernels-0.17.2.dist-info"
    for version in ("", "0.17.2"):
        env = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True)
        assert done.stdout == "no-such-thing==1\n"
        assert (f"kernels {version} is installed here" in done.stderr) is bool(version)
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n")


@pytest.mark.parametrize("script", ["launch/quickstart.sh", "launch/setup_env.sh", "tests/run.sh", ".ci/run"])
def test_scripts_are_sound_shell(script):
    assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0


@pytest.fixture
def tree(tmp_path):
    """A tree with a setup.py that counts its runs, and the function that builds its extension."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/setup_env.sh").write_text((ROOT / "launch/setup_env.sh").read_text())
    (tmp_path / "pyproject.toml").write_text('dependencies = ["torch==2.11.0"]')
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/swiglu.cu").write_text("1")
    (tmp_path / "setup.py").write_text("print('built', file=open('runs', 'a'))")

    def build(*extras: str, **env: str) -> subprocess.CompletedProcess:
        script = f'source launch/setup_env.sh; PYTHON="{sys.executable}"; _build_extension {" ".join(extras)}'
        path = f"{tmp_path}/bin:/usr/bin:/bin"  # no nvidia-smi of this machine
        env = {"PATH": path, "HOME": str(tmp_path)} | env
        return subprocess.run(["bash", "-euc", script], cwd=tmp_path, env=env, text=True, capture_output=True)

    return tmp_path, build


def runs(directory: Path) -> int:
    return len((directory / "runs").read_text().split()) if (directory / "runs").exists() else 0


def test_kernels_are_built_once_for_each_change(tree):
    directory, build = tree
    assert build("test").returncode == 0 and build("test").returncode == 0
    assert runs(directory) == 1
    (directory / "csrc/swiglu.cu").write_text("2")
    assert build("test").returncode == 0 and runs(directory) == 2
    assert build("test", LIGHTNINGDIT_CUDA_ARCHS="sm_80").returncode == 0 and runs(directory) == 3
    assert build("test", LIGHTNINGDIT_CUDA="0").returncode == 0 and runs(directory) == 3


def test_kernels_are_not_built_where_they_are_of_no_use(tree):
    directory, build = tree
    assert build().returncode == 0 and runs(directory) == 0
    (directory / "bin").mkdir()
    (directory / "bin/nvidia-smi").write_text("#!/bin/sh")
    (directory / "bin/nvidia-smi").chmod(0o755)
    assert build().returncode == 0 and runs(directory) == 1


def test_kernels_that_do_not_build_are_an_error_with_the_compilers_words(tree):
    directory, build = tree
    (directory / "setup.py").write_text("raise SystemExit('swiglu.cu(7): error: expected a semicolon')")
    for _ in range(2):  # and it is tried again
        done = build("test")
        assert done.returncode == 1 and "expected a semicolon" in done.stderr
