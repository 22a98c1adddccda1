"""The weaker network that guides samples in the place of the null label (autoguidance, arXiv 2406.02507)."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from launch.config import ConfigError, LightningDiTRun
from launch.hub import local_copy
from launch.pipelines import is_pipeline
from launch.trained import build_diffusion, described_weights, from_checkpoint, require_transport, weights_path
from launch.training.checkpoint import Checkpoint, by_step, step_of
from lightningdit.config import SIZES, SampleConfig
from lightningdit.latents import LatentStatistics
from lightningdit.model import LightningDiT
from lightningdit.weights import Export, read_weights
from vavae.weights import fingerprint


@dataclass(frozen=True, eq=False)
class Guide:
    """The weaker network of autoguidance, and the facts that a result states of it: where from, and its hash."""

    network: LightningDiT
    facts: dict[str, Any]


def guide_network(run: LightningDiTRun, settings: SampleConfig, ops, found: Export) -> Guide | None:
    """The network that guides the samples of `found` by these settings; None where they name none, or guide nowhere.

    Raises ConfigError where it is not there, is the sampled network itself, or one of other latents or classes.
    """
    if not settings.guided_by_network:
        return None
    which = settings.guide_weights
    if settings.guide_step is not None:
        source = _earlier(run, settings.guide_step, found)
        guide = from_checkpoint(Checkpoint(source), which)
    else:
        source = local_copy(settings.guide_ckpt_path or "")
        guide = described_weights(source, which) or _published_guide(source, which, found)
    require_transport(guide, run.transport, f"the network that guides, {source},")
    _check_guide(guide, found, source)
    network = build_diffusion(guide, ops, str(source))
    if _is_sampled_one(network, found):
        raise ConfigError(f"the network that guides, {source}, is the sampled one: name a weaker one")
    facts = {"path": str(source), "step": guide.step, "weights": guide.weights, "sha256": fingerprint(network)}
    return Guide(network, facts)


def _earlier(run: LightningDiTRun, step: int, found: Export) -> Path:
    """The checkpoint of that step of the run that is sampled."""
    path = weights_path(run)
    if not path.is_dir() or is_pipeline(path):
        raise ConfigError(
            f"sample.guide_step is {step}, but {path} is no run with earlier checkpoints: name the "
            "network that guides by sample.guide_ckpt_path"
        )
    directory = Path(found.extra["checkpoint"]).parent
    earlier = [each.path for each in by_step(directory) if each.step < (found.step or 0)]
    for path in earlier:
        if step_of(path) == step:
            return path
    have = ", ".join(str(step_of(path)) for path in earlier) or "none"
    raise ConfigError(
        f"sample.guide_step is {step}, but {directory} has no checkpoint of it before step {found.step}, which is "
        f"sampled; earlier ones: {have}"
    )


def _published_guide(path: Path, which: str, found: Export) -> Export:
    """A file of weights alone: the sampled network, or one of a registered size; latents are taken to be the same."""
    tensors, weights = read_weights(path, which)
    position, blocks = tensors.get("pos_embed"), [re.match(r"blocks\.(\d+)\.", name) for name in tensors]
    depth = 1 + max((int(block[1]) for block in blocks if block), default=-1)
    size = (depth, 0 if position is None else position.shape[-1])
    named = {(depth, width): heads for depth, width, heads in SIZES.values()}
    named[found.config.depth, found.config.hidden_size] = found.config.num_heads
    if size not in named:
        raise ConfigError(
            f"sample.guide_ckpt_path: {path} is a network of {size[0]} blocks of width {size[1]}, no registered size, "
            "and does not say how many heads it has; export it with its run file"
        )
    shape = {"depth": size[0], "hidden_size": size[1], "num_heads": named[size]}
    config = found.config.model_copy(update=shape)
    return replace(found, config=config, state=tensors, step=None, weights=weights, extra={})


def _alike(a: LatentStatistics, b: LatentStatistics) -> bool:
    """Whether two networks see the same latents, to a thousandth of their spread."""
    means, spreads = ((a.mean - b.mean) / b.std).abs(), (a.std / b.std - 1).abs()
    return a.multiplier == b.multiplier and bool((means < 1e-3).all() and (spreads < 1e-3).all())


def _check_guide(guide: Export, found: Export, source: Path) -> None:
    for what in ("in_channels", "input_size", "num_classes"):
        theirs, ours = getattr(guide.config, what), getattr(found.config, what)
        if theirs != ours:
            raise ConfigError(f"the network that guides, {source}, has {what} {theirs}; that of the samples has {ours}")
    if not _alike(guide.latents, found.latents):
        raise ConfigError(
            f"the network that guides, {source}, was trained on latents normalised otherwise than those of the samples"
        )


def _is_sampled_one(network: LightningDiT, found: Export) -> bool:
    """Whether a network has the weights of the sampled one, whatever file they come from."""
    ours = found.config.model_dump(exclude={"use_checkpoint"})
    if network.config.model_dump(exclude={"use_checkpoint"}) != ours:
        return False
    theirs = {name: weight for name, weight in network.named_parameters() if name in found.state}
    return all(torch.equal(weight.float(), found.state[name].float()) for name, weight in theirs.items())
