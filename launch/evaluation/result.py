"""The JSON-ready result of an evaluation, and its text: figures, what they are figures of, what is to be known."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.text import printable
from launch.evaluation.features import Extractor, facts_of
from launch.evaluation.moments import NOT_STATED
from launch.text_tables import columns

#: Facts that no figure may be without, and those that no figure of samples may.
REQUIRED_METADATA = ("solver", "nfe", "dtype", "guidance", "hashes")
REQUIRED_OF_SAMPLES = (*REQUIRED_METADATA, "guidance_scale", "guidance_interval", "labels", "weights")
#: Entries of a result that a table of figures, or a line of their own kind, already shows.
_SHOWN = ("metrics", "skipped", "notes", "basis", "classes", "networks", "self_test")
_HEAD = ("figure", "value", "images", "reference", "network", "its resize")


def make_result(
    metrics: Mapping[str, float],
    skipped: Mapping[str, str],
    notes: Sequence[str],
    facts: Mapping[str, Any],
    extractor: Extractor | None,
    metadata: Mapping[str, Any],
    *,
    required: Sequence[str] = REQUIRED_METADATA,
) -> dict:
    """The JSON-ready result of an evaluation; facts of `required` that are missing are marked so."""
    missing = [key for key in required if facts.get(key, metadata.get(key, NOT_STATED)) == NOT_STATED]
    if missing:
        notes = [*notes, f"not stated by whoever made the images: {', '.join(missing)}"]
    stated = {key: metadata.get(key, NOT_STATED) for key in required}
    used = {}
    if extractor is not None:
        networks = facts_of(extractor)
        used = {"features": ", ".join(network["name"] for network in networks), "networks": networks}
    measured = {"metrics": metrics, **facts, **used, "skipped": skipped, "notes": list(notes)}
    # Measured values take precedence over metadata of the same name.
    return measured | {key: value for key, value in ({**metadata} | stated).items() if key not in measured}


def with_guidance(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata with `guidance_scale` and `guidance_interval` of the settings of `sample`, where it has some."""
    settings, found = metadata.get("settings"), dict(metadata)
    if isinstance(settings, Mapping) and "cfg_scale" in settings:
        found.setdefault("guidance_scale", settings["cfg_scale"])
        ends = settings.get("cfg_interval_start", 0.0), settings.get("cfg_interval_end", 1.0)
        found.setdefault("guidance_interval", list(ends))
    return found


def as_text(result: Mapping[str, Any]) -> str:
    """The figures first, then what they are figures of, a line each (but a thousand names of classes)."""
    basis = result.get("basis", {})
    if basis:
        rows = [
            (name, f"{value:.4f}", *(str(basis.get(name, {}).get(key, "")) for key in ("images", "reference")),
             *(str(basis.get(name, {}).get(key, "")) for key in ("network", "resize")))
            for name, value in result["metrics"].items()
        ]  # fmt: skip
        figures = columns(_HEAD, rows)
    else:
        figures = [f"{name:<15} {value:.4f}" for name, value in result["metrics"].items()]
    skipped = [f"{name:<15} not measured: {reason}" for name, reason in result["skipped"].items()]
    networks = [
        f"{'network':<15} {network['name']}, weights {network.get('weights', NOT_STATED)}, SHA-256 "
        f"{network.get('sha256', NOT_STATED)}"
        for network in result.get("networks", [])
    ]
    facts = [f"{key:<17} {_short(value)}" for key, value in result.items() if key not in _SHOWN]
    notes = [f"note: {note}" for note in result["notes"]]
    return "\n".join(map(printable, [*figures, *skipped, "", *networks, *facts, *notes]))


def _short(value: Any) -> str:
    """A value; of a long list its beginning."""
    if isinstance(value, list) and len(value) > 20:
        return f"[{', '.join(map(str, value[:8]))}, … {len(value):,} in all]"
    return str(value)
