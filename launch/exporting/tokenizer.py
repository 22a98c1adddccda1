"""Tokenizers as folders that `diffusers.AutoencoderKL` loads, with the statistics of their latents."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.files import write_text
from launch.config import ConfigError, select_ops
from launch.exporting.card import CARD, Card
from launch.exporting.places import new_folder
from launch.exporting.sources import (
    entry_of,
    require_statistics,
    said_of,
    stated_statistics,
    tokenizer_of,
    tokenizer_run,
)
from launch.trained import statistics_for
from launch.training.checkpoint import Checkpoint
from lightningdit.latents import LatentStatistics
from vavae.diffusers_layout import inexpressible, write_folder
from vavae.model import AutoencoderKL
from vavae.weights import build_tokenizer


def export_tokenizer(
    source: Checkpoint | Path,
    folder: Path,
    weights: str | None = None,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    latents: Path | None = None,
    multiplier: float | None = None,
    card: Callable[[Path], Card] | None = None,
) -> list[Path]:
    """Write a tokenizer as an `AutoencoderKL` folder of diffusers → its files; see `launch.export` for `latents`.

    card: of the folder, as it lies there. Raises ValueError where the folder is already there, the source is no
    tokenizer or one that diffusers cannot express, the statistics are those of another tokenizer's latents, or `card`
    raises it.
    """
    with new_folder(folder) as made:
        if isinstance(source, Path):
            taken, tensors = entry_of(source, weights)
            tokenizer = tokenizer_of(tensors, source, config, overrides)
            said = {"step": None, "weights": taken or "unnamed", "source": source.name}
        else:
            sizes, tensors = tokenizer_run(source).model, source.weights("autoencoder", weights or "ema")
            tokenizer = build_tokenizer(tensors, sizes, select_ops("reference"), source.path)
            said = said_of(source, weights or "ema") | {"checkpoint": source.path.name}
        scale = shift = None
        if isinstance(source, Path) and latents is None:
            scale, shift = stated_statistics(source, tensors, multiplier)
        if latents is not None:
            require_statistics(latents)
        scale = scale or statistics_for(tokenizer, latents, multiplier)
        written = write_tokenizer(made, tokenizer, scale, shift_factor=shift, **said)
        if card is not None:
            write_text(made / CARD, str(card(made)))
            written.append(made / CARD)
    return [folder / path.name for path in written]


def write_tokenizer(
    folder: Path, tokenizer: AutoencoderKL, scale: LatentStatistics, shift_factor: float | None = None, **facts: Any
) -> list[Path]:
    """Write an `AutoencoderKL` of diffusers into a folder → its files; raises ConfigError where it has no such one.

    shift_factor: stands in the config in place of the mean, which it equals in all channels.
    """
    if reasons := inexpressible(tokenizer.config):
        raise ConfigError(f"diffusers has no such autoencoder: {'; '.join(reasons)}")
    unstated = scale.is_identity or shift_factor is not None
    mean, std = (None if unstated else values.tolist() for values in (scale.mean, scale.std))
    tensors, factors = tokenizer.state_dict(), (scale.multiplier, shift_factor)
    return write_folder(folder, tensors, tokenizer.config, mean, std, *factors, **facts)
