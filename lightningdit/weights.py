"""Reading and writing weights: published `.pt` files, safetensors, exports (`<name>.safetensors` and `<name>.json`).

All files have the published keys. The checks of files and tensors are those of `common.tensors`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from common.files import FileError, atomic_write, make_directory, sha256
from common.records import ClassNames, Record, read_record, require_kind, write_checksummed
from common.sections import SectionError
from common.tensors import Tensors, WeightsError, as_float32, model_of, read_entry, save_pickled, write_safetensors
from lightningdit.config import ModelConfig, SampleConfig
from lightningdit.latents import LatentStatistics, StatisticsRecord

KIND = "lightningdit"


def read_weights(path: Path | str, which: str = "ema") -> tuple[Tensors, str]:
    """(tensors by published key, on the CPU; name of their entry) of a weights file; see `common.tensors`.

    Of a file with several entries `which` ("ema" or "model") is taken; where it has only another one, that one. The
    name is "unnamed" where the tensors are at the top of the file.
    """
    entry, tensors = read_entry(path, (which, "state_dict", "model", "ema"))
    if model_of(tensors) == "tokenizer":
        raise WeightsError(f"{path} holds a tokenizer's weights; a LightningDiT's are wanted")
    return tensors, entry or "unnamed"


@dataclass(frozen=True, eq=False)
class Export:
    """Content of an export.

    step: None where unknown. weights: the entry that `state` comes from, such as "ema", or "unnamed". latents: undoes
    the latents' normalisation. extra: the other entries of the JSON. sample: the settings that the network was tuned
    with (`SampleConfig.tuned`); None where they are not known.
    """

    config: ModelConfig
    state: Tensors
    step: int | None
    weights: str
    latents: LatentStatistics
    extra: dict
    sample: dict[str, Any] | None = None


class ExportFacts(Record):
    """The JSON beside an export's tensors."""

    kind: str
    config: dict[str, Any]
    step: Annotated[int, Field(ge=0)] | None
    weights: str
    latents: StatisticsRecord
    classes: ClassNames | None = None
    sample: dict[str, Any] | None = None
    sha256: str


def save_export(path: Path | str, export: Export) -> tuple[Path, Path]:
    """Write `<path>.safetensors` (float32) and `<path>.json` → both paths. Each file is replaced whole or not at all.

    The JSON holds {"kind", "config", "step", "weights", "latents", "sha256"}, "sample" where `export.sample` is known,
    and the entries of `export.extra`.
    """
    tensors_path, json_path = export_paths(path)
    make_directory(tensors_path.parent)
    with atomic_write(tensors_path) as f:
        write_safetensors(f, as_float32(export.state))
        f.flush()
        facts = {
            "kind": KIND,
            "config": export.config.model_dump(),
            "step": export.step,
            "weights": export.weights,
            "latents": export.latents.to_json(),
            **({} if export.sample is None else {"sample": export.sample}),
            "sha256": sha256(f.name),
        }
        # Before the tensors are in place: if this fails, the old pair is still there.
        write_checksummed(json_path, export.extra | facts)
    return tensors_path, json_path


def read_export(path: Path | str) -> Export:
    """Read an export by its name, with or without either suffix; raises WeightsError on a damaged or other file."""
    tensors_path, json_path = export_paths(path)
    for part in (tensors_path, json_path):
        if not part.is_file():
            raise WeightsError(f"{part} is missing; an export is {tensors_path.name} with {json_path.name}")
    try:
        require_kind(json_path, KIND)
        facts = read_record(json_path, ExportFacts)
    except FileError as e:
        raise WeightsError(str(e)) from None
    if (found := sha256(tensors_path)) != facts.sha256:
        raise WeightsError(f"{tensors_path} is damaged: SHA-256 {found}, {json_path.name} says {facts.sha256}")
    config = _config(json_path, facts.config)
    return Export(
        config=config,
        state=read_weights(tensors_path)[0],
        step=facts.step,
        weights=facts.weights,
        latents=LatentStatistics.from_record(facts.latents, channels=config.in_channels, source=json_path),
        extra=dict(facts.model_extra or {}) | ({} if facts.classes is None else {"classes": list(facts.classes)}),
        sample=None if facts.sample is None else tuned_settings(json_path, facts.sample),
    )


def read_tuned(path: Path | str) -> dict[str, Any] | None:
    """The settings of sampling in an export, without reading its tensors; None where it has none."""
    json_path = export_paths(path)[1]
    try:
        require_kind(json_path, KIND)
        found = read_record(json_path, ExportFacts).sample
    except FileError as e:
        raise WeightsError(str(e)) from None
    return None if found is None else tuned_settings(json_path, found)


def tuned_settings(source: Path, content: dict) -> dict[str, Any]:
    """Settings of sampling that are stored with weights, read strictly; raises WeightsError, naming `source`."""
    try:
        return SampleConfig.read(content, f"{source}: sample").tuned()
    except SectionError as e:
        raise WeightsError(str(e)) from None


def _config(source: Path, content: dict) -> ModelConfig:
    try:
        return ModelConfig.read(content, f"{source} has an invalid model config")
    except SectionError as e:
        raise WeightsError(str(e)) from None


def export_paths(path: Path | str) -> tuple[Path, Path]:
    """The two files of the export called `path`."""
    path = Path(path)
    if path.suffix in (".safetensors", ".json"):
        path = path.with_suffix("")
    return path.with_name(f"{path.name}.safetensors"), path.with_name(f"{path.name}.json")


def save_published(path: Path | str, model: Tensors, ema: Tensors) -> None:
    """Write the published `.pt` layout: a dict with the state dicts `model` and `ema`, float32."""
    make_directory(Path(path).parent)
    save_pickled(path, {"model": as_float32(model), "ema": as_float32(ema)})
