"""What `export` is given: weights files, checkpoints, and folders that are neither; what they say of their latents."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from common.files import path_exists, read_json
from common.records import Record, read_record
from common.tensors import FOLDER_WEIGHTS, Tensors, read_entry
from launch.arguments import load_run
from launch.config import ConfigError, VavaeRun, select_ops, stored_run
from launch.pipelines import statistics_of
from launch.training.checkpoint import Checkpoint
from launch.training.checkpoint_search import find_checkpoint
from lightningdit.latents import STATISTICS_FILE, LatentStatistics, StatisticsRecord, shard_files
from vavae.diffusers_layout import CONFIG_FILE, is_diffusers, read_config
from vavae.model import AutoencoderKL
from vavae.sizes import infer_config
from vavae.sources.listing import is_image_name
from vavae.weights import build_tokenizer


def entry_of(source: Path, weights: str | None) -> tuple[str | None, Tensors]:
    """(name of the entry, tensors) of a weights file: its average, where it has one and `weights` names no other.

    Raises ConfigError where `weights` names a set that the file does not have.
    """
    taken, tensors = read_entry(source, (weights or "ema", "state_dict", "model", "ema"))
    if weights not in (None, taken):
        where = "at its top, without a name" if taken is None else f"under {taken!r}"
        raise ConfigError(
            f"--weights {weights}: {source} holds one set of weights, {where}, which is taken without --weights"
        )
    return taken, tensors


def tokenizer_of(tensors: Tensors, source: Path, config: Path | None, overrides: Sequence[str]) -> AutoencoderKL:
    """The tokenizer of a file's tensors, of the sizes that a run file says or the tensors have."""
    if config is None:
        sizes = infer_config(tensors, source)
    else:
        run = load_run(config, overrides, "vavae")
        assert isinstance(run, VavaeRun)
        sizes = run.model
    return build_tokenizer(tensors, sizes, select_ops("reference"), source)


def stated_statistics(
    source: Path, tensors: Tensors, multiplier: float | None
) -> tuple[LatentStatistics | None, float | None]:
    """(what a tokenizer's folder of diffusers or its export says of its latents, the shift_factor that says so there).

    Both None where nothing is said. multiplier: in place of the stated factor.
    """
    if not is_diffusers(tensors):
        scale = _statistics_of_export(source)
        if scale is not None and multiplier is not None:
            scale = replace(scale, multiplier=multiplier)
        return scale, None
    if (config := read_config(source)) is None:
        return None, None
    both = config.latents_mean is not None and config.latents_std is not None
    shift = None if both else config.shift_factor or None
    path, channels = (source if source.is_dir() else source.parent) / CONFIG_FILE, config.latent_channels
    return statistics_of(config, path, channels=channels, multiplier=multiplier), shift


class TokenizerFacts(Record):
    """The JSON beside an exported tokenizer, as far as it speaks of latents."""

    kind: str
    latents: StatisticsRecord | None = None


def _statistics_of_export(source: Path) -> LatentStatistics | None:
    if source.is_dir() or not path_exists(beside := source.with_suffix(".json")):
        return None
    record = read_record(beside, TokenizerFacts).latents
    if record is None:
        return None
    return LatentStatistics.from_record(record, channels=len(record.mean), source=beside)


def tokenizer_run(checkpoint: Checkpoint) -> VavaeRun:
    """The run file in a tokenizer's checkpoint."""
    run = stored_run(checkpoint.state["config"], checkpoint.path / "state.json", kind="vavae")
    assert isinstance(run, VavaeRun)
    return run


def name_of(checkpoint: Checkpoint) -> str:
    """A checkpoint's path below the folder of its run: others are told no more of this machine."""
    return str(Path(*checkpoint.path.absolute().parts[-3:]))


def said_of(checkpoint: Checkpoint, weights: str) -> dict:
    return {"step": checkpoint.step, "weights": weights, "checkpoint": name_of(checkpoint)}


def checkpoint_at(source: Path) -> Checkpoint:
    """The checkpoint that a path is or, of a run, has; raises ConfigError that says what else the path is."""
    _refuse_other_folders(source, "a checkpoint, a run, or weights")
    return find_checkpoint(source)


def require_statistics(latents: Path) -> None:
    """Raise ConfigError for a folder that holds neither latents nor a checkpoint, saying what it holds."""
    if not shard_files(latents) and not path_exists(latents / STATISTICS_FILE):
        _refuse_other_folders(
            latents, "--latents takes a set of latents, or a checkpoint, run or export of a LightningDiT"
        )


def _refuse_other_folders(path: Path, wanted: str) -> None:
    if path.is_dir() and (what := other_folder(path)) is not None:
        raise ConfigError(f"{path} {what}: {wanted}")


def other_folder(path: Path) -> str | None:
    """What a folder is that is no checkpoint, run or set of latents: images or a model of diffusers; else None."""
    names = sorted(each.name for each in path.iterdir())
    if "manifest.json" in names or "checkpoints" in names:
        return None
    if CONFIG_FILE in names:
        config = read_json(path / CONFIG_FILE)
        kind = config.get("_class_name") if isinstance(config, dict) else None
        if isinstance(kind, str):
            has = any(name in names for name in FOLDER_WEIGHTS)
            lacks = "" if has else f" without its weights ({' or '.join(FOLDER_WEIGHTS)})"
            return f"is a folder of diffusers with a model of class {kind},{lacks}".removesuffix(",")
    for folder in (path, *(each for each in sorted(path.iterdir()) if each.is_dir())):
        if (image := next((name for name in sorted(os.listdir(folder)) if is_image_name(name)), None)) is not None:
            return f"is a folder of images ({(folder / image).relative_to(path)} …)"
    return None
