"""What of given directories a page shows: runs, sets of samples, results of evaluate, pictures. Nothing is written."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.files import FileError, read_json
from launch.run_directory.find import CHECKPOINTS, is_run

DEEPEST = 4  # folders below a given one
MOST_FOLDERS = 5_000
JSON_BYTES = 4 * 2**20  # larger ones are no results
DESCRIPTION = "samples.json"
#: Folders that hold none of what is looked for, or things that are not whole yet.
_PASSED_OVER = {CHECKPOINTS, "tensorboard", "wandb", "parts", "__pycache__"}


@dataclass
class Sources:
    """What was found, in the order of names.

    Fields:
        runs: directories of runs.
        samples: directory of a set of samples → its description.
        results: file of `evaluate` → its content.
        pictures: PNGs that lie directly in a given directory or beside samples.
        left_out: what could not be read, or was passed over → why.
    """

    runs: list[Path] = field(default_factory=list)
    samples: dict[Path, dict[str, Any]] = field(default_factory=dict)
    results: dict[Path, dict[str, Any]] = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)
    left_out: dict[Path, str] = field(default_factory=dict)


def find_sources(directories: Sequence[Path]) -> Sources:
    """Look through the directories and what is below them, each folder once; links to folders are followed."""
    found, seen = Sources(), set[tuple[int, int]]()
    for directory in directories:
        for folder, names in _folders(directory, seen, found):
            _look_into(folder, names, found, given=folder == directory)
    return found


def _folders(directory: Path, seen: set[tuple[int, int]], found: Sources) -> Iterator[tuple[Path, list[str]]]:
    """Folders to look into and the names in each."""
    waiting = [(directory, 0)]
    while waiting:
        folder, depth = waiting.pop()
        try:
            identity = (status := os.stat(folder)).st_dev, status.st_ino
            entries = [] if identity in seen else sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as e:
            found.left_out[folder] = f"cannot be read: {e.strerror or e}"
            continue
        if identity in seen:
            continue
        seen.add(identity)
        if len(seen) > MOST_FOLDERS:
            found.left_out[directory] = f"has more than {MOST_FOLDERS:,} folders; the rest was not looked into"
            return
        yield folder, [entry.name for entry in entries]
        if depth < DEEPEST:
            below = [e for e in entries if e.name not in _PASSED_OVER and not e.name.startswith(".") and _is_folder(e)]
            waiting += [(Path(entry.path), depth + 1) for entry in reversed(below)]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _look_into(folder: Path, names: list[str], found: Sources, *, given: bool) -> None:
    if is_run(set(names), folder):
        found.runs.append(folder)
    if "parts" in names and DESCRIPTION not in names and (folder / "parts" / DESCRIPTION).is_file():
        found.left_out[folder] = "these samples are not all made yet"
    for name in names:
        if name.endswith(".json"):
            _take_json(folder / name, found)
    if given or folder in found.samples:
        found.pictures += [folder / name for name in names if name.endswith(".png") and not name.startswith(".")]


def _take_json(path: Path, found: Sources) -> None:
    try:
        if path.stat().st_size > JSON_BYTES:
            return
        content = read_json(path)
    except (FileError, OSError) as e:
        found.left_out[path] = reason(path, e)
        return
    if not isinstance(content, dict):
        return
    if isinstance(content.get("metrics"), dict):
        found.results[path] = content
    elif path.name == DESCRIPTION:
        found.samples[path.parent] = content


def reason(path: Path, error: Exception) -> str:
    """An error's message without the folders of the path that it is about: that path is told beside it."""
    text = str(getattr(error, "strerror", None) or error)
    text = text.replace(f"{path}{os.sep}", "").replace(f"{path.parent}{os.sep}", "")
    for start in ("cannot read image: ", "cannot read ", "image ", f"{path.name}: ", f"{path.name} "):
        text = text.removeprefix(start)
    return text
