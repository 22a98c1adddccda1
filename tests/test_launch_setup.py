"""The set-up script: an active environment with the right torch is used as it is, from any directory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.check_env import missing

ROOT = Path(__file__).parent.parent
IN_ENVIRONMENT = sys.prefix != sys.base_prefix


def set_up(tmp_path: Path, *extras: str, **env: str) -> subprocess.CompletedProcess:
    script = f'source "{ROOT}/launch/setup_env.sh"; setup_environment {" ".join(extras)} && echo "$PYTHON"'
    return subprocess.run(["bash", "-euc", script], cwd=tmp_path, env=os.environ | env, text=True, capture_output=True)


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
    (tmp_path / "launch").mkdir()
    for name in ("launch/setup_env.sh", "launch/check_env.py", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    ready = tmp_path / ".venv" / "bin" / "python"
    ready.parent.mkdir(parents=True)
    ready.symlink_to(sys.executable)
    checksum = subprocess.run("cksum < pyproject.toml", shell=True, cwd=tmp_path, text=True, capture_output=True).stdout
    (tmp_path / ".venv/.installed").write_text(f"{checksum.strip()} test\n")
    script = f'source "{tmp_path}/launch/setup_env.sh"; setup_environment test && echo "$PYTHON"'
    env = os.environ | {"VIRTUAL_ENV": str(tmp_path / "env"), "CONDA_PREFIX": ""}
    done = subprocess.run(["bash", "-euc", script], env=env, text=True, capture_output=True, cwd="/")
    assert done.stdout.split() == [str(ready)], done.stderr


def test_missing_packages_are_named(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["torch==2.11.0", "no-such-thing==1; platform_system == \'Linux\'"]\n'
        '[project.optional-dependencies]\ntest = ["pytest==9", "neither-this"]\n'
    )
    assert missing(tmp_path / "pyproject.toml", []) == ["no-such-thing==1; platform_system == 'Linux'"]
    assert missing(tmp_path / "pyproject.toml", ["test"])[1:] == ["neither-this"]


@pytest.mark.parametrize("script", ["launch/quickstart.sh", "launch/setup_env.sh", "tests/run.sh", ".ci/run"])
def test_scripts_are_sound_shell(script):
    assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0
