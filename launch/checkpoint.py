"""Checkpoints: one directory per step, written under a temporary name and renamed, complete by its manifest.

    step_0000020/
      manifest.json                    every other file with its size and SHA-256
      state.json                       step, seeds, config, versions, op table, counters
      <network>.model.safetensors      weights, published key names, float32
      <network>.{ema,exp_avg,exp_avg_sq}.safetensors

Tensors are whole, not sharded, so any number of processes under any ZeRO stage can go on from them.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

KEYS = ("model", "ema", "exp_avg", "exp_avg_sq")  # tensors kept per network

_STEP = re.compile(r"step_(\d{7,})")
_BLOCK = 1 << 24


class CheckpointError(ValueError):
    """A checkpoint that is not whole, or not what was asked for."""


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, content) -> None:
    """Write JSON so that readers see the old file or the whole new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as f:
        json.dump(content, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk; tensors are read when asked for, after their checksum held."""

    path: Path

    @cached_property
    def manifest(self) -> dict:
        try:
            return json.loads((self.path / "manifest.json").read_text())
        except OSError:
            raise CheckpointError(f"{self.path} has no manifest.json: no checkpoint, or not a complete one "
                                  "(weights alone go into train.weight_init)") from None
        except ValueError as e:
            raise CheckpointError(f"{self.path / 'manifest.json'} is damaged: {e}") from None

    @cached_property
    def state(self) -> dict:
        return json.loads(self._checked("state.json").read_text())

    @property
    def step(self) -> int:
        return self.state["step"]

    def tensors(self, network: str, key: str = "model") -> dict[str, torch.Tensor]:
        """`model`, `ema`, `exp_avg` or `exp_avg_sq` of one network, by published parameter name.

        Raises CheckpointError where the file is missing, cut short or changed.
        """
        return load_file(self._checked(f"{network}.{key}.safetensors"))

    def weights(self, network: str, key: str) -> dict[str, torch.Tensor]:
        """The whole state dict with trained weights taken from `key` (`ema` or `model`)."""
        return self.tensors(network) | (self.tensors(network, key) if key != "model" else {})

    def _checked(self, name: str) -> Path:
        path, entry = self.path / name, self.manifest["files"].get(name)
        if entry is None:
            raise CheckpointError(f"{self.path} has no {name}; it has {', '.join(sorted(self.manifest['files']))}")
        if not path.exists():
            raise CheckpointError(f"{path} is missing though the manifest lists it")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{path} has {size:,} bytes where the manifest says {entry['bytes']:,}: cut short?")
        if (found := sha256(path)) != entry["sha256"]:
            raise CheckpointError(f"{path} has SHA-256 {found} where the manifest says {entry['sha256']}: damaged")
        return path


def save(directory: Path, state: dict, networks: dict[str, dict[str, dict[str, torch.Tensor]]]) -> Path:
    """Write the checkpoint of `state["step"]` below `directory` and return its path.

    `networks` holds network → key → name → tensor. A kill at any moment leaves the earlier checkpoints and at most a
    temporary directory, which the next save removes. A checkpoint of the same step is replaced.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(".step_*"):
        shutil.rmtree(leftover)
    final = directory / f"step_{state['step']:07d}"
    temporary = directory / f".{final.name}.tmp"
    temporary.mkdir()
    for network, keys in networks.items():
        for key, tensors in keys.items():
            save_file(tensors, temporary / f"{network}.{key}.safetensors")
    write_json(temporary / "state.json", state)
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(temporary.iterdir())}
    write_json(temporary / "manifest.json", {"format": 1, "step": state["step"], "files": files})
    for path in (*temporary.iterdir(), temporary):
        _sync(path)
    if final.exists():
        os.replace(final, directory / f".{final.name}.old")
    os.replace(temporary, final)
    _sync(directory)
    shutil.rmtree(directory / f".{final.name}.old", ignore_errors=True)
    return final


def newest(directory: Path) -> Checkpoint | None:
    """The checkpoint of the highest step below `directory`, or None. Neither size nor time of a file matters."""
    steps = {int(m[1]): p for p in _entries(directory) if (m := _STEP.fullmatch(p.name))}
    return Checkpoint(steps[max(steps)]) if steps else None


def prune(directory: Path, keep: int) -> None:
    """Remove all but the `keep` checkpoints of the highest steps."""
    ordered = sorted((p for p in _entries(directory) if _STEP.fullmatch(p.name)), key=lambda p: int(p.name[5:]))
    for path in ordered[:-keep]:
        # Renamed first: half a removal must not look like a checkpoint.
        doomed = path.with_name(f".{path.name}.old")
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def _entries(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
