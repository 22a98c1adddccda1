"""Results beside each other: figures of evaluations, samples and sweeps, and the facts in which they differ."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from common.files import FileError, path_exists, read_json
from launch.config_files import ConfigError
from launch.text_tables import markdown

SAMPLES = "samples.json"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
#: Entries of a result that are no fact a figure depends on, or are told otherwise.
_NO_FACTS = {
    "metrics",
    "notes",
    "skipped",
    "classes",
    "npz",
    "num_samples",
    "samples_sha256",
    "sweep",
    "best",
    "axes",
    "ranked_by",
    "basis",
    "self_test",
    "label_counts",
    "log_likelihood",
}
#: What figures need to have in common → the keys, with all below them, that say it.
_CONDITIONS = {
    "N": ("samples", "images"),
    "features": ("features", "features_sha256", "networks.*.sha256"),
    "reference": ("reference.sha256",),
    "resize rule": (
        "resize",
        "networks.*.resize",
        "crop",
        "image_size",
        "decoder",
        "exif_rotation",
        "reference.image_size",
    ),
}
#: Keys of images that were resized; those of others, which were not, lack them.
_OF_RESIZED = ("resize", "crop", "image_size")
_WIDTH = 44  # columns of a value in the table


@dataclass(frozen=True)
class Result:
    """A result as it was read. facts: dotted key → value, without the figures and what is no fact."""

    path: Path
    figures: Mapping[str, float]
    facts: Mapping[str, Any]
    images: str | None = None


def read_result(path: Path) -> Result:
    """A JSON file of evaluate or sweep, or a directory with one or with samples; raises ConfigError or FileError."""
    file = _result_file(path) if path.is_dir() else path
    content = read_json(file)
    if not isinstance(content, dict):
        raise FileError(f"{file} holds {type(content).__name__}, not a result")
    if not isinstance(content.get("metrics", {}), dict) or not ("metrics" in content or "num_samples" in content):
        raise ConfigError(f"{file} is no result of evaluate, sample or sweep: it has neither figures nor samples")
    if "samples" not in content and "num_samples" in content:
        content["samples"] = content["num_samples"]
    for name, value in content.get("metrics", {}).items():
        if not isinstance(value, int | float):
            raise FileError(f"{file} is damaged: figure {name!r} is {value!r}, no number")
    facts = dict(_flat({key: value for key, value in content.items() if key not in _NO_FACTS}))
    return Result(file, content.get("metrics", {}), facts, content.get("samples_sha256"))


def _result_file(directory: Path) -> Path:
    """The one JSON file with figures in a directory, else what made its samples."""
    found = [path for path in sorted(directory.glob("*.json")) if _has_figures(path)]
    if len(found) > 1:
        raise ConfigError(f"{directory} holds several results; name one: {', '.join(path.name for path in found)}")
    if not found and not path_exists(directory / SAMPLES):
        raise ConfigError(f"{directory} holds no result: no JSON file with figures, and no {SAMPLES}")
    return found[0] if found else directory / SAMPLES


def _has_figures(path: Path) -> bool:
    try:
        content = read_json(path)
    except FileError:  # whatever lies there; the file is named where it is asked for by its own name
        return False
    return isinstance(content, dict) and isinstance(content.get("metrics"), dict)


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
            value = {str(place): each for place, each in enumerate(value)}
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differing(results: Sequence[Result]) -> dict[str, list[Any]]:
    """Key → its value in each result (`...` where it has none), of the facts that are not the same in all."""
    keys = dict.fromkeys(key for result in results for key in result.facts)
    rows = {key: [result.facts.get(key, ...) for result in results] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def warnings(results: Sequence[Result]) -> list[str]:
    """Why figures of the results are not comparable, a sentence each; results without figures are left out."""
    measured = {LETTERS[i]: result for i, result in enumerate(results) if result.figures}
    found = []
    differ = differing(list(measured.values()))
    for what, names in _CONDITIONS.items():
        for key, values in differ.items():
            asked = any(fnmatchcase(key, name) or key.startswith(f"{name}.") for name in names)
            stated = [value for value in values if value is not ...]
            if asked and (key.partition(".")[0] in _OF_RESIZED or any(value != stated[0] for value in stated)):
                said = ", ".join(f"{letter} {_cell(v)}" for letter, v in zip(measured, values, strict=True))
                found.append(f"not comparable, another {what}: {key} is {said}")
    if "reference.path" in differ and any("reference.sha256" not in result.facts for result in measured.values()):
        found.append("perhaps not comparable: another path of the reference, and not all results have its hash")
    return found


def remarks(results: Sequence[Result]) -> list[str]:
    """Which results are of the very same images."""
    known = [(LETTERS[i], result.images) for i, result in enumerate(results) if result.images]
    groups = {images: [name for name, other in known if other == images] for _, images in known}
    return [f"{', '.join(names)}: the same images" for names in groups.values() if len(names) > 1]


def as_json(results: Sequence[Result]) -> dict:
    """All of it by letter; null where a result does not have a figure or fact."""

    def by_letter(values: Sequence[Any]) -> dict:
        return {LETTERS[i]: None if value is ... else value for i, value in enumerate(values)}

    return {
        "results": by_letter([str(result.path) for result in results]),
        "figures": {name: by_letter(values) for name, values in _figures(results).items()},
        "differences": {key: by_letter(values) for key, values in differing(results).items()},
        "warnings": warnings(results),
        "remarks": remarks(results),
    }


def as_text(results: Sequence[Result]) -> str:
    """The figures side by side, warnings, and the settings that differ, as Markdown."""
    letters = list(LETTERS[: len(results)])
    lines = [f"* {letter}: {result.path}" for letter, result in zip(letters, results, strict=True)]
    figures = _figures(results)
    if figures:
        rows = [[name, *map(_figure, values, [values[0]] * len(values))] for name, values in figures.items()]
        lines += ["", markdown(["figure", *letters], rows)]
    else:
        lines += ["", "None of them has figures."]
    lines += ["", *(f"WARNING: {text}" for text in warnings(results)), *(f"* {text}" for text in remarks(results))]
    differ = differing(results)
    if not differ:
        return "\n".join([*lines, "No setting differs."]) + "\n"
    rows = [[key, *map(_cell, values)] for key, values in differ.items()]
    return "\n".join([*lines, "", markdown(["differs", *letters], rows, left=len(letters) + 1)]) + "\n"


def _figures(results: Sequence[Result]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for result in results for name in result.figures)
    return {name: [result.figures.get(name, ...) for result in results] for name in names}


def _figure(value: Any, base: Any) -> str:
    """A figure, and its difference to the first result's."""
    if value is ...:
        return "–"
    if base is ... or not base or value is base:
        return f"{value:.6g}"
    return f"{value:.6g} ({value / base - 1:+.1%})"


def _cell(value: Any) -> str:
    if value is ...:
        return "–"
    text = value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return text[:12]
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"
