"""Checkpoints: one directory per step, written under a temporary name and renamed, complete by its manifest.

    step_0000020/
      manifest.json                    every other file with its size and SHA-256
      state.json                       step, seeds, config, versions, op table, counters
      <network>.model.safetensors      weights, published key names, float32
      <network>.{ema,exp_avg,exp_avg_sq}.safetensors

Tensors are whole, not sharded, so any number of processes under any ZeRO stage can go on from them. A damaged one that
was set aside has another name, `step_0000020.damaged`, and is neither read nor removed.
"""

import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from common.files import (
    FileError,
    UnreachableError,
    WriteError,
    file_entry,
    file_status,
    make_directory,
    path_exists,
    rename_directory,
    sha256,
    sync_directory,
    write_error,
    write_json,
)
from common.records import Record, read_record, write_checksummed
from common.tensors import WeightsError, Writable, check_safetensors, read_tensors, write_tensors
from launch.training.checkpoint_state import Manifest, State

log = logging.getLogger(__name__)

KEYS = ("model", "ema", "exp_avg", "exp_avg_sq")  # tensors kept per network

_STEP = re.compile(r"step_(\d{7,})")
_LEFTOVER = re.compile(r"\.(step_\d{7,})\.(tmp|old|removed)")  # of `save` and `prune`; other names are a user's


class CheckpointError(FileError):
    """A checkpoint that is not whole, or not what was asked for."""


#: Bytes and time of the last change (ns) of a file.
Stamp = tuple[int, int]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk; tensors are read when asked for, after their checksum held.

    verified: files whose checksum held a moment ago; it is computed once more where a file's stamp is another.
    """

    path: Path
    verified: Mapping[str, Stamp] = field(default_factory=dict, compare=False)

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

    def verify(self, keys: Iterable[str] = KEYS) -> "Checkpoint":
        """The same checkpoint, whose state and tensors of these keys were found whole; other files have their sizes.

        Raises CheckpointError, naming a file that is not as it was written, and UnreachableError where the system does
        not tell.
        """
        try:
            hashed = [name for name in self.manifest.files if name.split(".")[1] in ("json", *keys)]
            for name in self.manifest.files.keys() - hashed:
                self._present(name)
            with ThreadPoolExecutor(4) as pool:  # hashing leaves the interpreter to other threads
                found = Checkpoint(self.path, dict(zip(hashed, pool.map(self._verify, hashed), strict=True)))
            _ = found.state
        except (CheckpointError, UnreachableError):
            raise
        except FileError as e:
            raise CheckpointError(str(e)) from None
        return found

    def _verify(self, name: str) -> Stamp:
        _, stamp = self._present(name)  # before it is read: what changes it then gives it another
        path = self._checked(name)
        if name.endswith(".safetensors"):
            check_safetensors(path)
        return stamp

    def _checked(self, name: str) -> Path:
        """The path of a file whose checksum holds."""
        path, stamp = self._present(name)
        wanted = self.manifest.files[name].sha256
        if self.verified.get(name) != stamp and (found := sha256(path)) != wanted:
            raise CheckpointError(f"{path} has SHA-256 {found} where the manifest says {wanted}: damaged")
        return path

    def _present(self, name: str) -> tuple[Path, Stamp]:
        """The path of a file that is there in its size, and its stamp."""
        path, entry = self.path / name, self.manifest.files.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path} has no {name}; it has {', '.join(sorted(self.manifest.files))}")
        if not path_exists(path):
            raise CheckpointError(f"{path} is missing though the manifest lists it")
        status = file_status(path)
        if status.st_size != entry.bytes:
            size = status.st_size
            raise CheckpointError(f"{path} has {size:,} bytes where the manifest says {entry.bytes:,}: cut short?")
        return path, (status.st_size, status.st_mtime_ns)


def _names(networks: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(networks))) or "none"


def _read(path: Path, record: type[Record]) -> Any:
    try:
        return read_record(path, record)
    except UnreachableError:
        raise
    except FileError as e:
        raise CheckpointError(str(e)) from None


def save(directory: Path, state: dict, networks: Mapping[str, Mapping[str, Writable]]) -> Path:
    """Write the checkpoint of `state["step"]` below `directory` and return its path.

    `networks` holds network → key → name → tensor; parts of tensors are asked for in this order. A kill at any moment
    leaves the earlier checkpoints and at most a temporary directory, which `clean_up` and the next save remove. A
    checkpoint of the same step is replaced.

    Raises WriteError, naming the file, where the system refuses; the earlier checkpoints are then untouched.
    """
    make_directory(directory)
    final = directory / f"step_{state['step']:07d}"
    temporary = directory / f".{final.name}.tmp"
    files: dict[str, dict] = {}
    try:
        with _writing(final):
            clean_up(directory)
            temporary.mkdir()
            for network, keys in networks.items():
                for key, tensors in keys.items():
                    name = f"{network}.{key}.safetensors"
                    files[name] = write_tensors(temporary / name, tensors)
            write_json(temporary / "state.json", state)
            files["state.json"] = file_entry(temporary / "state.json")
            content = {"format": 1, "step": state["step"], "files": dict(sorted(files.items()))}
            write_checksummed(temporary / "manifest.json", content)
            if path_exists(final):
                os.replace(final, directory / f".{final.name}.old")
            os.replace(temporary, final)
            sync_directory(directory)
    except Exception:
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
    for found in by_step(directory):
        if path_exists(found.path / "manifest.json"):
            return found
        log.warning("%s has no manifest.json: it is not complete and is left aside", found.path)
    return None


def prune(directory: Path, keep: int, keep_every: int | None = None) -> None:
    """Remove all but the `keep` checkpoints of the highest steps, and those of every `keep_every` steps."""
    for old in by_step(directory)[keep:]:
        path = old.path
        if keep_every is not None and step_of(path) % keep_every == 0:
            continue
        # Renamed first: half a removal must not look like a checkpoint.
        doomed = path.with_name(f".{path.name}.removed")
        with _writing(path):
            os.replace(path, doomed)
        _remove(doomed)


def set_aside(path: Path, suffix: str = "damaged") -> Path:
    """Give a checkpoint a name that is none of a checkpoint's, so that it is never read nor removed → its path.

    Raises WriteError where the system refuses.
    """
    for number in itertools.count(1):
        aside = path.with_name(f"{path.name}.{suffix}" + (f".{number}" if number > 1 else ""))
        if not path_exists(aside):
            rename_directory(path, aside)
            return aside
    raise AssertionError


def by_step(directory: Path) -> list[Checkpoint]:
    """The checkpoints below `directory`, complete or not, the highest step first."""
    entries = directory.iterdir() if path_exists(directory) else ()
    paths = sorted((p for p in entries if _STEP.fullmatch(p.name)), key=step_of, reverse=True)
    return [Checkpoint(path) for path in paths]


def step_of(path: Path) -> int:
    """By its name, whatever is in it."""
    return int(path.name.removeprefix("step_"))
