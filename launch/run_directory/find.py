"""Find the directories of runs below a directory."""

import os
from collections.abc import Iterator
from pathlib import Path

from launch.run_directory import rows
from launch.runtime import run_lock

LAST_EXIT = "last_exit.json"
CHECKPOINTS = "checkpoints"
#: Folders of a run that hold no other run.
_PARTS = {CHECKPOINTS, "tensorboard", "__pycache__"}


def find_runs(directory: Path) -> Iterator[Path]:
    """Directories of runs at and below `directory`, at any depth, by name; links are followed, each folder once.

    Folders that cannot be read are left out.
    """
    waiting, seen = [directory], set()
    while waiting:
        folder = waiting.pop()
        try:
            identity = (status := os.stat(folder)).st_dev, status.st_ino
            entries = [] if identity in seen else sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            continue
        seen.add(identity)
        if is_run({entry.name for entry in entries}, folder):
            yield folder
        below = (entry for entry in entries if entry.name not in _PARTS and _is_folder(entry))
        waiting += [Path(entry.path) for entry in reversed(list(below))]


def is_run(names: set[str], folder: Path) -> bool:
    """Whether a folder with entries of these names is a run's: it has logged, saved or ended, or just begins."""
    if rows.NAME in names or LAST_EXIT in names:
        return True
    if CHECKPOINTS in names:
        try:
            return any("step_" in name for name in os.listdir(folder / CHECKPOINTS))
        except OSError:
            return False
    return run_lock.NAME in names and names <= {run_lock.NAME, *_PARTS}


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
