"""What a training step must not do: wait for the device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import toy
from tests.host_reads import HostReads

ROOT = Path(__file__).parents[1]


def test_reads_are_seen():
    reads, numbers = HostReads(), torch.ones(3)
    with reads:
        numbers.sum().item()
        if numbers[0] > 0:
            numbers.nonzero()
        numbers * 2
    assert sum(reads.seen.values()) == 3 and all("test_launch_step.py" in key for key in reads.seen)


@pytest.mark.parametrize("overrides", [
    ("train.precision=bfloat16",),
    ("train.micro_batch_size=4", "train.compile=aot_eager"),
    ("train.precision=bfloat16", "deepspeed.zero_stage=2"),
], ids=["bfloat16", "accumulated_compiled", "zero2"])  # fmt: skip
def test_a_step_reads_nothing_on_the_host(tmp_path, overrides):
    """Neither this project nor DeepSpeed, from the first step on, checkpoints and log lines aside."""
    data = {**toy.LIGHTNINGDIT["data"], "data_path": str(toy.write_latents(tmp_path / "latents"))}
    train = {"output_dir": str(tmp_path), "max_steps": 3}
    config = toy.write_run(tmp_path / "run.yaml", toy.LIGHTNINGDIT, data=data, train=train)
    command = [sys.executable, "-m", "tests.host_reads", str(config), str(tmp_path / "reads.json"), *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "reads.json").read_text()) == {}
