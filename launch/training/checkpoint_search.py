"""Which checkpoint of a run to take: the newest that is whole. Nothing is renamed, removed or written here."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from common.files import FileError, path_exists, read_json
from launch.config_files import ConfigError
from launch.training.checkpoint import KEYS, Checkpoint, CheckpointError, by_step

log = logging.getLogger(__name__)

WEIGHTS = ("model", "ema")  # the keys that programs read which do not train


class AllDamagedError(CheckpointError):
    """None of the checkpoints of a run is whole; the message says why for each."""


def newest_whole(found: Sequence[Checkpoint], keys: Iterable[str] = KEYS) -> tuple[Checkpoint, dict[Path, str]]:
    """The first that is whole (see `Checkpoint.verify`), and why those before it are not, by path.

    Raises AllDamagedError where none is.
    """
    damaged: dict[Path, str] = {}
    for each in found:
        try:
            return each.verify(keys), damaged
        except CheckpointError as e:
            damaged[each.path] = str(e)
    raise AllDamagedError(f"no checkpoint in {found[0].path.parent} is whole: {'; '.join(damaged.values())}")


def candidates(path: Path) -> list[Checkpoint]:
    """The checkpoint `path` is, or all of the run whose directory it is, whole or not, the highest step first.

    Raises ConfigError where there are none.
    """
    if not path.is_dir():
        what = "is no directory, which a checkpoint is" if path.exists() else "does not exist"
        raise ConfigError(f"{path} {what}")
    if path_exists(path / "manifest.json") and not _is_latents(path):
        return [Checkpoint(path)]
    found = by_step(path / "checkpoints") or by_step(path)
    if not found:
        raise ConfigError(f"{path} is no checkpoint and has no complete one below it")
    return found


def find_checkpoint(path: Path, keys: Iterable[str] = WEIGHTS) -> Checkpoint:
    """The checkpoint `path` is, or the newest of the run whose directory it is whose state and these keys are whole.

    One that is passed over is logged with the reason and stays as it is. Raises ConfigError where there is none, and
    AllDamagedError where none is whole.
    """
    found = candidates(path)
    if found[0].path == path:
        return found[0]
    whole, damaged = newest_whole(found, keys)
    for reason in damaged.values():
        log.warning("%s: %s is taken instead", reason, whole.path)
    return whole


def _is_latents(path: Path) -> bool:
    """Whether the manifest there is that of a latents directory; a damaged one may be anything."""
    try:
        return "shards" in read_json(path / "manifest.json")
    except (FileError, TypeError):
        return False
