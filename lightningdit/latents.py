"""The latents format: what a tokenizer's extraction writes and a diffusion run reads, and how it is written.

A directory of safetensors shards `latents_rank{RR}_shard{SSS}.safetensors`, each with `latents` and `latents_flip`
(the mirrored images') [N, C, H, W] float32 and `labels` [N] int64; `latents_stats.pt` with `mean` and `std`
[1, C, 1, 1]; and, in ours, `manifest.json` with counts, checksums, where the latents come from, and the statistics.
Sample i of a set is row i of its shards in the order of their names. The published latents are of this format.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

SHARD_NAME = re.compile(r"latents_rank(\d+)_shard(\d+)\.safetensors")
STATISTICS_FILE, MANIFEST_FILE = "latents_stats.pt", "manifest.json"
UNFINISHED_FILE = "unfinished"  # from an extraction's begin to its end: published latents have no manifest either
_DTYPES = {"latents": "F32", "latents_flip": "F32", "labels": "I64"}


class LatentsError(ValueError):
    """A latents directory that is not what it should be; the message names the file."""


@dataclass(frozen=True, eq=False)
class LatentStatistics:
    """Per-channel mean and std [C] float32, and the factor of normalised latents: `(x - mean) / std · multiplier`."""

    mean: torch.Tensor
    std: torch.Tensor
    multiplier: float = 1.0

    @classmethod
    def neutral(cls, channels: int, multiplier: float = 1.0) -> "LatentStatistics":
        """Mean 0 and std 1, for latents that are only scaled."""
        return cls(torch.zeros(channels), torch.ones(channels), multiplier)

    @classmethod
    def from_json(cls, content: dict) -> "LatentStatistics":
        """From what `to_json` gave."""
        return cls(torch.tensor(content["mean"]), torch.tensor(content["std"]), float(content["multiplier"]))

    def to_json(self) -> dict:
        """{"mean": [C], "std": [C], "multiplier": float}, exact."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist(), "multiplier": self.multiplier}

    def denormalise(self, z: torch.Tensor) -> torch.Tensor:
        """From latents [B, C, H, W] as the network sees them to the tokenizer's own, `z · std / multiplier + mean`."""
        mean, std = (v.to(z).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return z * std / self.multiplier + mean


@dataclass(frozen=True)
class Shard:
    """What one shard holds, and where in its file the tensors begin: name → byte offset."""

    path: Path
    count: int
    shape: tuple[int, int, int]
    places: dict[str, int]

    @classmethod
    def read(cls, path: Path) -> "Shard":
        """Parse the safetensors header; raises LatentsError where the file is cut short or holds something else."""
        size = path.stat().st_size
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or 8 + length > size:
                raise LatentsError(f"{path} is truncated: {size:,} bytes do not hold its header")
            try:
                header = json.loads(f.read(length))
            except ValueError:
                raise LatentsError(f"{path} is damaged: its safetensors header cannot be read") from None
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        needed = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if size != needed:
            raise LatentsError(f"{path} is truncated or damaged: {size:,} bytes where its header asks for {needed:,}")
        for name, dtype in _DTYPES.items():
            if name not in entries or entries[name]["dtype"] != dtype:
                raise LatentsError(f"{path} holds {_describe(entries)}; a latents shard has {name} as {dtype}")
        places = {name: 8 + length + entries[name]["data_offsets"][0] for name in _DTYPES}
        shape, flipped, labels = (tuple(entries[name]["shape"]) for name in _DTYPES)
        sizes = [end - start for start, end in (entries[name]["data_offsets"] for name in _DTYPES)]
        values = [4 * math.prod(shape), 4 * math.prod(flipped), 8 * math.prod(labels)]
        if len(shape) != 4 or 0 in shape or shape != flipped or labels != shape[:1] or sizes != values:
            raise LatentsError(f"{path} holds {_describe(entries)}: these do not fit together")
        if any(place % 4 for place in places.values()):
            found = f"tensors that begin at bytes {places}, not at multiples of 4"
            raise LatentsError(f"{path} has {found}; loaded and saved by safetensors 0.3 or later it will do")
        return cls(path, labels[0], shape[1:], places)


def _describe(entries: dict) -> str:
    return ", ".join(f"{name} {e['dtype']} {e['shape']}" for name, e in entries.items()) or "no tensors"


def file_entry(path: Path) -> dict:
    """{"bytes", "sha256"} of a file, for the manifest."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 24):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def read_manifest(directory: Path) -> dict | None:
    """The manifest, or None where there is none, as with published latents.

    Raises LatentsError where it is damaged, or its extraction has not come to an end.
    """
    manifest = _manifest(directory)
    if manifest is None and (directory / UNFINISHED_FILE).exists():
        raise LatentsError(f"{directory} is unfinished: run the extraction again to complete it")
    return manifest


def _manifest(directory: Path) -> dict | None:
    path = directory / MANIFEST_FILE
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise LatentsError(f"{path} is damaged: {e}") from None


def read_statistics(directory: Path, multiplier: float = 1.0) -> LatentStatistics:
    """The set's statistics; raises LatentsError where the file is missing, unreadable or of no use."""
    path = directory / STATISTICS_FILE
    if not path.exists():
        raise LatentsError(f"{path} is missing: latent_norm: true needs the statistics of the latents")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        mean, std = (content[key].float().flatten() for key in ("mean", "std"))
    except Exception as e:  # torch raises many kinds on a damaged file
        raise LatentsError(f"{path} cannot be read as {{mean, std}} tensors: {e}") from None
    if mean.shape != std.shape or not bool(torch.isfinite(mean).all()) or not bool((std > 0).all()):
        raise LatentsError(f"{path} holds mean {mean.tolist()} and std {std.tolist()}: not usable to normalise with")
    return LatentStatistics(mean, std, multiplier)


class LatentsWriter:
    """One process's part of a latents directory: full shards, each complete or not there at all.

        writer = LatentsWriter(directory, rank=rank, identity={...})
        for batch in images[writer.position:]: writer.add(latents, latents_flip, labels)
        writer.close()
        finish(directory, world_size=..., tokenizer=...)     # one process, when all have closed

    A shard counts once its small JSON record lies beside it (`position` then includes it), so an extraction killed at
    any moment goes on where it stopped. identity: what the latents depend on (any JSON); a directory begun under
    another one is refused, and so is one with shards that no writer began, such as a published set.
    """

    def __init__(self, directory: Path | str, *, rank: int = 0, shard_size: int = 10_000, identity: dict | None = None):
        self.directory, self.rank, self.shard_size = Path(directory), rank, shard_size
        self.directory.mkdir(parents=True, exist_ok=True)
        self._identity = json.loads(json.dumps(identity))
        for leftover in self.directory.glob(f".latents_rank{rank:02d}_*.tmp"):
            leftover.unlink()
        records = _records(self.directory)
        _check_identity(self.directory, records, self._identity)
        _claim(self.directory)
        counts = {record["file"]: record["count"] for record in records}
        self.position = self._next_shard = self._filled = 0
        while (name := self._shard_name(self._next_shard)) in counts:
            self.position, self._next_shard = self.position + counts[name], self._next_shard + 1
        self._buffers: dict[str, torch.Tensor] = {}

    def add(self, latents: torch.Tensor, latents_flip: torch.Tensor, labels: torch.Tensor) -> None:
        """Append latents and their mirror images' [b, C, H, W] (stored as float32) with labels [b]."""
        if latents.dim() != 4 or latents.shape != latents_flip.shape or labels.shape != latents.shape[:1]:
            shapes = [tuple(v.shape) for v in (latents, latents_flip, labels)]
            raise ValueError(f"latents, latents_flip, labels have shapes {shapes}; wanted [b, C, H, W] twice and [b]")
        self._allocate(tuple(latents.shape[1:]))
        start = 0
        while start < len(labels):
            taken = min(len(labels) - start, self.shard_size - self._filled)
            for name, value in (("latents", latents), ("latents_flip", latents_flip), ("labels", labels)):
                self._buffers[name][self._filled : self._filled + taken].copy_(value[start : start + taken])
            start, self._filled = start + taken, self._filled + taken
            if self._filled == self.shard_size:
                self._write_shard()

    def close(self) -> None:
        """Write what is left as a last, shorter shard."""
        if self._filled:
            self._write_shard()
        self._buffers = {}

    def _allocate(self, shape: tuple[int, ...]) -> None:
        if not self._buffers:
            for name in ("latents", "latents_flip"):
                self._buffers[name] = torch.empty(self.shard_size, *shape)
            self._buffers["labels"] = torch.empty(self.shard_size, dtype=torch.int64)
        elif shape != (expected := tuple(self._buffers["latents"].shape[1:])):
            raise ValueError(f"latents of shape {shape} after latents of shape {expected}")

    def _shard_name(self, number: int) -> str:
        return f"latents_rank{self.rank:02d}_shard{number:03d}.safetensors"

    def _write_shard(self) -> None:
        tensors = {name: buffer[: self._filled] for name, buffer in self._buffers.items()}
        latents, path = tensors["latents"], self.directory / self._shard_name(self._next_shard)
        if not bool(torch.isfinite(latents).all() & torch.isfinite(tensors["latents_flip"]).all()):
            raise LatentsError(f"{path}: the latents to store are not finite")
        temporary = path.with_name(f".{path.name}.tmp")
        _save(temporary, tensors, {"total_size": str(self._filled), "dtype": "torch.float32", "device": "cpu"})
        record = {"file": path.name, "rank": self.rank, "count": self._filled, "shape": list(latents.shape[1:])}
        record |= {"moments": _moments(latents), "identity": self._identity} | file_entry(temporary)
        _publish(temporary, path)
        _write_json(path.with_suffix(".json"), record)
        self.position += self._filled
        self._next_shard, self._filled = self._next_shard + 1, 0


def finish(directory: Path | str, *, world_size: int = 1, tokenizer: dict | None = None, expected: int | None = None,
           classes: Sequence[str] | None = None) -> dict:
    """Make a directory of closed writers a complete set: statistics file, then `manifest.json` → the manifest.

    The statistics are over all plain latents (not the mirrored ones), std unbiased, merged from float64 sums.
    tokenizer: what made the latents (any JSON, such as name and hash). classes: names, by label. Raises LatentsError
    where shards of a rank are missing, do not fit together, or do not add up to `expected`. Calling it again changes
    nothing.
    """
    directory = Path(directory)
    if (manifest := _manifest(directory)) is not None:
        _tidy(directory, manifest)  # a kill may have come before it
        return manifest
    records = _records(directory)
    known = {record["file"] for record in records}
    strays = [p.name for p in directory.glob("*.safetensors") if p.name not in known]
    if strays or not records:
        what = f"unfinished shards {', '.join(sorted(strays))}" if strays else "no complete shard"
        raise LatentsError(f"{directory} holds {what}; run the extraction again to complete it")
    ranks, shapes = {record["rank"] for record in records}, {tuple(record["shape"]) for record in records}
    count = sum(record["count"] for record in records)
    if max(ranks) >= world_size or len(shapes) > 1 or expected not in (None, count):
        raise LatentsError(
            f"{directory} holds {count} latents of shapes {sorted(shapes)} by ranks {sorted(ranks)}; "
            f"expected {'any number' if expected is None else expected} of one shape by ranks below {world_size}"
        )
    statistics = _merge(record["moments"] for record in records)
    temporary = directory / f".{STATISTICS_FILE}.tmp"
    torch.save({key: torch.tensor(statistics[key]).view(1, -1, 1, 1) for key in ("mean", "std")}, temporary)
    entry = file_entry(temporary)
    _publish(temporary, directory / STATISTICS_FILE)
    manifest = {
        "format": 1, "count": count, "shape": records[0]["shape"], "tokenizer": tokenizer,
        "identity": records[0]["identity"], "statistics": statistics, "files": {STATISTICS_FILE: entry},
        "shards": [{key: r[key] for key in ("file", "rank", "count", "bytes", "sha256")} for r in records],
    }  # fmt: skip
    if classes is not None:
        manifest["classes"] = list(classes)
    _write_json(directory / MANIFEST_FILE, manifest)
    _tidy(directory, manifest)
    return manifest


def _tidy(directory: Path, manifest: dict) -> None:
    """Remove what a complete set has no use for."""
    for shard in manifest["shards"]:
        (directory / shard["file"]).with_suffix(".json").unlink(missing_ok=True)
    (directory / UNFINISHED_FILE).unlink(missing_ok=True)


def _records(directory: Path) -> list[dict]:
    """What is known of the complete shards, in the order of their names."""
    manifest = _manifest(directory)
    if manifest is not None:
        return [shard | {"identity": manifest["identity"]} for shard in manifest["shards"]]
    paths = [p for p in sorted(directory.glob("latents_rank*_shard*.safetensors")) if p.with_suffix(".json").exists()]
    return [json.loads(p.with_suffix(".json").read_text()) for p in paths]


def _claim(directory: Path) -> None:
    """Mark a directory as one that an extraction is writing, unless that has ended."""
    marker = directory / UNFINISHED_FILE
    if marker.exists() or (directory / MANIFEST_FILE).exists():
        return
    if shards := sorted(directory.glob("*.safetensors")):
        raise LatentsError(f"{shards[0]} is of no extraction that could go on here: give an empty directory")
    marker.write_text("These latents are being written, or their extraction was interrupted: run it again.\n")


def _check_identity(directory: Path, records: list[dict], identity) -> None:
    for record in records:
        if record["identity"] != identity:
            raise LatentsError(
                f"{directory / record['file']} belongs to another extraction: {record['identity']}, this one is "
                f"{identity}. Give an empty directory, or delete that one"
            )


def _save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write safetensors with its metadata in the given order: the package shuffles it, and equal runs would differ."""
    header, end = {"__metadata__": metadata}, 0
    ordered = sorted(tensors, key=lambda name: -tensors[name].itemsize)  # keeps every tensor aligned
    for name in ordered:
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": _DTYPES[name], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            f.write(tensors[name].numpy())


def _moments(x: torch.Tensor) -> dict:
    """Count, mean and sum of squared deviations per channel of [N, C, H, W], in float64."""
    x = x.transpose(0, 1).flatten(1)
    means, deviations = [], []
    for channel in x:  # one at a time: the whole in float64 would double the memory of a shard
        channel = channel.double()
        means.append(float(channel.mean()))
        deviations.append(float((channel - channel.mean()).square().sum()))
    return {"count": x.shape[1], "mean": means, "m2": deviations}


def _merge(parts) -> dict:
    """Mean and unbiased std of the union, by the pairwise update of Chan, Golub and LeVeque (1979)."""
    count, mean, m2 = 0, np.zeros(()), np.zeros(())
    for part in parts:
        n, delta = part["count"], np.array(part["mean"]) - mean
        m2 = m2 + np.array(part["m2"]) + delta**2 * count * n / (count + n)
        mean, count = mean + delta * n / (count + n), count + n
    return {"mean": mean.tolist(), "std": np.sqrt(m2 / max(count - 1, 1)).tolist(), "count": count}


def _write_json(path: Path, content) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1))
    _publish(temporary, path)


def _publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name, after its bytes are on the disk."""
    with open(temporary, "rb") as f:
        os.fsync(f.fileno())
    os.replace(temporary, path)
