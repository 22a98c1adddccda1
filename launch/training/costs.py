"""What a LightningDiT costs in training, by its run file: parameters, FLOPs and bytes for each image."""

import lightningdit.cost as dit_cost
from launch.config import LightningDiTRun
from launch.training.checks import network_on_meta
from launch.training.memory import BFLOAT16, FLOAT32, NetworkCost

BYTES = {"bfloat16": BFLOAT16, "float32": FLOAT32}


def lightningdit_cost(run: LightningDiTRun, use_checkpoint: bool | int | str | None = None) -> NetworkCost:
    """The cost of the run's network; `use_checkpoint`: another value than the run's."""
    network, parameters = run.network(), list(network_on_meta(run).parameters())
    if use_checkpoint is not None:
        network = network.model_copy(update={"use_checkpoint": use_checkpoint})
    widths = {"weight_bytes": BYTES[run.train.precision], "residual_bytes": BYTES[run.train.residual_dtype]}
    widths["residual_bytes"] = max(widths.values())
    whole = run.train.compile in ("auto", "inductor", "cudagraphs") and run.deepspeed.zero_stage < 3
    return NetworkCost(
        "model",
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
        dit_cost.flops_per_image(network)[1],
        dit_cost.peak_bytes_per_image(network, whole_graph=whole, **widths),
        dit_cost.forward_bytes_per_image(network, **widths),
    )
