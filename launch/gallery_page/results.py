"""Results of `evaluate` as tables: figures with what they were measured of and by what, and all facts beside."""

import math
from collections.abc import Mapping
from typing import Any

from launch.gallery_page.configs import flat, shown
from launch.run_directory.rows import number

MOST_RESULTS = 200
#: What no figure may be read without: heading → the keys that may say it.
_BESIDE = {
    "N": ("samples", "images", "num_samples", "vectors"),
    "solver": ("solver",),
    "guidance": ("guidance",),
    "scale": ("guidance_scale",),
    "interval": ("guidance_interval",),
    "labels": ("labels",),
    "step": ("step",),
    "weights": ("weights",),
    "features": ("features",),
}
_HASH = 12  # characters shown of a hash; all of it in the facts below


def result_tables(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A table for each group of results that have figures in common.

    Args:
        results: name → content of a file of `evaluate`.
    """
    groups: list[tuple[set[str], list[str]]] = []
    order = list(results)
    for name, result in list(results.items())[:MOST_RESULTS]:
        figures = set(result["metrics"])
        joined = [group for group in groups if group[0] & figures]
        for group in joined:
            groups.remove(group)
        members = [member for _, others in joined for member in others]
        groups.append((figures.union(*(known for known, _ in joined)), sorted([*members, name], key=order.index)))
    return [_table({name: results[name] for name in names}) for _, names in groups]


def _table(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    figures = list(dict.fromkeys(figure for result in results.values() for figure in result["metrics"]))
    rows = []
    for name, result in results.items():
        rows.append(
            {
                "name": name,
                "figures": [figure_text(result["metrics"].get(figure)) for figure in figures],
                "beside": [(head, said) for head in _BESIDE if (said := _said(result, head))],
                "hashes": _hashes(result),
                "notes": _notes(result),
                "facts": _facts(result),
            }
        )
    return {"figures": figures, "rows": rows}


def figure_text(value: Any) -> str:
    """A figure with four digits that count, or a dash where there is none."""
    found = number(value)
    if math.isnan(found):
        return "–"
    return f"{found:,.0f}" if abs(found) >= 10_000 else f"{found:.4g}"


def _said(result: Mapping[str, Any], head: str) -> str:
    """What a result says under a heading; nothing where it says nothing, a mapping, or a long list."""
    made = result.get("made")  # what made the samples, in the quickstart's report
    known = {**made, **result} if isinstance(made, dict) else result
    value = next((known[key] for key in _BESIDE[head] if key in known), None)
    if value is None or isinstance(value, dict) or (isinstance(value, list) and len(value) > 4):
        return ""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else shown(value)


def _hashes(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(of what, its beginning, all of it) of each hash in a result."""
    found: dict[str, str] = {}
    for key, value in flat(_by_name(result)).items():
        if isinstance(value, str) and ("hash" in key or "sha256" in key):
            of = key.removeprefix("made.").removeprefix("hashes.").replace(".sha256", "").removesuffix("_sha256")
            found.setdefault(of, value)
    return [(of, value[:_HASH], value) for of, value in found.items()]


def _notes(result: Mapping[str, Any]) -> list[str]:
    notes, skipped = result.get("notes"), result.get("skipped")
    found = [str(note) for note in notes] if isinstance(notes, list) else []
    return found + ([f"no {key}: {why}" for key, why in skipped.items()] if isinstance(skipped, dict) else [])


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    left = {key: value for key, value in result.items() if key not in ("metrics", "notes", "skipped", "classes")}
    return [(key, shown(value)[:500]) for key, value in flat(_by_name(left)).items()]


def _by_name(value: Any) -> Any:
    """`value` with lists of mappings, such as that of networks, as mappings by their `name` or place."""
    if isinstance(value, Mapping):
        return {key: _by_name(each) for key, each in value.items()}
    if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        return {str(each.get("name", place)): _by_name(each) for place, each in enumerate(value)}
    return value


def facts_of(description: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What made a set of samples, without the names of its classes, for the list beside it."""
    return _facts(description)
