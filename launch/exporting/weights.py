"""Exports in this project's own layout: safetensors with a JSON beside them, and a published .pt."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.files import write_text
from common.tensors import save_pickled
from launch.config import select_ops
from launch.exporting.card import Card
from launch.exporting.networks import is_network, network_of
from launch.exporting.places import SUFFIXES, new_files, paths_of
from launch.exporting.sources import entry_of, name_of, said_of, stated_statistics, tokenizer_of, tokenizer_run
from launch.trained import build_diffusion, from_checkpoint
from launch.training.checkpoint import Checkpoint
from lightningdit.weights import Export, save_export, save_published
from vavae.weights import write_export

MakeCard = Callable[[Path], Card]  # of an export by its name, as it lies there


def export_file(
    source: Path,
    name: Path,
    weights: str | None = None,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    card: MakeCard | None = None,
) -> list[Path]:
    """Write a weights file as an export → its paths: safetensors, JSON, that of a card; see `launch.export` for
    `config`.

    What a tokenizer's folder of diffusers, or its export, says of its latents goes into the JSON, as `latents`. Raises
    ValueError where the file cannot be read, is neither model's, or does not fit, a path is taken, or `card` raises it.
    """
    suffixes = _with_card(SUFFIXES[:2], card)
    with new_files(name, suffixes) as (made, *more):
        if is_network(source):
            found = network_of(source, weights, config, overrides).found
            build_diffusion(found, select_ops("reference"), str(source))  # it fits
            save_export(made, _without_folders(found))
        else:
            taken, tensors = entry_of(source, weights)
            tokenizer = tokenizer_of(tensors, source, config, overrides)
            said: dict[str, Any] = {"step": None, "weights": taken or "unnamed", "source": source.name}
            if (scale := stated_statistics(source, tensors, None)[0]) is not None:
                said["latents"] = scale.to_json()
            write_export(made, tokenizer.state_dict(), tokenizer.config, **said)
        if card is not None:
            write_text(more[-1], str(card(made.with_suffix(""))))
    return paths_of(name, suffixes)


def _with_card(suffixes: Sequence[str], card: MakeCard | None) -> tuple[str, ...]:
    return (*suffixes, ".md") if card is not None else tuple(suffixes)


def _without_folders(found: Export) -> Export:
    """The export with the name alone of the file that it was made from: others are told no folder of this machine."""
    source = found.extra.get("source")
    if not isinstance(source, str):
        return found
    return replace(found, extra={**found.extra, "source": Path(source).name})


def export(checkpoint: Checkpoint, name: Path, weights: str = "ema", card: MakeCard | None = None) -> list[Path]:
    """Write the three files of a checkpoint's weights → their paths: safetensors, JSON, pt, and that of a card.

    Raises ValueError where one of them is already there, or `card` raises it.
    """
    suffixes = _with_card(SUFFIXES, card)
    with new_files(name, suffixes) as made:
        if checkpoint.state["kind"] == "lightningdit":
            found = from_checkpoint(checkpoint, weights)
            save_export(made[0], replace(found, extra=found.extra | {"checkpoint": name_of(checkpoint)}))
            save_published(made[2], checkpoint.weights("model", "model"), checkpoint.weights("model", "ema"))
        else:
            tensors = checkpoint.weights("autoencoder", weights)
            write_export(made[0], tensors, tokenizer_run(checkpoint).model, **said_of(checkpoint, weights))
            save_pickled(made[2], {"state_dict": tensors})
        if card is not None:
            write_text(made[-1], str(card(made[0].with_suffix(""))))
    return paths_of(name, suffixes)
