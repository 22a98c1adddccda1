"""Run files beside each other: what differs between runs of a kind, or of one from a shipped file and defaults."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from pydantic import BaseModel

from launch.comparison.table import PLACES
from launch.config import KINDS, load, stored_run
from launch.config_files import SHIPPED, ConfigError

ABSENT = "–"
Flat = dict[str, Any]


def flat(config: Mapping[str, Any], prefix: str = "") -> Flat:
    """Dotted key → value, of sections in sections; an empty section is a value."""
    found: Flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def defaults(kind: str) -> Flat:
    """The defaults of all keys of a kind of run file that have one."""
    return flat(_defaults(cast(type[BaseModel], KINDS[kind])))


def _defaults(section: type[BaseModel]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if not field.is_required():
            value = field.get_default(call_default_factory=True)
            found[name] = value.model_dump(mode="json") if isinstance(value, BaseModel) else _as_json(value)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found[name] = _defaults(field.annotation)
    return found


def _as_json(value: Any) -> Any:
    """A default as a checkpoint's JSON has it."""
    return [_as_json(each) for each in value] if isinstance(value, tuple | list) else value


def nearest_recipe(config: Flat, kind: str) -> tuple[str, Flat] | None:
    """The shipped file, and what it says, from which the fewest keys differ; of equally near ones the first by name."""
    found: list[tuple[int, str, Flat]] = []
    for path in sorted(SHIPPED.glob("*.yaml")):
        try:
            recipe = flat(load(path, kind=kind)[0].model_dump(mode="json"))
        except ConfigError:  # of the other kind
            continue
        found.append((len(differing([config, recipe])), path.name, recipe))
    return min(found, key=lambda each: each[:2])[1:] if found else None


def differing(configs: Sequence[Flat]) -> list[str]:
    """Keys in which flat run files differ, those of the first in its order, without the places of runs."""
    keys = dict.fromkeys(key for config in configs for key in config)
    missing = object()
    return [
        key
        for key in keys
        if key not in PLACES and any(config.get(key, missing) != configs[0].get(key, missing) for config in configs[1:])
    ]


def filled(kind: str, config: Mapping[str, Any]) -> Flat:
    """A run's file, flat, with the keys that it lacks, as one of an earlier version does: these mean the defaults."""
    found = flat(config)
    if kind not in KINDS:
        return found
    try:
        usual = flat(stored_run(dict(config), "", kind=kind).model_dump(mode="json"))
    except ConfigError:  # of another version in other ways, too
        usual = defaults(kind)
    return found | {key: value for key, value in usual.items() if not any(_is_within(key, known) for known in found)}


def _is_within(key: str, other: str) -> bool:
    """Whether keys are equal, or one is a section that the other is in."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def config_tables(configs: Mapping[str, tuple[str | None, Mapping[str, Any] | None]]) -> list[dict[str, Any]]:
    """A table for each kind of run: several beside each other, one beside the nearest shipped file and the defaults.

    Args:
        configs: run → its kind and its file, as they are known.
    """
    tables = []
    for kind in dict.fromkeys(kind for kind, _ in configs.values() if kind is not None):
        known = {run: config for run, (of, config) in configs.items() if of == kind and config}
        if len(known) > 1:
            tables.append(_beside(kind, known))
        elif known and kind in KINDS:
            tables.append(_alone(kind, *next(iter(known.items()))))
    return tables


def _beside(kind: str, known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    title = f"Keys in which these runs ({kind}) differ"
    columns = [filled(kind, config) for config in known.values()]
    rows = _rows(differing(columns), columns)
    return _table(title, known, rows) | {"rest": _table("", [], []), "whole": _whole(known)}


def _alone(kind: str, run: str, content: Mapping[str, Any]) -> dict[str, Any]:
    config, usual = filled(kind, content), defaults(kind)
    nearest = nearest_recipe(config, kind)
    assert nearest is not None, f"no file of kind {kind} is shipped"
    name, recipe = nearest
    first = differing([config, recipe])
    rest = [key for key in config if key not in (*first, *PLACES) and key in usual and config[key] != usual[key]]
    head, columns = [run, name, "default"], [config, recipe, usual]
    title = f"{run}: keys that differ from {name}, the nearest of the shipped files"
    more = _table(f"{len(rest)} keys as in {name} that differ from the defaults", head, _rows(rest, columns))
    return _table(title, head, _rows(first, columns)) | {"rest": more, "whole": _whole({run: content})}


def _table(title: str, columns: Iterable[str], rows: list[list[str]]) -> dict[str, Any]:
    return {"title": title, "head": ["key", *columns], "rows": rows}


def _rows(keys: Iterable[str], configs: Sequence[Flat]) -> list[list[str]]:
    return [[key, *(shown(config[key]) if key in config else ABSENT for config in configs)] for key in keys]


def _whole(known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    columns = [flat(config) for config in known.values()]
    keys = dict.fromkeys(key for config in columns for key in config)
    return _table("The whole run files", known, _rows(keys, columns))


def shown(value: Any) -> str:
    """A value of a run file as YAML's authors write it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return str(value) if value != {} else "{}"
