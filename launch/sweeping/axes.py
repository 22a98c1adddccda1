"""The settings of a sweep: `sample.cfg_scale=1,2,4` is an axis of three values, the product of all axes the settings.

Values are YAML scalars with commas between them; one that holds a comma is quoted (`sample.x="a,b",c`). Everything else
on the command line is an override as other programs take it.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.sections import short
from launch.config import LightningDiTRun, load
from launch.config_files import ConfigError, merge, parse_value
from launch.trained import sampling_settings
from lightningdit.config import SampleConfig

SECTION = "sample."
MOST = 10_000  # settings
DEFAULT_SAMPLES = 1000  # of a setting, at most
#: Key of `sample` → why it cannot be an axis.
NO_AXIS = {
    "fid_num": "--samples says how many there are of every setting",
    "per_proc_batch_size": "it changes no sample beyond rounding",
    "compile": "it changes no sample beyond rounding",
    "labels": "all settings have the same labels",
    "format": "no samples are written",
    "likelihood": "a sweep compares images, and no figure of it reads likelihoods",
}


#: Keys that change no image, or whose values stand in other keys.
_CHANGE_NOTHING = {"per_proc_batch_size", "compile", "format", "likelihood", "preset"}


@dataclass(frozen=True)
class Axis:
    """A key of `sample`, without the section's name, and the values it takes."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Setting:
    """One point of the product. values: those of the axes, as given. sample: the whole section that they make."""

    values: dict[str, Any]
    sample: SampleConfig

    @property
    def name(self) -> str:
        return ", ".join(f"{key}={shown(value)}" for key, value in self.values.items())

    def effective(self) -> dict[str, Any]:
        """The section as JSON with what has no effect at its default: settings that make the same images are equal."""
        content = self.sample.model_dump(mode="json", exclude=_CHANGE_NOTHING)
        if self.sample.cfg_scale == 1:
            fields = SampleConfig.model_fields
            content |= {key: fields[key].default for key in content if _is_guidance(key) and key != "cfg_scale"}
        return content

    @property
    def key(self) -> str:
        """16 hexadecimal digits by which `effective` is found again."""
        return hashlib.sha256(json.dumps(self.effective(), sort_keys=True).encode()).hexdigest()[:16]


def _is_guidance(key: str) -> bool:
    return key.startswith(("cfg_", "guide_"))


def shown(value: Any) -> str:
    """A value as YAML has it, text without quotes."""
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)


def split_overrides(overrides: Sequence[str]) -> tuple[list[Axis], list[str]]:
    """The axes of a command line, in its order, and the other overrides; raises ConfigError."""
    axes: dict[str, Axis] = {}
    single: list[str] = []
    for override in overrides:
        key, _, text = override.partition("=")
        values = _values(text, override) if key.startswith(SECTION) else []
        if len(values) < 2:
            single.append(override)
            continue
        name = key.removeprefix(SECTION)
        if name in axes:
            raise ConfigError(f"{key} is given twice: list all its values once")
        axes[name] = Axis(name, tuple(_scalar(value, override) for value in values))
    given = {override.partition("=")[0].removeprefix(SECTION) for override in single}
    for name in axes:
        if name in NO_AXIS:
            raise ConfigError(f"{SECTION}{name} cannot be swept: {NO_AXIS[name]}")
        if name in given:
            raise ConfigError(f"{SECTION}{name} is given twice: as an axis and with one value")
    if not axes:
        raise ConfigError("nothing is swept: give a key of `sample` several values, such as sample.cfg_scale=1,2,4")
    return list(axes.values()), single


def _values(text: str, override: str) -> list[Any]:
    """The values of a list without its brackets; of anything else one, or none."""
    where = f"override {short(override)}"
    if text.rstrip().endswith(","):
        raise ConfigError(f"{where}: no value stands behind the last comma")
    found = parse_value(f"[{text}]", where) if "," in text else [text]
    return found if isinstance(found, list) else [found]


def _scalar(value: Any, override: str) -> Any:
    if isinstance(value, list | dict):
        raise ConfigError(f"override {short(override)}: {short(value)} is no single value; list them without brackets")
    return value


def load_settings(
    config: Path, axes: Sequence[Axis], single: Sequence[str], num_samples: int | None
) -> tuple[LightningDiTRun, list[Setting], list[str]]:
    """The run of the first setting, all settings (the last axis changes fastest), and notes on the files.

    num_samples: of each setting; None: `sample.fid_num`, at most 1,000. Raises ConfigError where a setting is not
    allowed, or two of them are the same.
    """
    count = 1
    for axis in axes:
        count *= len(axis.values)
    if count > MOST:
        raise ConfigError(f"{count:,} settings: a sweep has at most {MOST:,}")
    settings: list[Setting] = []
    seen: dict[str, Setting] = {}
    first, notes = None, []
    for values in itertools.product(*(axis.values for axis in axes)):
        named = {axis.key: value for axis, value in zip(axes, values, strict=True)}
        run, said = load_with(config, single, named)
        if first is None:
            first, notes = run, said
        if run.sample.likelihood:
            raise ConfigError(f"{SECTION}likelihood is true: {NO_AXIS['likelihood']}")
        size = num_samples or min(run.sample.fid_num, DEFAULT_SAMPLES)
        setting = Setting(named, sampling_settings(run).model_copy(update={"fid_num": size}))
        same = seen.setdefault(setting.sample.model_dump_json(exclude={"preset"}), setting)
        if same is not setting:
            raise ConfigError(
                f"{setting.name} and {same.name} are the same setting (preset {run.preset}): leave one out"
            )
        settings.append(setting)
    assert first is not None
    return first, settings, notes


def load_with(config: Path, single: Sequence[str], values: Mapping[str, Any]) -> tuple[LightningDiTRun, list[str]]:
    """The run of a setting, and notes on the files; raises ConfigError."""
    overrides = [*single, *(f"{SECTION}{key}={json.dumps(value)}" for key, value in values.items())]
    try:
        run, notes = load(config, overrides, kind="lightningdit")
    except ConfigError as e:
        lists = [o for o in overrides if "," in o.partition("=")[2] and not o.startswith(SECTION)]
        hint = f" (of {short(lists[0])}: only keys of {SECTION.rstrip('.')} take several values)" if lists else ""
        raise ConfigError(f"{e}{hint}") from None
    assert isinstance(run, LightningDiTRun)
    return run, notes


def as_document(overrides: Sequence[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """What overrides, and a setting's values after them, say, as the mapping that a run file would have."""
    document: dict[str, Any] = {}
    for override in overrides:
        key, _, text = override.partition("=")
        document = merge(document, _nested(key, parse_value(text, f"override {short(override)}")), empties=True)
    return merge(document, {SECTION.rstrip("."): values}, empties=True)


def _nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value
