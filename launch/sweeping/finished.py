"""A sweep's directory: what all of its settings share, and a file for each that is finished.

sweep.json               weights, labels, N, figures, reference: another sweep's are refused
settings/<key>.json      a finished setting, by the hash of its `sample` section; counts only when whole
reference/               features of the reference, see `launch.evaluation.judge`
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import FileError, make_directory, path_exists, read_json, write_json
from common.records import Record, read_record, write_checksummed
from common.sections import short
from launch.config_files import ConfigError
from launch.sweeping.axes import Setting

log = logging.getLogger(__name__)
DESCRIPTION = "sweep.json"


class Finished(Record):
    """What came of a setting: its figures, or why it has none.

    Fields:
        sample: the section, as `Setting.effective` has it.
        images_sha256: of all pixels in order; "" where it failed, as are the figures empty.
        versions: of what computed it, and the device.
        failed: why there are no samples: they are not finite, or an adaptive solver found no step.
    """

    sample: dict[str, Any]
    num_samples: int
    hashes: dict[str, str]
    figures: dict[str, float]
    nfe: float
    guided_nfe: float
    images_sha256: str
    versions: dict[str, str]
    failed: str | None


def shared_facts(settings: Sequence[Setting], **facts: Any) -> dict[str, Any]:
    """`facts`, and the keys of `sample` that no axis names and all settings have alike."""
    first = settings[0].sample.model_dump(mode="json")
    dumps = [setting.sample.model_dump(mode="json") for setting in settings]
    fixed = {
        key: value
        for key, value in first.items()
        if key not in settings[0].values and all(dump[key] == value for dump in dumps)
    }
    return {**facts, "sample": fixed}


def claim(directory: Path, facts: dict[str, Any]) -> None:
    """Make the directory this sweep's; raises ConfigError, naming the difference, where it is another's.

    A key of `sample` that was an axis there or is one now may differ: each setting's file has its whole section.
    """
    path = directory / DESCRIPTION
    if not path_exists(path) or not any((directory / "settings").glob("*.json")):  # nothing there that others made
        make_directory(directory / "settings")
        write_json(path, facts)
        return
    theirs = read_json(path)
    if not isinstance(theirs, dict) or not isinstance(theirs.get("sample"), dict):
        raise FileError(f"{path} is damaged: it describes no sweep")
    changes = differences(theirs, facts)
    if changes:
        (key, (there, now)), *more = changes.items()
        others = f", and others in {', '.join(key for key, _ in more)}" if more else ""
        raise ConfigError(
            f"{directory} holds a sweep of another {key} ({short(there)} there, {short(now)} now){others}; give "
            "another --output or remove it"
        )


def differences(theirs: Mapping, ours: Mapping, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key → the values there and now, where they differ; of `sample` only keys that both have."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*ours, *theirs]):
        there, now = theirs.get(key), ours.get(key)
        if isinstance(there, Mapping) and isinstance(now, Mapping):
            found |= differences(there, now, f"{prefix}{key}.")
        elif there != now and not (prefix == "sample." and (key not in theirs or key not in ours)):
            found[f"{prefix}{key}"] = (there, now)
    return found


def setting_path(directory: Path, setting: Setting) -> Path:
    return directory / "settings" / f"{setting.key}.json"


def write_finished(directory: Path, setting: Setting, finished: Finished) -> None:
    write_checksummed(setting_path(directory, setting), finished.model_dump(mode="json"))


def read_finished(directory: Path, setting: Setting, facts: Mapping[str, Any]) -> Finished | None:
    """What came of a setting; None where it is to be made: no file, or (which is said) one that is not whole."""
    path = setting_path(directory, setting)
    if not path_exists(path):
        return None
    try:
        found = read_record(path, Finished)
        _require_of(path, found, setting, facts)
    except FileError as e:
        log.warning("%s is made again: %s", setting.name, e)
        return None
    return found


def _require_of(path: Path, found: Finished, setting: Setting, facts: Mapping[str, Any]) -> None:
    """Raise FileError where a whole file is of another setting or sweep, as one that was copied there is."""
    wanted = {"sample": setting.effective(), "num_samples": facts["num_samples"], "hashes": facts["hashes"]}
    other = [name for name, value in wanted.items() if getattr(found, name) != value]
    if not found.failed and set(found.figures) != set(facts["figures"]):
        other.append("figures")
    if other:
        raise FileError(f"{path} is of another {', '.join(other)}")
