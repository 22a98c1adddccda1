"""What a training step must not do: wait for the device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from launch.engine import Engine, deepspeed_config, start_processes
from launch.optimizer import AdamWEma
from lightningdit.config import ModelConfig
from lightningdit.model import LightningDiT
from lightningdit.modulation import evenly_spaced
from tests import toy
from tests.host_reads import HostReads

ROOT = Path(__file__).parents[1]


OPS = kernels.select("reference")
NETWORK = ModelConfig(input_size=4, patch_size=2, in_channels=4, hidden_size=24, num_heads=2, depth=3, num_classes=3,
                      use_swiglu=True, use_rope=True, use_rmsnorm=True)  # fmt: skip


def engine(stage: int, bf16: bool) -> Engine:
    """A small network, in this process alone."""

    def optimizer(parameters, partitioned: bool) -> AdamWEma:
        return AdamWEma(parameters, OPS, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, ema_decay=0.9,
                        max_grad_norm=1.0, partitioned=partitioned)  # fmt: skip

    start_processes()
    config = deepspeed_config(
        stage=stage, bf16=bf16, micro_batch_size=2, accumulation=1, world_size=1, overrides={}
    )
    torch.manual_seed(0)
    return Engine(LightningDiT(NETWORK, OPS), optimizer, config)


@pytest.mark.parametrize(("stage", "bf16"), [(1, False), (1, True), (2, True)])
def test_one_product_can_read_the_modulation_of_all_blocks(stage, bf16):
    """DeepSpeed's flat buffer holds equal layers at equal distances, so that no weight is copied for it."""
    linears = [block.adaLN_modulation[1] for block in engine(stage, bf16).module.blocks]
    assert evenly_spaced([linear.weight for linear in linears]) is not None
    assert evenly_spaced([linear.bias for linear in linears]) is not None


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
