"""What training costs, by its run file: parameters, FLOPs and bytes for each image, and what decides about memory."""

from collections.abc import Sequence

from torch import nn

import lightningdit.cost as dit_cost
from launch.config import LightningDiTRun, Run
from launch.training.checks import network_on_meta
from launch.training.gradient_sums import engine_options
from launch.training.memory import BFLOAT16, FLOAT32, NetworkCost, Setup

Kind = bool | int | str  # a value of `use_checkpoint`
BYTES = {"bfloat16": BFLOAT16, "float32": FLOAT32}


def lightningdit_costs(run: LightningDiTRun, kinds: Sequence[Kind]) -> dict[Kind, NetworkCost]:
    """The cost of the run's network under each of these values of `use_checkpoint`."""
    parameters = list(network_on_meta(run).parameters())
    total, trainable = (sum(p.numel() for p in which) for which in (parameters, filter(_trained, parameters)))
    widths = {"weight_bytes": BYTES[run.train.precision], "residual_bytes": BYTES[run.train.residual_dtype]}
    widths["residual_bytes"] = max(widths.values())
    whole = run.train.compile in ("auto", "inductor", "cudagraphs") and run.deepspeed.zero_stage < 3
    _, flops = dit_cost.flops_per_image(run.network())

    def cost(kind: Kind) -> NetworkCost:
        network = run.network().model_copy(update={"use_checkpoint": kind})
        activations = dit_cost.peak_bytes_per_image(network, whole_graph=whole, **widths)
        return NetworkCost(
            "model", total, trainable, flops, activations, dit_cost.forward_bytes_per_image(network, **widths)
        )

    return {kind: cost(kind) for kind in kinds}


def setup_of(run: Run, processes: int, *, frozen: int = 0, latents: float = 0.0) -> Setup:
    """What decides about the memory of a run on so many processes, beside its networks; see `Setup`."""
    train = run.train
    return Setup(
        processes=processes,
        bf16=train.precision == "bfloat16",
        options=engine_options(train, run.deepspeed),
        frozen=frozen,
        latents=latents,
        averaged=run.data.valid_path is not None and run.optimizer.ema_decay > 0 and train.valid_weights != "model",
    )


def _trained(p: nn.Parameter) -> bool:
    return p.requires_grad
