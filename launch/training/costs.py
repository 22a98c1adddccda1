"""What training costs, by its run file: parameters, FLOPs and bytes for each image, and what decides about memory."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

import lightningdit.cost as dit_cost
from common.tensors import weights_file
from launch.config import LightningDiTRun, Run, VavaeRun
from launch.training.checks import network_on_meta
from launch.training.gradient_sums import engine_options
from launch.training.memory import BFLOAT16, DECODED, DECODED_PIXEL, FLOAT32, NetworkCost, Setup

Kind = bool | int | str  # a value of `use_checkpoint`
Counted = tuple[dict[Kind, tuple[NetworkCost, ...]], int, tuple[int, int]]
BYTES = {"bfloat16": BFLOAT16, "float32": FLOAT32}


def own_kind(run: Run) -> Kind:
    """The run's own `use_checkpoint`."""
    return run.network().use_checkpoint if isinstance(run, LightningDiTRun) else run.train.use_checkpoint


def network_costs(run: Run, kinds: Sequence[Kind]) -> Counted:
    """The networks' costs under values of `use_checkpoint`, frozen parameters, and the latents' channels and size.

    Counted by the run file alone: no data and no weights are looked at.
    """
    if isinstance(run, VavaeRun):
        return _vavae_costs(run, kinds)
    network = run.network()
    costs: dict[Kind, tuple[NetworkCost, ...]] = {
        kind: (cost,) for kind, cost in lightningdit_costs(run, kinds).items()
    }
    return costs, 0, (network.in_channels, network.input_size)


def lightningdit_costs(run: LightningDiTRun, kinds: Sequence[Kind]) -> dict[Kind, NetworkCost]:
    """The cost of the run's network under each of these values of `use_checkpoint`."""
    parameters = list(network_on_meta(run).parameters())
    total, trainable = (sum(p.numel() for p in which) for which in (parameters, filter(_trained, parameters)))
    widths = {"weight_bytes": BYTES[run.train.precision], "residual_bytes": BYTES[run.train.residual_dtype]}
    widths["residual_bytes"] = max(widths.values())
    whole = run.train.compile in ("auto", "inductor", "cudagraphs") and run.deepspeed.zero_stage < 3
    flops = round(dit_cost.training_flops_per_image(run.network(), run.transport))

    def cost(kind: Kind) -> NetworkCost:
        network = run.network().model_copy(update={"use_checkpoint": kind})
        activations = dit_cost.peak_bytes_per_image(network, whole_graph=whole, **widths)
        return NetworkCost(
            "model", total, trainable, flops, activations, dit_cost.forward_bytes_per_image(network, **widths)
        )

    return {kind: cost(kind) for kind in kinds}


def _vavae_costs(run: VavaeRun, kinds: Sequence[Kind]) -> Counted:
    """The same of a tokenizer's two networks."""
    import vavae.cost as vae_cost  # imports timm and lpips: seconds of their own

    width, latents = (
        BYTES[run.train.precision],
        (run.model.embed_dim, run.data.image_size // run.model.downsample_ratio),
    )
    counted = vae_cost.training_costs(run.model, run.features(), run.loss, run.data.image_size, kinds)
    frozen = counted[kinds[0]]["frozen"]

    def cost(kind: Kind) -> tuple[NetworkCost, ...]:
        return tuple(
            NetworkCost(
                name,
                c.parameters,
                c.trainable,
                c.flops + (frozen.flops if name == "autoencoder" else 0),
                c.saved_elements * width,
            )
            for name, c in counted[kind].items()
            if name != "frozen"
        )

    return {kind: cost(kind) for kind in kinds}, frozen.parameters, latents


def setup_of(run: Run, processes: int, *, frozen: int = 0, latents: float = 0.0) -> Setup:
    """What decides about the memory of a run on so many processes, beside its networks; see `Setup`."""
    train, optimizer = run.train, run.optimizer
    previews, judged, decoding = _sampling(run)
    validated = run.data.valid_path is not None and train.valid_weights != "model"
    return Setup(
        processes=processes,
        bf16=train.precision == "bfloat16",
        options=engine_options(train, run.deepspeed),
        frozen=frozen,
        latents=latents,
        averaged=optimizer.ema_decay > 0 and (validated or previews + judged > 0),
        sampled=2 * -(-previews // processes),  # guided: with and without a class; figures take a micro-batch at a time
        decoding=decoding,
    )


def _sampling(run: Run) -> tuple[int, int, float]:
    """How many previews a run draws, of how many samples it measures figures, and bytes of the tokenizer and of what it
    decodes at once, or of the networks that judge, whichever are more: never on the device together."""
    if not isinstance(run, LightningDiTRun):
        return 0, 0, 0.0
    previews, path = run.num_previews(), weights_file(run.vae.ckpt_path or "")
    judged = run.evaluation.samples if run.evaluation.figures else 0
    decoded = min(max(previews, judged), DECODED)
    if not decoded or not path.is_file():  # absent: the run has no previews, or does not start
        return 0, 0, 0.0
    decoding = path.stat().st_size + decoded * run.data.image_size**2 * DECODED_PIXEL
    asked = run.evaluation
    files = [Path(name) for name in (asked.inception_weights, asked.foundation, asked.dinov2_weights) if name]
    judging = sum(file.stat().st_size for file in files if file.is_file()) if judged else 0
    return previews, judged, max(decoding, judging)


def _trained(p: nn.Parameter) -> bool:
    return p.requires_grad
