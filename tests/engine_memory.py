"""What a training process really holds, counted tensor by tensor while an engine trains a small network on the CPU."""

import gc
import json
from pathlib import Path
from types import SimpleNamespace

import torch

import kernels
from launch.training.deepspeed_options import deepspeed_config
from launch.training.engine import Engine, start_processes, stop_processes
from launch.training.optimizer import AdamWEma
from lightningdit.config import ModelConfig
from lightningdit.model import LightningDiT
from tests.live_memory import LiveMemory

NETWORK = ModelConfig(
    input_size=8,
    patch_size=1,
    in_channels=4,
    hidden_size=128,
    num_heads=4,
    depth=1,
    num_classes=10,
    use_swiglu=True,
    use_rope=True,
    use_rmsnorm=True,
)
IMAGES, STEPS = 8, 2  # of a micro-batch; the first step still sets things up


def write_counts(path: Path, cases: list[dict]) -> None:
    """The counts of each case, in their order, to `path` of the process; to be called on every process."""
    processes = start_processes()
    found = [count(processes.world_size, **case) for case in cases]
    Path(f"{path}.{processes.rank}").write_text(json.dumps(found))
    stop_processes()


def count(world_size: int, *, stage: int, bf16: bool, accumulation: int, options: dict) -> dict[str, float]:
    """Bytes of one process.

    Returns:
        parameters: number of the trained ones. kept: what the forward pass of a micro-batch keeps. resident: what is
        held between steps. backward, step: the most in the last micro-batch's backward pass and in the step that
        follows. start: the most while the engine is made.
    """
    config = deepspeed_config(
        stage=stage,
        bf16=bf16,
        micro_batch_size=IMAGES,
        accumulation=accumulation,
        world_size=world_size,
        overrides=options,
    )
    found: dict[str, float] = {}
    with LiveMemory() as live:
        network = LightningDiT(NETWORK, kernels.select("reference"), params_gathered=stage < 3).train()
        found["parameters"] = sum(p.numel() for p in network.parameters() if p.requires_grad)
        engine = Engine(network, _optimizer, config).train()
        gc.collect()  # DeepSpeed leaves cycles behind, which would live for as long as chance has it
        found |= {"start": live.peak, "resident": live.now}
        x, t = torch.randn(IMAGES, 4, 8, 8), torch.rand(IMAGES)
        x = x.bfloat16() if bf16 else x
        y = torch.zeros(IMAGES, dtype=torch.int64)
        for _ in range(STEPS * accumulation):
            gc.collect()
            before = live.now
            loss = engine(x, t, y).square().mean()
            found["kept"] = live.now - before
            live.peak = live.now
            engine.backward(loss)
            found["backward"] = live.peak
            del loss
            gc.collect()
            live.peak = live.now
            engine.step()
            found["step"] = live.peak
        engine.close()
    return found


def _optimizer(parameters, partitioned: bool) -> AdamWEma:
    """With an update that works in place, as those of a GPU do; the reference makes tensors on its way."""

    def update(weights, gradient, exp_avg, exp_avg_sq, ema, *, bf16_param, **_):
        exp_avg.add_(gradient)
        if bf16_param is not None:
            bf16_param.copy_(weights)

    ops = SimpleNamespace(adamw_ema_=update)
    return AdamWEma(
        parameters,
        ops,
        lr=1e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.0,
        ema_decay=0.9,
        max_grad_norm=0.0,
        partitioned=partitioned,
    )
