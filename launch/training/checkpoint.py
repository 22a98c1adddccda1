"""Checkpoints: one directory per step, written under a temporary name and renamed, complete by its manifest.

    step_0000020/
      manifest.json                    every other file with its size and SHA-256
      state.json                       step, seeds, config, versions, op table, counters
      <network>.model.safetensors      weights, published key names, float32
      <network>.{ema,exp_avg,exp_avg_sq}.safetensors

Tensors are whole, not sharded, so any number of processes under any ZeRO stage can go on from them.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from common.files import (
    FileError,
    WriteError,
    file_entry,
    make_directory,
    path_exists,
    read_json,
    sha256,
    sync_directory,
    write_error,
    write_json,
)
from common.records import Record, read_record, write_checksummed
from common.tensors import WeightsError, read_tensors, write_tensors
from launch.config_files import ConfigError
from launch.training.checkpoint_state import Manifest, State

log = logging.getLogger(__name__)

KEYS = ("model", "ema", "exp_avg", "exp_avg_sq")  # tensors kept per network

_STEP = re.compile(r"step_(\d{7,})")
_LEFTOVER = re.compile(r"\.(step_\d{7,})\.(tmp|old|removed)")  # of `save` and `prune`; other names are a user's


class CheckpointError(FileError):
    """A checkpoint that is not whole, or not what was asked for."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk; tensors are read when asked for, after their checksum held."""

    path: Path

    @cached_property
    def manifest(self) -> Manifest:
        path = self.path / "manifest.json"
        if not path_exists(path):
            raise CheckpointError(
                f"{self.path} has no manifest.json: no checkpoint, or not a complete one "
                "(weights alone go into train.weight_init)"
            )
        found = _read(path, Manifest)
        named = _STEP.fullmatch(self.path.name)
        if named and int(named[1]) != found.step:
            raise CheckpointError(f"{path} says step {found.step}, which is not that of its directory's name")
        return found

    @cached_property
    def state(self) -> dict:
        """The state that `save` was given, validated as `State`."""
        path = self._checked("state.json")
        state = _read(path, State)
        if state.step != self.manifest.step:
            raise CheckpointError(f"{path} says step {state.step}, manifest.json {self.manifest.step}")
        networks = {name.partition(".")[0] for name in self.manifest.files if name.endswith(".safetensors")}
        if networks != state.counters.keys():
            raise CheckpointError(
                f"{path} has counters of {_names(state.counters)}, but the checkpoint's networks are {_names(networks)}"
            )
        return json.loads(path.read_text("utf-8"))

    @property
    def step(self) -> int:
        return self.manifest.step

    def tensors(self, network: str, key: str = "model") -> dict[str, torch.Tensor]:
        """`model`, `ema`, `exp_avg` or `exp_avg_sq` of one network, by published parameter name.

        Raises CheckpointError where the file is missing, cut short, changed, or no file of tensors.
        """
        try:
            return read_tensors(self._checked(self._tensors_path(network, key).name))
        except WeightsError as e:
            raise CheckpointError(str(e)) from None

    def weights(self, network: str, key: str) -> dict[str, torch.Tensor]:
        """The whole state dict with trained weights taken from `key` (`ema` or `model`).

        Raises CheckpointError where one is not finite.
        """
        state_dict = self.tensors(network) | (self.tensors(network, key) if key != "model" else {})
        self._require_finite(network, key, state_dict)
        return state_dict

    def _tensors_path(self, network: str, key: str) -> Path:
        return self.path / f"{network}.{key}.safetensors"

    def _require_finite(self, network: str, key: str, tensors: dict[str, torch.Tensor]) -> None:
        wrong = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
        if wrong:
            path = self._tensors_path(network, key)
            raise CheckpointError(f"{path} has values that are not finite, such as in {wrong[0]}")

    def states(self, network: str, shapes: dict[str, torch.Size]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Each of `KEYS` with its tensors, one at a time: together they are four times the model in host memory.

        Raises CheckpointError where they are not those of trained parameters of these names and shapes.
        """
        for key in KEYS:
            tensors = self.tensors(network, key)
            wrong = [name for name, shape in shapes.items() if name not in tensors or tensors[name].shape != shape]
            if wrong:
                path = self._tensors_path(network, key)
                raise CheckpointError(
                    f"{path} lacks {len(wrong)} parameters that this run trains, such as {wrong[0]} "
                    f"{list(shapes[wrong[0]])}"
                )
            self._require_finite(network, key, tensors)
            if key == "exp_avg_sq" and any((value < 0).any() for value in tensors.values()):
                raise CheckpointError(f"{self._tensors_path(network, key)} has negative averages of squares")
            yield key, tensors

    def _checked(self, name: str) -> Path:
        path, entry = self.path / name, self.manifest.files.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path} has no {name}; it has {', '.join(sorted(self.manifest.files))}")
        if not path_exists(path):
            raise CheckpointError(f"{path} is missing though the manifest lists it")
        size = path.stat().st_size
        if size != entry.bytes:
            raise CheckpointError(f"{path} has {size:,} bytes where the manifest says {entry.bytes:,}: cut short?")
        if (found := sha256(path)) != entry.sha256:
            raise CheckpointError(f"{path} has SHA-256 {found} where the manifest says {entry.sha256}: damaged")
        return path


def _names(networks: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(networks))) or "none"


def _read(path: Path, record: type[Record]) -> Any:
    try:
        return read_record(path, record)
    except FileError as e:
        raise CheckpointError(str(e)) from None


def save(directory: Path, state: dict, networks: dict[str, dict[str, dict[str, torch.Tensor]]]) -> Path:
    """Write the checkpoint of `state["step"]` below `directory` and return its path.

    `networks` holds network → key → name → tensor. A kill at any moment leaves the earlier checkpoints and at most a
    temporary directory, which `clean_up` and the next save remove. A checkpoint of the same step is replaced.

    Raises WriteError, naming the file, where the system refuses; the earlier checkpoints are then untouched.
    """
    make_directory(directory)
    final = directory / f"step_{state['step']:07d}"
    temporary = directory / f".{final.name}.tmp"
    try:
        with _writing(final):
            clean_up(directory)
            temporary.mkdir()
            for network, keys in networks.items():
                for key, tensors in keys.items():
                    write_tensors(temporary / f"{network}.{key}.safetensors", tensors)
            write_json(temporary / "state.json", state)
            files = {p.name: file_entry(p) for p in sorted(temporary.iterdir())}
            write_checksummed(temporary / "manifest.json", {"format": 1, "step": state["step"], "files": files})
            if path_exists(final):
                os.replace(final, directory / f".{final.name}.old")
            os.replace(temporary, final)
            sync_directory(directory)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)  # what it takes up may be what is lacking
        raise
    shutil.rmtree(directory / f".{final.name}.old", ignore_errors=True)
    return final


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Name `path` where the system refuses something that has not been named yet."""
    try:
        yield
    except WriteError:
        raise
    except OSError as e:
        raise write_error(path, e) from None


def clean_up(directory: Path) -> None:
    """Remove what a kill left of a save or of `prune`, and put back a checkpoint that was about to be replaced."""
    for leftover in directory.iterdir():
        named = _LEFTOVER.fullmatch(leftover.name)
        if named is None:
            continue
        final = directory / named[1]
        if named[2] == "old" and not path_exists(final):
            os.replace(leftover, final)
        else:
            _remove(leftover)


def _remove(path: Path) -> None:
    """Remove a directory, or the link to one; raises WriteError where the system refuses."""
    with _writing(path):
        if path.is_symlink() or path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path)


