"""A config file as a mapping, and mappings merged."""

import os
from collections.abc import Mapping
from pathlib import Path

import yaml

SHIPPED = Path(__file__).parent / "configs"


class ConfigError(ValueError):
    """A config file or override that cannot be used; names the file, the key and what is allowed."""


def find_config(path: str | Path) -> Path:
    """The file itself; where there is none and `path` is a mere name, the file of that name among those shipped."""
    shipped = SHIPPED / path
    found = str(path) == shipped.name and shipped.is_file() and not os.path.lexists(path)
    return shipped if found else Path(path)


def read_mapping(path: str | Path) -> dict:
    """A YAML or JSON file's mapping; raises ConfigError where there is none."""
    try:
        document = yaml.safe_load(Path(path).read_text())  # JSON is YAML
    except OSError as e:
        raise ConfigError(f"cannot read config {path}: {e.strerror}") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{path} is not YAML: {e}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path} holds {type(document).__name__}, not a mapping of sections")
    return document


def merge(base: Mapping, top: Mapping) -> dict:
    """`base` with the values of `top` in it; mappings in both are merged key by key."""
    both = {k: merge(base[k], v) if isinstance(v, Mapping) and isinstance(base.get(k), Mapping) else v
            for k, v in top.items()}  # fmt: skip
    return {**base, **both}
