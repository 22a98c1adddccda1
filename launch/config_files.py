"""Config files: YAML and JSON read as mappings, overrides parsed, mappings merged.

YAML as PyYAML reads it, but for what would silently change a run: a key may not stand twice in a mapping, numbers
that programs read in different ways (010, 1:30) are refused, 1e-4 is a number, and dates and `=` are text. Without
quotes, yes, no, on and off are true and false.
"""

import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from common.files import FileError, open_regular, path_exists, refuse_placeholders
from common.text import nearest

SHIPPED = Path(__file__).parent / "configs"
SIZE_LIMIT = 16 * 2**20  # bytes
NUMBER_LIMIT = 100  # characters of a whole number; Python itself takes 4,300, and prints no more
_TAG = "tag:yaml.org,2002:"


class ConfigError(ValueError):
    """A config file or override that cannot be used; names the file, the key and what is allowed."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the differences that the module's docstring states."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused when it is constructed: such a key cannot be looked up
            name = key.value if key.tag == _TAG + "merge" else self.construct_object(key)
            line = key.start_mark.line + 1
            if name in lines:
                problem = f"{key.value} was already given in line {lines[name]}; keep one of the two"
                raise ConstructorError(problem=problem, problem_mark=key.start_mark)
            lines[name] = line
        return node

    def read_int(self, node):
        if len(node.value) > NUMBER_LIMIT:
            problem = f"a whole number of {len(node.value):,} characters is larger than any value that is allowed"
            raise ConstructorError(problem=problem, problem_mark=node.start_mark)
        return self.construct_yaml_int(node)

    def refuse_number(self, node):
        text = node.value
        decimal = text[:1].strip("+0123456789") + (text.lstrip("+-0_") or "0")
        base, instead = (60, "it as one number") if ":" in text else (8, decimal)
        raise ConstructorError(
            problem=f"{text} is a number in base {base} to some programs and not to others; write "
            f'{instead}, or "{text}" in quotes for text',
            problem_mark=node.start_mark,
        )


def _resolve(tag: str, pattern: str) -> None:
    _Loader.add_implicit_resolver(tag, re.compile(rf"[-+]?(?:{pattern})$"), list("-+.0123456789"))


_REPLACED_TAGS = {_TAG + kind for kind in ("timestamp", "value", "int", "float")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_resolve("!refused", r"0[0-9_]+|[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?")
_resolve(_TAG + "int", r"0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+")
_resolve(
    _TAG + "float",
    r"(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
    r"|\.(?:inf|Inf|INF|nan|NaN|NAN)",
)
_Loader.add_constructor("!refused", _Loader.refuse_number)
_Loader.add_constructor(_TAG + "int", _Loader.read_int)


def parse(text: str, where: str) -> Any:
    """The content of a YAML (or JSON) document; ConfigErrors name it as `where`, and the line where it has several."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        line = f", line {mark.line + 1}" if mark and "\n" in text else ""
        syntax = "" if isinstance(e, ConstructorError) else " is not YAML"
        raise ConfigError(f"{where}{syntax}{line}: {e.problem or e.context}") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(e).split())}") from None
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply") from None
    except ValueError as e:  # of a value with a tag, such as !!int x
        raise ConfigError(f"{where}: {e}") from None


def parse_value(text: str, where: str) -> Any:
    """The value of a `key=value`, as `parse` reads it; what YAML would take for more than a value is refused.

    That is a comment, an anchor, a tag and the like: on a command line their signs are meant as text, which would be
    lost. ConfigErrors name `text` as `where`, and say how to quote it.
    """
    quoted = f"for text, write the value in quotes, as {shlex.quote(json.dumps(text, ensure_ascii=False))}"
    if (taken := _more_than_a_value(text)) is not None:
        raise ConfigError(f"{where}: {taken}; {quoted}")
    try:
        return parse(text, where)
    except ConfigError as e:
        raise (e if "in quotes" in str(e) else ConfigError(f"{e}; {quoted}")) from None


