"""What samples depend on, as `samples.json` says it."""

from typing import Any

from pydantic import ValidationError

from launch.guides import Guide
from lightningdit.config import SampleConfig
from lightningdit.model import LightningDiT
from lightningdit.weights import Export
from vavae.model import AutoencoderKL
from vavae.weights import fingerprint

#: Keys of a `sample` section that change no sample, or are stated beside it.
_BESIDE = {"per_proc_batch_size", "labels", "format", "compile"}


def facts_of(
    settings: SampleConfig,
    found: Export,
    model: LightningDiT,
    tokenizer: AutoencoderKL | None,
    guide: Guide | None = None,
) -> dict:
    """Facts of the networks and settings; `hashes` are of weights, not of files."""
    hashes = {"model": fingerprint(model)}
    if tokenizer is not None:
        hashes["tokenizer"] = fingerprint(tokenizer)
    assert found.latents is not None
    facts = {
        "solver": f"{settings.mode} {settings.sampling_method}, {settings.num_sampling_steps} points, "
        f"shift {settings.timestep_shift:g}",
        "dtype": settings.precision,
        "guidance": settings.guidance(),
        "hashes": hashes,
        "step": found.step,
        "weights": found.weights,
        "latents": found.latents.to_json(),
        "settings": _stated(settings),
        "format": settings.format,
    }
    if guide is not None:
        facts["guide"] = guide.facts
    if "classes" in found.extra:
        facts["classes"] = found.extra["classes"]
    return facts


def as_now(described: dict[str, Any]) -> dict[str, Any]:
    """A description of an earlier version as this one writes it: keys that it did not know have their defaults."""
    found = {"format": "npz"} | described
    try:
        settings = SampleConfig.model_validate(described.get("settings", {}))
    except ValidationError:
        return found
    return found | {"settings": _stated(settings)}


def _stated(settings: SampleConfig) -> dict[str, Any]:
    return {key: value for key, value in settings.stated().items() if key not in _BESIDE}
