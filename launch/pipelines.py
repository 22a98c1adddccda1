"""Pipeline folders of diffusers that `export --format diffusers` writes: their parts, and reading one back.

model_index.json                    the classes of the parts, and what the pipeline does without being told
transformer/                        the network: config.json, weights, and the one file of ours that runs both
vae/                                the tokenizer, a stock AutoencoderKL, whose config states the latents' statistics
scheduler/scheduler_config.json     a stock FlowMatchEulerDiscreteScheduler
"""

import math
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from common.files import FileError, sha256
from common.records import ClassNames, Record, read_record
from common.sections import SectionError
from common.tensors import FOLDER_WEIGHTS, Tensors, WeightsError, read_tensors
from lightningdit.config import ModelConfig
from lightningdit.embeddings import position_embedding, rope_tables
from lightningdit.latents import LatentStatistics
from lightningdit.weights import Export, tuned_settings
from vavae.diffusers_layout import CONFIG_FILE, DiffusersConfig, read_config

INDEX = "model_index.json"
NETWORK, TOKENIZER, SCHEDULER = "transformer", "vae", "scheduler"
SCHEDULER_FILE, SCHEDULER_CLASS = "scheduler_config.json", "FlowMatchEulerDiscreteScheduler"
NETWORK_CLASS = "LightningDiTTransformer2DModel"


class Exported(Record):
    """What an export says of its weights."""

    step: int | None = None
    weights: str = "unnamed"
    sha256: str | None = None
    classes: ClassNames | None = None
    sample: dict[str, Any] | None = None


class NetworkConfig(Record):
    """`transformer/config.json`."""

    class_name: str = Field(alias="_class_name")
    exported: Exported = Field(Exported(), alias="_exported")


class PipelineIndex(Record):
    """`model_index.json`, as far as it says how the pipeline samples without being told."""

    num_inference_steps: int = 249
    guidance_scale: float = 1.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    guidance_schedule: str = "constant"
    guidance_channels: int | None = None


class SchedulerConfig(Record):
    """`scheduler/scheduler_config.json`, as far as it says which times a sampler visits."""

    class_name: str = Field(SCHEDULER_CLASS, alias="_class_name")
    shift: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    use_dynamic_shifting: bool = False


#: What `PipelineIndex` calls settings of `sample`, but the number of its steps.
PUBLIC = {
    "guidance_scale": "cfg_scale",
    "guidance_start": "cfg_interval_start",
    "guidance_end": "cfg_interval_end",
    "guidance_schedule": "cfg_schedule",
    "guidance_channels": "cfg_channels",
}


def is_pipeline(path: Path) -> bool:
    return (path / INDEX).is_file()


def read_pipeline(folder: Path) -> Export:
    """The network of a pipeline folder, and the statistics that its tokenizer's config states.

    Its sampling settings are the stored ones under what model_index.json and the scheduler say, which are there to be
    changed. Raises WeightsError where a part is missing, damaged, or another network's, or the scheduler another than
    Euler's.
    """
    path, record = _network_config(folder)
    stated = {key: value for key, value in (record.model_extra or {}).items() if not key.startswith("_")}
    try:
        config = ModelConfig.read(stated, f"{path} has an invalid model config")
    except SectionError as e:
        raise WeightsError(str(e)) from None
    weights = folder / NETWORK / FOLDER_WEIGHTS[0]
    said = record.exported
    if said.sha256 is not None and (found := sha256(weights)) != said.sha256:
        raise WeightsError(f"{weights} is damaged: SHA-256 {found}, {path.name} says {said.sha256}")
    tokenizer = read_config(folder / TOKENIZER)
    if tokenizer is None:
        raise WeightsError(f"{folder / TOKENIZER / CONFIG_FILE} is missing, which states the latents' statistics")
    latents = statistics_of(tokenizer, folder / TOKENIZER / CONFIG_FILE, channels=config.in_channels)
    extra: dict[str, Any] = {"source": str(folder)} | dict(said.model_extra or {})
    if said.classes is not None:
        extra["classes"] = list(said.classes)
    sample = _sampled(folder, path, said)
    return Export(config, tables(config) | read_tensors(weights), said.step, said.weights, latents, extra, sample)


