"""What samples depend on, as `samples.json` says it."""

from typing import Any

from pydantic import ValidationError

from launch.guides import Guide
from lightningdit.config import SampleConfig, TransportConfig
from lightningdit.flow import Transport
from lightningdit.model import LightningDiT
from lightningdit.weights import Export
from vavae.model import AutoencoderKL
from vavae.weights import fingerprint

#: Keys of a `sample` section that change no sample, or are stated beside it.
_BESIDE = {"per_proc_batch_size", "labels", "format", "compile"}


def facts_of(
    settings: SampleConfig,
    transport: TransportConfig,
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
        "solver": settings.solver(),
        "dtype": settings.precision,
        "guidance": settings.guidance(),
        "hashes": hashes,
        "step": found.step,
        "weights": found.weights,
        "latents": found.latents.to_json(),
        "transport": _sampled_by(transport),
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
    found = {"format": "npz", "transport": _sampled_by(TransportConfig())} | described
    try:
        settings = SampleConfig.model_validate(described.get("settings", {}))
    except ValidationError:
        return found
    return found | {"settings": _stated(settings)}


def _sampled_by(config: TransportConfig) -> dict[str, Any]:
    """What samples depend on of a `transport` section, `sample_eps` as it is used where the section leaves it open."""
    found = Transport.from_config(config)
    return {"path_type": found.path_name, "prediction": found.prediction, "sample_eps": found.sample_eps}


def _stated(settings: SampleConfig) -> dict[str, Any]:
    return {key: value for key, value in settings.stated().items() if key not in _BESIDE}
