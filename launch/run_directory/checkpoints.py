"""The checkpoints of a run, looked at without changing them: which are whole, which are damaged or set aside."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import FileError, sha256
from launch.config_files import ConfigError
from launch.training.checkpoint import Checkpoint

_STEP = re.compile(r"step_(\d{7,})")
_OTHER = re.compile(r"\.?step_(\d{7,})\..+")


@dataclass(frozen=True)
class CheckpointList:
    """What lies in the folder of a run's checkpoints.

    Fields:
        whole: those whose files are there with the sizes of the manifest, by step.
        damaged: name → why, of those that are not, and of those that were set aside.
        temporary: names of what is being written, or was when its process was killed.
    """

    whole: tuple[Checkpoint, ...] = ()
    damaged: tuple[tuple[str, str], ...] = ()
    temporary: tuple[str, ...] = ()

    @property
    def newest(self) -> Checkpoint | None:
        return self.whole[-1] if self.whole else None


def list_checkpoints(folder: Path, *, verify: bool = False) -> CheckpointList:
    """The checkpoints in `folder`; none where it is absent or cannot be read. verify: also compare checksums."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError:
        return CheckpointList()
    whole, damaged, temporary = [], [], []
    for name in names:
        if _STEP.fullmatch(name):
            problem = find_problem(checkpoint := Checkpoint(folder / name), verify=verify)
            if problem is None:
                whole.append(checkpoint)
            else:
                damaged.append((name, problem))
        elif _OTHER.fullmatch(name):
            if name.startswith("."):
                temporary.append(name)
            else:
                damaged.append((name, "set aside"))
    return CheckpointList(tuple(sorted(whole, key=lambda each: each.step)), tuple(damaged), tuple(temporary))


def find_problem(checkpoint: Checkpoint, *, verify: bool = False) -> str | None:
    """What is wrong with a checkpoint, in a line, or None. verify: also compare checksums, which reads all of it."""
    try:
        for name, entry in checkpoint.manifest.files.items():
            path = checkpoint.path / name
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != entry.bytes:
                return f"{name} has {size:,} bytes of {entry.bytes:,}"
            if verify and sha256(path) != entry.sha256:
                return f"{name} has another SHA-256 than the manifest says"
    except FileError as e:
        return str(e).replace(f"{checkpoint.path}{os.sep}", "").replace(f"{checkpoint.path} ", "")
    except OSError as e:
        return f"cannot be read: {e.strerror or e}"
    return None


def stored_state(checkpoints: CheckpointList) -> dict[str, Any] | None:
    """`state.json` of the newest whole checkpoint whose own is undamaged, or None."""
    for checkpoint in reversed(checkpoints.whole):
        try:
            return checkpoint.state
        except (FileError, ConfigError, OSError):
            continue
    return None