def newest(directory: Path) -> Checkpoint | None:
    """The checkpoint of the highest step below `directory`, or None. Neither size nor time of a file matters.

    One without a manifest, such as a copy that was cut short, does not count, and this is logged.
    """
    for path in reversed(_by_step(directory)):
        if path_exists(path / "manifest.json"):
            return Checkpoint(path)
        log.warning("%s has no manifest.json: it is not complete and is left aside", path)
    return None


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint `path` is, or the newest of the run whose directory it is; raises ValueError on neither."""
    if not path.is_dir():
        what = "is no directory, which a checkpoint is" if path.exists() else "does not exist"
        raise ConfigError(f"{path} {what}")
    if path_exists(path / "manifest.json") and not _is_latents(path):
        return Checkpoint(path)
    found = newest(path / "checkpoints") or newest(path)
    if found is None:
        raise ConfigError(f"{path} is no checkpoint and has no complete one below it")
    return found


def _is_latents(path: Path) -> bool:
    """Whether the manifest there is that of a latents directory; a damaged one may be anything."""
    try:
        return "shards" in read_json(path / "manifest.json")
    except (FileError, TypeError):
        return False


def prune(directory: Path, keep: int) -> None:
    """Remove all but the `keep` checkpoints of the highest steps."""
    for path in _by_step(directory)[:-keep]:
        # Renamed first: half a removal must not look like a checkpoint.
        doomed = path.with_name(f".{path.name}.removed")
        with _writing(path):
            os.replace(path, doomed)
        _remove(doomed)


def _by_step(directory: Path) -> list[Path]:
    """Directories of checkpoints, complete or not, in the order of their steps."""
    entries = directory.iterdir() if path_exists(directory) else ()
    return sorted((p for p in entries if _STEP.fullmatch(p.name)), key=lambda p: int(p.name.removeprefix("step_")))