def pipeline_settings(folder: Path) -> dict[str, Any] | None:
    """The sampling settings of a pipeline folder as `read_pipeline` has them, without reading its tensors."""
    path, record = _network_config(folder)
    return _sampled(folder, path, record.exported)


def _network_config(folder: Path) -> tuple[Path, NetworkConfig]:
    """`transformer/config.json` and what it says; raises WeightsError where it is none of ours."""
    path = folder / NETWORK / CONFIG_FILE
    try:
        record = read_record(path, NetworkConfig)
    except FileError as e:
        raise WeightsError(str(e)) from None
    if record.class_name != NETWORK_CLASS:
        raise WeightsError(f"{folder} is a pipeline of diffusers with another network: {path} says {record.class_name}")
    return path, record


def _sampled(folder: Path, path: Path, said: Exported) -> dict[str, Any] | None:
    """The settings that `path` says of its weights, under those of model_index.json; None where it says none."""
    if said.sample is None:
        return None
    stored = tuned_settings(path, said.sample)
    under = _of_scheduler(folder / SCHEDULER / SCHEDULER_FILE, stored)
    return _under_index(folder / INDEX, under)


def scheduler_shift(timestep_shift: float) -> float:
    """The scheduler's shift for one of `sample`: its time sigma is 1 − t, so t → s·t / (1 + (s − 1)·t) is there one by
    1 / s; no shift (0) is 1."""
    return 1 / timestep_shift if timestep_shift else 1.0


def _of_scheduler(path: Path, stored: dict[str, Any]) -> dict[str, Any]:
    """Stored sampling settings with the shift that a scheduler's config says in place of theirs, where it is another;
    a folder without the file has the stored one."""
    if not path.exists():
        return stored
    try:
        record = read_record(path, SchedulerConfig)
    except FileError as e:
        raise WeightsError(str(e)) from None
    if record.class_name != SCHEDULER_CLASS or record.use_dynamic_shifting:
        other = f"use_dynamic_shifting of {SCHEDULER_CLASS}"
        named = other if record.class_name == SCHEDULER_CLASS else record.class_name
        raise WeightsError(f"{path} says {named}: only {SCHEDULER_CLASS} with a fixed shift is read back")
    if math.isclose(record.shift, scheduler_shift(stored["timestep_shift"]), rel_tol=1e-6):
        return stored
    return tuned_settings(path, stored | {"timestep_shift": 1 / record.shift})


def _under_index(index: Path, stored: dict[str, Any]) -> dict[str, Any]:
    """Stored sampling settings with those that a model_index.json says in place of theirs."""
    try:
        record = read_record(index, PipelineIndex)
    except FileError as e:
        raise WeightsError(str(e)) from None
    stated = record.model_dump(include=record.model_fields_set & PipelineIndex.model_fields.keys())
    own = {PUBLIC[name]: value for name, value in stated.items() if name in PUBLIC}
    if "num_inference_steps" in stated:
        own["num_sampling_steps"] = stated["num_inference_steps"] + 1  # steps there, grid points here
    return tuned_settings(index, stored | own)


def tables(config: ModelConfig) -> Tensors:
    """The fixed tables of positions by their names in a network's weights; pipelines make them anew."""
    found: Tensors = {"pos_embed": position_embedding(config.hidden_size, config.grid_size)}
    if config.use_rope:
        cos, sin = rope_tables(config.head_dim, config.grid_size)
        found |= {"feat_rope.freqs_cos": cos, "feat_rope.freqs_sin": sin}
    return found


def statistics_of(
    config: DiffusersConfig, source: Path, *, channels: int, multiplier: float | None = None
) -> LatentStatistics:
    """The latents' statistics that a tokenizer's config of diffusers states; multiplier: in place of its factor.

    Raises WeightsError, naming `source`, where it states the mean alone or the standard deviation alone.
    """
    mean, std = config.latents_mean, config.latents_std
    if (mean is None) != (std is None):
        known, lacking = ("latents_std", "latents_mean") if mean is None else ("latents_mean", "latents_std")
        raise WeightsError(f"{source} has {known}, and {lacking} is null or missing: both are wanted, or neither")
    if mean is None or std is None:
        mean, std = (config.shift_factor or 0.0,) * channels, (1.0,) * channels
    factor = config.scaling_factor if multiplier is None else multiplier
    return LatentStatistics.checked(torch.tensor(mean), torch.tensor(std), factor, channels=channels, source=source)