_SYNTAX_TOKENS = {
    yaml.AnchorToken: "an anchor",
    yaml.AliasToken: "an alias",
    yaml.TagToken: "a tag",
    yaml.DirectiveToken: "a directive",
    yaml.DocumentStartToken: "the start of a document",
    yaml.DocumentEndToken: "the end of a document",
}


def _more_than_a_value(text: str) -> str | None:
    """The part of a text that YAML would take for syntax or leave out, in words; None where all of it is values."""
    end = 0
    try:
        for token in yaml.scan(text, _Loader):
            start, between = token.start_mark.index, text[end : token.start_mark.index].strip()
            end = token.end_mark.index
            if between:
                return f"{between} is a comment in YAML"
            if type(token) in _SYNTAX_TOKENS:
                return f"{text[start:end]} is {_SYNTAX_TOKENS[type(token)]} in YAML"
            if isinstance(token, yaml.ScalarToken) and (
                token.style in ("|", ">") or (token.plain and "\n" in text[start:end])
            ):
                return f"{text[start:end]!r} is text in lines in YAML, which joins them"
    except yaml.MarkedYAMLError as e:
        return f"it is not YAML ({e.problem})"
    except yaml.YAMLError:
        pass  # said when it is read
    return None


def find_config(path: str | Path, shipped: Path = SHIPPED, *, folder: Path = Path()) -> Path:
    """The file at `path` from `folder`; where there is none and `path` is a mere name, the file of it in `shipped`."""
    ours, here = shipped / path, folder / path
    found = _is_name_of(path, ours) and not path_exists(here)
    return ours if found else here


def config_note(path: str | Path, shipped: Path = SHIPPED, *, folder: Path = Path()) -> list[str]:
    """A note, where a mere name is that of a shipped file, on which file `find_config` finds by it."""
    ours, here = shipped / path, folder / path
    if not _is_name_of(path, ours) or os.path.realpath(here) == os.path.realpath(ours):
        return []
    taken = find_config(path, shipped, folder=folder)
    return [f"not here, so the one in {shipped}" if taken == ours else f"the one here, not that in {shipped}"]


def _is_name_of(path: str | Path, shipped: Path) -> bool:
    return str(path) == shipped.name and shipped.is_file()


def read_mapping(path: str | Path) -> dict:
    """A YAML or JSON file's mapping; raises ConfigError where the file is missing or holds something else."""
    text = _read_text(path)
    if Path(path).suffix == ".json":
        text = text.replace("\t", " ")  # YAML lets no tab indent; JSON has them nowhere else
    document = parse(text, str(path))
    if not isinstance(document, dict):
        raise ConfigError(
            f"{path} holds {'nothing' if document is None else type(document).__name__}, not a mapping of sections"
        )
    return document


def _read_text(path: str | Path) -> str:
    try:
        with open_regular(path) as f:
            content = f.read(SIZE_LIMIT + 1)
        refuse_placeholders(path, content[:100])
    except FileError as e:
        raise ConfigError(f"cannot read config: {e}{_shipped_name(path)}") from None
    except OSError as e:
        raise ConfigError(f"cannot read config {path}: {e.strerror}") from None
    if len(content) > SIZE_LIMIT:
        raise ConfigError(f"{path} has more than {SIZE_LIMIT:,} bytes: it is no config")
    try:
        return content.decode()
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        raise ConfigError(
            f"{path}, line {line}: byte 0x{content[e.start]:02x} is not UTF-8; save the file in that encoding"
        ) from None


def _shipped_name(path: str | Path) -> str:
    """The shipped file that a mere name that is nowhere may mean, as a hint; else nothing."""
    if str(path) != Path(path).name or path_exists(Path(path)):
        return ""
    return nearest(str(path), [file.name for file in sorted(SHIPPED.glob("*.yaml"))])


def merge(base: Mapping, top: Mapping, *, empties: bool = False) -> dict:
    """`base` with the values of `top` in it; mappings in both are merged key by key.

    An empty mapping of `top` changes nothing; with `empties` it takes the place of the one in `base`.
    """
    both = {
        k: merge(base[k], v, empties=empties)
        if isinstance(v, Mapping) and isinstance(base.get(k), Mapping) and (v or not empties)
        else v
        for k, v in top.items()
    }
    return {**base, **both}
