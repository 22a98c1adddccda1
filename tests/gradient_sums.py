"""How exact sums of gradients are, and what they take: python -m tests.gradient_sums, on two processes.

For each ZeRO stage and dtype of the sums: the relative error of a step's gradient against the float64 sum of what the
backward passes gave, the bytes that one process hands to collectives in a step, and those of the tensors that live at
most, all of an engine's included, both by trained parameter.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves

import kernels
from launch.config_files import merge
from launch.training.config import TrainConfig
from launch.training.deepspeed_options import DeepSpeedConfig, deepspeed_config
from launch.training.engine import Engine, start_processes
from launch.training.gradient_sums import engine_options
from launch.training.optimizer import AdamWEma
from tests.children import call
from tests.live_memory import LiveMemory

WIDTH, MICRO_BATCHES, BETA1 = 96, 4, 0.5
#: By default buffers are larger than this network, which ZeRO 3 would keep whole on every process, or from the forward
#: to the backward pass; here it gathers each weight in both.
SMALL = {"zero_optimization": {"reduce_bucket_size": 1000}}
GATHERED = {
    f"stage3_{name}": 0 for name in ("param_persistence_threshold", "max_reuse_distance", "prefetch_bucket_size")
}


class Traffic(LiveMemory):
    """Also bytes handed to collectives: of each the larger of what goes in and what comes out."""

    def __init__(self):
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            sizes = [
                sum(t.numel() * t.element_size() for t in tree_leaves(a) if isinstance(t, torch.Tensor)) for a in args
            ]
            self.sent += max(sizes)
        return super().__torch_dispatch__(func, types, args, kwargs)


def engine(stage: int, dtype: str, world_size: int) -> Engine:
    """Two layers under a ZeRO stage whose sums are of a dtype; `exp_avg` after the first step is half its gradient."""

    def optimizer(parameters, partitioned: bool) -> AdamWEma:
        return AdamWEma(
            parameters,
            kernels.select("reference"),
            lr=1e-3,
            betas=(BETA1, 0.95),
            eps=1e-8,
            weight_decay=0.0,
            ema_decay=0.9,
            max_grad_norm=0.0,
            partitioned=partitioned,
        )

    section, overrides = (
        TrainConfig(grad_sum_dtype=dtype, precision="bfloat16"),
        merge(SMALL, {"zero_optimization": GATHERED if stage == 3 else {}}),
    )
    config = deepspeed_config(
        stage=stage,
        bf16=True,
        micro_batch_size=2,
        accumulation=MICRO_BATCHES,
        world_size=world_size,
        overrides=engine_options(section, DeepSpeedConfig(zero_stage=stage, overrides=overrides)),
    )
    torch.manual_seed(0)
    return Engine(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)), optimizer, config)


def measure(stage: int, dtype: str) -> dict[str, float]:
    processes = start_processes()
    network, memory = engine(stage, dtype, processes.world_size), Traffic()
    parameters = dict(network.module.named_parameters())
    size = sum(getattr(p, "ds_numel", p.numel()) for p in parameters.values())
    wanted: dict[str, torch.Tensor] = {}

    def add(name: str, grad: torch.Tensor) -> None:
        wanted[name] = wanted.get(name, 0.0) + grad.double()

    hooks = [p.register_hook(lambda grad, name=name: add(name, grad)) for name, p in parameters.items()]
    _train(network, processes.rank)
    for hook in hooks:
        hook.remove()
    found = network.full_state(keep=True)["exp_avg"]
    error = norm = 0.0
    for name, want in wanted.items():
        dist.all_reduce(want)
        want /= processes.world_size
        error += (found[name].double() / (1 - BETA1) - want).square().sum().item()
        norm += want.square().sum().item()
    network.close()
    with memory:
        network = engine(stage, dtype, processes.world_size)
        _train(network, processes.rank)
        memory.sent = 0
        _train(network, processes.rank)
    network.close()
    return {"error": (error / norm) ** 0.5, "sent": memory.sent / size, "alive": memory.peak / size}


def _train(network: Engine, rank: int) -> None:
    generator = torch.Generator().manual_seed(1 + rank)
    for _ in range(MICRO_BATCHES):
        x, target = torch.randn(2, 2, WIDTH, generator=generator).bfloat16()
        network.backward((network(x) - target).float().square().mean())
        network.step()


def measure_all(output: str) -> None:
    """Of stages 1 to 3, on this process; the first writes them."""
    torch.set_num_threads(1)
    rows = {f"{stage} {dtype}": measure(stage, dtype) for stage in (1, 2, 3) for dtype in ("bfloat16", "float32")}
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(rows))


def measured(folder: Path) -> dict[str, dict[str, float]]:
    """ "stage dtype" → the figures."""
    output = folder / "sums.json"
    assert call(measure_all, str(output), world_size=2) == [0, 0]
    return json.loads(output.read_text())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for row, values in measured(Path(folder)).items():
            print(f"ZeRO {row:<12}" + "  ".join(f"{key} {value:.3g}" for key, value in values.items()))
    sys.exit(0)
