"""Loading of trained networks from a checkpoint, an export or a published file."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common.files import path_exists
from common.sections import SectionError, describe
from common.tensors import load_strict
from launch.config import ConfigError, LightningDiTRun, stored_run
from launch.hub import local_copy, tokenizer_copy
from launch.pipelines import is_pipeline, pipeline_settings, read_pipeline
from launch.training.checkpoint import Checkpoint, CheckpointError
from launch.training.checkpoint_search import find_checkpoint
from lightningdit.config import SampleConfig, TransportConfig
from lightningdit.latents import (
    STATISTICS_FILE,
    LatentStatistics,
    StatisticsRecord,
    read_manifest,
    read_statistics,
    shard_files,
)
from lightningdit.model import LightningDiT
from lightningdit.weights import Export, export_paths, read_export, read_tuned, read_weights
from vavae.model import AutoencoderKL
from vavae.weights import fingerprint, load_tokenizer


def diffusion_weights(run: LightningDiTRun, which: str = "ema") -> Export:
    """The weights `ckpt_path` names (without it: the newest checkpoint of the run), with their latents' statistics.

    Of a checkpoint or file with both, `which` ("ema" or "model") is taken. A published `.pt` does not say how its
    latents were normalised, so the statistics are then those of `data.data_path`. Raises ValueError where nothing is
    found or the network is not the config's.
    """
    path = weights_path(run)
    if (found := described_weights(path, which)) is None:
        tensors, weights = read_weights(path, which)
        found = Export(run.network(), tensors, None, weights, _statistics_of_data(run), {})
    _check_same_network(found, run, path)
    return found


def weights_path(run: LightningDiTRun) -> Path:
    """What `ckpt_path` names, downloaded if need be, or the run's directory."""
    if run.ckpt_path:
        return local_copy(run.ckpt_path)
    return run.train.directory


def described_weights(path: Path, which: str) -> Export | None:
    """The weights of a pipeline folder, a checkpoint, a run or an export, which say what they are; None for others."""
    if is_pipeline(path):
        return read_pipeline(path)
    if path.is_dir():
        return from_checkpoint(find_checkpoint(path), which)
    return read_export(path) if export_paths(path)[1].is_file() else None


def from_checkpoint(checkpoint: Checkpoint, weights: str = "ema") -> Export:
    """A LightningDiT checkpoint as what its export would hold."""
    state = checkpoint.state
    if state["kind"] != "lightningdit":
        raise ConfigError(f"{checkpoint.path} is a checkpoint of kind {state['kind']!r}, not 'lightningdit'")
    names = {"classes": state["task"]["classes"]} if "classes" in state["task"] else {}
    run = diffusion_run(checkpoint)
    config, transport = run.network(), run.transport.model_dump()
    return Export(
        config=config,
        state=checkpoint.weights("model", weights),
        step=checkpoint.step,
        weights=weights,
        latents=_statistics_of(checkpoint, config.in_channels),
        extra={"checkpoint": str(checkpoint.path), "kernels": state["ops"], "versions": state["versions"]}
        | {"transport": transport, **names},
        sample=_tuned_by(run),
    )


def diffusion_run(checkpoint: Checkpoint) -> LightningDiTRun:
    """The run file in a LightningDiT's checkpoint."""
    run = stored_run(checkpoint.state["config"], checkpoint.path / "state.json", kind="lightningdit")
    assert isinstance(run, LightningDiTRun)
    return run


def _tuned_by(run: LightningDiTRun) -> dict[str, Any] | None:
    return None if run.sample.preset == "model" else run.sampling().tuned()


def sampling_settings(run: LightningDiTRun) -> SampleConfig:
    """The `sample` section as its presets mean it; `sample.preset: model` takes what is stored with the weights.

    Raises ConfigError where nothing is stored there (exports of before it was kept, and published files), or where it
    guides more channels than latents have.
    """
    if run.sample.preset != "model":
        return run.sampling()
    path, tuned = weights_path(run), None
    if is_pipeline(path):
        tuned = pipeline_settings(path)
    elif path.is_dir():
        tuned = _tuned_by(diffusion_run(find_checkpoint(path)))
    elif export_paths(path)[1].is_file():
        tuned = read_tuned(path)
    if tuned is None:
        raise ConfigError(
            f"sample.preset is model, but no settings of sampling are stored with {path}; use paper-64ep, paper-800ep "
            "or default, or set the keys of sample themselves"
        )
    settings, channels = run.sampling(tuned), run.model.in_chans
    if (settings.cfg_channels or 0) > channels:
        raise ConfigError(
            f"{path}: sample.cfg_channels is {settings.cfg_channels}, but the latents have model.in_chans {channels}"
        )
    return settings


def _statistics_of(checkpoint: Checkpoint, channels: int) -> LatentStatistics:
    path = checkpoint.path / "state.json"
    try:
        record = StatisticsRecord.model_validate_json(json.dumps(checkpoint.state["task"].get("latents")))
    except ValidationError as e:
        raise CheckpointError(f"{path}: task.latents, the statistics of latents: {describe(e)}") from None
    return LatentStatistics.from_record(record, channels=channels, source=path)


def build_diffusion(export: Export, ops, source: str) -> LightningDiT:
    """The network of an export, loaded strictly, in evaluation mode."""
    model = LightningDiT(export.config, ops)
    load_strict(model, export.state, source)
    return model.eval().requires_grad_(False)


