"""`extends: base.yaml` in run files: a file that says what differs from another one, and where a value is from.

    layers, notes = read_layers("run.yaml")
    document = merged(layers)

The base is read first; the file's mappings are merged into the base's key by key and every other value takes the place
of the base's, an empty mapping too. A base may extend a file in its turn.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common.sections import UnknownKeyError, describe_problem, expand_home, plain_text, short
from common.text import nearest
from launch.config_files import ConfigError, config_note, find_config, merge, read_mapping
from vavae.config import AutoencoderConfig

KEY = "extends"
FILES_LIMIT = 10  # that extend one another
# Key of `model` that names a size → the fields that it decides where they are not given.
_SIZES = {
    "size": {field for fields in AutoencoderConfig.SIZES.values() for field in fields},
    "model_type": {"hidden_size", "depth", "num_heads", "patch_size"},
}


@dataclass(frozen=True)
class Layer:
    """What one file says, without the key `extends`; or, with no name, what the overrides say."""

    name: str
    document: dict[str, Any]


def read_layers(path: str | Path) -> tuple[list[Layer], list[str]]:
    """Read a run file and what it extends → a layer for each file, the file's own last, and notes on what was read.

    A base's path is relative to the file that names it; a mere name that is not there may be that of a file of
    `launch/configs/`, as `path` itself may.

    Raises:
        ConfigError: a file is absent or no YAML mapping; `extends` is no path, leads back to a file it came from, or
            through too many. Names the files on the way there.
    """
    chain, names, layers, notes = [find_config(path)], [str(path)], [], config_note(path)
    while True:
        document = _read(chain[-1], names)
        extends = KEY in document
        base = document.pop(KEY, None)
        layers.append(Layer(names[-1], document))
        if not extends:
            return layers[::-1], notes
        written = _path_text(base, names[-1])
        folder = chain[-1].parent
        found = find_config(written, folder=folder)
        notes += _notes(written, folder, found, names)
        seen = any(os.path.realpath(found) == os.path.realpath(file) for file in chain)
        chain.append(found)
        names.append(str(found))
        if seen:
            raise ConfigError(f"{_way(names)}: files that extend one another in a circle")
        if len(chain) > FILES_LIMIT:
            raise ConfigError(f"{_way(names)}: more than {FILES_LIMIT} files that extend one another")


def convert(layers: Sequence[Layer], function: Callable[..., tuple[dict, list[str]]]) -> tuple[list[Layer], list[str]]:
    """The layers with `function(document, extends=…)` for their documents, and the notes it gave; errors name bases."""
    done: list[Layer] = []
    notes: list[str] = []
    for layer in reversed(layers):
        prefix = "" if layer is layers[-1] else f"{layer.name}: "
        try:
            document, given = function(layer.document, extends=layer is not layers[0])
        except ValueError as e:
            raise ConfigError(f"{prefix}{e}") from None
        done.append(Layer(layer.name, document))
        notes += [prefix + note for note in given]
    return done[::-1], notes


def merged(layers: Sequence[Layer]) -> dict[str, Any]:
    """The document that layers, the base first, make together."""

    def over(base: dict, layer: Layer) -> dict:
        return merge(without_sizes(base, layer.document), layer.document, empties=True)

    return reduce(over, layers, {})


def without_sizes(base: dict, top: Mapping) -> dict:
    """`base` without the fields of its model that a `size` or `model_type` in `top` stands for, and would lose to."""
    model, said = base.get("model"), top.get("model")
    if not isinstance(model, Mapping) or not isinstance(said, Mapping):
        return base
    replaced = {field for name, fields in _SIZES.items() if said.get(name) is not None for field in fields}
    return {**base, "model": {field: value for field, value in model.items() if field not in replaced}}


def title(layers: Sequence[Layer]) -> str:
    """The name of the last file, and of those it extends, for a message on what they say together."""
    *bases, top = [layer.name for layer in layers]
    return f"{top} (extends {', '.join(reversed(bases))})" if bases else top


def explain(error: ValidationError, layers: Sequence[Layer]) -> str:
    """Every problem of a validation in plain words; where several files were read, with the one that the value is from.

    A problem of values that several files gave together names none, nor does one of an override.
    """
    problems = error.errors(include_url=False)
    if sum(bool(layer.name) for layer in layers) == 1:
        return "; ".join(map(describe_problem, problems))
    return "; ".join(_source(problem, layers) + describe_problem(problem) for problem in problems)


def _read(file: Path, names: list[str]) -> dict[str, Any]:
    try:
        document = read_mapping(file)
    except ConfigError as e:
        raise (e if len(names) == 1 else ConfigError(f"{_way(names)}: {e}")) from None
    for key in map(str, document):
        if key != KEY and (meant := nearest(key, [KEY])):
            raise ConfigError(f"{_way(names)}: unknown key {key!r}{meant}")
    return document


def _path_text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(
            f"{name}: {KEY}: the path of one file is wanted (got {short(value)}); that file may extend another"
        )
    try:
        return expand_home(plain_text(value))
    except ValueError as e:
        raise ConfigError(f"{name}: {KEY}: {e}") from None


def _notes(written: str, folder: Path, found: Path, names: list[str]) -> list[str]:
    subject = f"{names[-1]} extends" if len(names) > 1 else KEY
    which = config_note(written, folder=folder)
    return [f"{subject} {written}: {note}" for note in which] or [f"{subject} {found}"]


def _way(names: list[str]) -> str:
    return f" {KEY} ".join(names)


def _source(problem: Any, layers: Sequence[Layer]) -> str:
    if problem["type"] == "missing":  # from all of them
        return ""
    fault = problem.get("ctx", {}).get("error")
    path = problem["loc"]
    paths = [(*path, key) for key in fault.keys] if isinstance(fault, UnknownKeyError) else [path]
    names = dict.fromkeys(_origin(path, layers) for path in paths)
    return f"in {' and '.join(names)}, " if all(names) else ""


def _origin(path: tuple, layers: Sequence[Layer]) -> str:
    """Name of the layer that the value at `path`, or what of its sections there is, comes from alone; else nothing."""
    for length in range(len(path), 0, -1):
        holders = [(layer.name, value) for layer in layers for value in _values(layer.document, path[:length])]
        if holders:
            (name, value), several = holders[-1], len(holders) > 1
            return "" if several and isinstance(value, Mapping) else name
    return ""


def _values(document: Any, path: tuple) -> list[Any]:
    """The value at `path` alone, or nothing where there is none."""
    for key in path:
        held = (isinstance(document, Mapping) and key in document) or (
            isinstance(document, list) and isinstance(key, int) and key < len(document)
        )
        if not held:
            return []
        document = document[key]
    return [document]
