"""The launcher scripts, run for real on CPUs: one node of two processes, two nodes of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import toy
from tests.children import free_port
from tests.run_rows import rows

SCRIPTS = Path(__file__).parents[1] / "launch" / "scripts"
pytestmark = pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="needs to run in a virtual environment")


@pytest.fixture
def command(tmp_path):
    """The program and its arguments: two steps of a toy run."""
    data = {**toy.LIGHTNINGDIT["data"], "data_path": str(toy.write_latents(tmp_path / "latents"))}
    train = {"output_dir": str(tmp_path), "max_steps": 2, "ckpt_every": 2}
    config = toy.write_run(tmp_path / "run.yaml", toy.LIGHTNINGDIT, data=data, train=train)
    return "train", "lightningdit", str(config)


def start(script: str, *argv: str, cwd: Path, **env: object) -> subprocess.Popen:
    own = {"VIRTUAL_ENV": sys.prefix, "DS_ACCELERATOR": "cpu", "MASTER_PORT": str(env.pop("port")), **env}
    environment = os.environ | {name: str(value) for name, value in own.items()}
    return subprocess.Popen(
        ["bash", SCRIPTS / script, *argv],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def losses(directory: Path) -> list[float]:
    return [row["loss"] for row in rows(directory / "run")]


def finish(*processes: subprocess.Popen) -> str:
    texts = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(texts)[-4000:]
    return "\n".join(texts)


def test_one_node_and_two_nodes_train_the_same(tmp_path, command):
    said = finish(start("one_node.sh", *command, cwd=tmp_path, port=free_port(), GPUS=2))
    assert "2 × cpu" in said
    one = losses(tmp_path)
    hosts, port = tmp_path / "hosts", free_port()
    hosts.write_text("# both here\nlocalhost slots=1\n127.0.0.1 slots=1\n")
    command = (*command, f"train.output_dir={tmp_path / 'nodes'}")
    nodes = [start("many_nodes.sh", *command, cwd=tmp_path, port=port, HOSTFILE=hosts, NODE_RANK=r) for r in (0, 1)]
    assert "2 × cpu" in finish(*nodes)
    assert losses(tmp_path / "nodes") == one and len(one) == 2


def test_no_hostfile_is_said(tmp_path, command):
    for env in ({}, {"HOSTFILE": tmp_path / "none"}):
        process = start("many_nodes.sh", *command, cwd=tmp_path, port=1, **env)
        assert "HOSTFILE" in process.communicate()[0] and process.returncode != 0