def build_tokenizer(run: LightningDiTRun, ops, channels: int | None = None) -> AutoencoderKL:
    """The tokenizer of the `vae` section, in evaluation mode; see `vavae.weights.load_tokenizer` for its sizes.

    Raises ConfigError where there is none, or one of latents of other than the model's `channels` (None: of any).
    """
    if run.vae.ckpt_path is None:
        raise ConfigError("vae.ckpt_path is not set: the tokenizer's weights are needed to decode samples")
    try:
        tokenizer = load_tokenizer(tokenizer_copy(run.vae.ckpt_path), ops)
    except ValueError as e:
        raise ConfigError(f"vae.ckpt_path: {e}") from None
    if channels is not None and (have := tokenizer.config.embed_dim) != channels:
        raise ConfigError(f"{run.vae.ckpt_path} decodes latents of {have} channels, the model makes {channels}")
    return tokenizer


def statistics_for(tokenizer: AutoencoderKL, source: Path | None, multiplier: float | None = None) -> LatentStatistics:
    """The statistics of a tokenizer's latents, and the factor of normalised ones.

    Args:
        source: a set of latents, or a checkpoint, run or export of a LightningDiT; without one, mean 0 and std 1.
        multiplier: default: the LightningDiT's, or 1.

    Raises:
        ValueError: nothing is found, latents of another number of channels or another tokenizer (where their manifest
            names it), or a multiplier that is not the LightningDiT's.
    """
    channels = tokenizer.config.embed_dim
    if source is None:
        return LatentStatistics.identity(channels, 1.0 if multiplier is None else multiplier)
    if source.is_dir() and (path_exists(source / STATISTICS_FILE) or shard_files(source)):
        _require_tokenizer(source, tokenizer)
        return read_statistics(source, channels, 1.0 if multiplier is None else multiplier)
    found = from_checkpoint(find_checkpoint(source)) if source.is_dir() else read_export(source)
    assert found.latents is not None
    if found.config.in_channels != channels:
        raise ConfigError(f"{source} was trained on {found.config.in_channels} channels, the tokenizer has {channels}")
    if multiplier not in (None, found.latents.multiplier):
        raise ConfigError(f"multiplier {multiplier:g}, but {source} was trained with {found.latents.multiplier:g}")
    return found.latents


def _require_tokenizer(latents: Path, tokenizer: AutoencoderKL) -> None:
    """Raise ConfigError where a manifest says that another tokenizer made the latents; published sets have none."""
    manifest = read_manifest(latents)
    made_by = manifest.tokenizer if manifest is not None and isinstance(manifest.tokenizer, dict) else {}
    if (stated := made_by.get("sha256")) is not None and stated != (own := fingerprint(tokenizer)):
        source = made_by.get("source")
        named = f"SHA-256 {stated}" + ("" if source is None else f", from {source}")
        raise ConfigError(
            f"{latents} was made by another tokenizer ({named}) than the one given here ({own}): `extract` takes the "
            "`ema` weights of a checkpoint"
        )


def _statistics_of_data(run: LightningDiTRun) -> LatentStatistics:
    data = run.data
    if not data.latent_norm:
        return LatentStatistics.identity(run.model.in_chans, data.latent_multiplier)
    return read_statistics(Path(data.data_path), run.model.in_chans, data.latent_multiplier)


def require_transport(found: Export, transport: TransportConfig, source: str | Path) -> None:
    """Raise ConfigError where weights say that they were trained by another path or prediction than `transport` has.

    Their output then means something else. Published files and exports of before it was kept say nothing.
    """
    if (stored := found.extra.get("transport")) is None:
        return
    try:
        theirs = TransportConfig.read(stored, f"{source}: the transport that is stored with the weights")
    except SectionError as e:
        raise ConfigError(str(e)) from None
    keys = ("path_type", "prediction")
    different = [key for key in keys if getattr(theirs, key) != getattr(transport, key)]
    if different:
        trained = ", ".join(f"{key} {getattr(theirs, key)}" for key in different)
        ours = ", ".join(f"transport.{key} {getattr(transport, key)}" for key in different)
        raise ConfigError(
            f"{source} was trained with {trained}, the run file says {ours}: sample with those of training"
        )


def _check_same_network(found: Export, run: LightningDiTRun, source: Path) -> None:
    theirs, ours = (c.model_dump(exclude={"use_checkpoint"}) for c in (found.config, run.network()))
    different = [f"{key} {theirs[key]!r} (config: {ours[key]!r})" for key in ours if theirs[key] != ours[key]]
    if different:
        raise ConfigError(f"{source} is another network than the config's: {', '.join(different)}")


def require_average_velocities(found: Export, settings: Iterable[SampleConfig], source: str | Path) -> None:
    """Raise ConfigError where samples are to be made by average velocities, but weights say that they were trained by
    flow matching: what they give for two times was never trained. Published files say nothing, and have no such times.
    """
    asked = any(setting.mode == "meanflow" for setting in settings)
    if asked and (found.extra.get("transport") or {}).get("objective") == "flow":
        raise ConfigError(
            f"sample.mode is meanflow, but {source} was trained with transport.objective flow: use mode ODE or SDE"
        )
