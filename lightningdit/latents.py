"""The latents format: what a tokenizer's extraction writes and a diffusion run reads, and how it is written.

A directory of safetensors shards `latents_rank{RR}_shard{SSS}.safetensors`, each with `latents` and `latents_flip`
(the mirrored images') [N, C, H, W] float32 and `labels` [N] int64; `latents_stats.pt` with `mean` and `std`
[1, C, 1, 1]; and, in ours, `manifest.json` with counts, checksums, names of the classes, where the latents come from,
and the statistics.
Sample i of a set is row i of its shards in the order of their names. The published latents are of this format.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
import torch
from pydantic import Field, StringConstraints, TypeAdapter

from common.files import (
    FileError,
    FileRecord,
    Record,
    file_entry,
    make_directory,
    open_regular,
    read_record,
    refuse_stand_ins,
    write_json,
    write_sealed,
    write_text,
)
from common.tensors import WeightsError, read_tensors, save_pickled, write_tensors

SHARD_NAME = re.compile(r"latents_rank(\d+)_shard(\d+)\.safetensors")
STATISTICS_FILE, MANIFEST_FILE = "latents_stats.pt", "manifest.json"
UNFINISHED_FILE = "unfinished"  # from an extraction's begin to its end: published latents have no manifest either
HEADER_LIMIT = 2**20  # bytes; that of a shard has some hundred
_DTYPES = {"latents": "F32", "latents_flip": "F32", "labels": "I64"}


Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class LatentsError(FileError):
    """A latents directory that is not what it should be; the message names the file."""


class StatisticsRecord(Record):
    """Statistics of latents in a JSON file, per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    multiplier: float = 1.0


class ShardRecord(FileRecord):
    """A shard as a manifest lists it: by a name of the format, never by a path."""

    file: Annotated[str, StringConstraints(pattern=f"^{SHARD_NAME.pattern}$")]
    rank: Count
    count: Positive


class Moments(Record):
    """What the statistics of one shard's latents come from: count, mean and sum of squared deviations per channel."""

    count: Positive
    mean: tuple[float, ...]
    m2: tuple[float, ...]


class FinishedShard(ShardRecord):
    """The JSON beside a shard of an extraction that has not ended."""

    shape: tuple[Positive, Positive, Positive]
    moments: Moments
    identity: Any


class Manifest(Record):
    """`manifest.json` of a latents directory."""

    format: Annotated[int, Field(ge=1, le=1)]
    count: Positive
    shape: tuple[Positive, Positive, Positive]
    tokenizer: Any
    identity: Any
    classes: tuple[str, ...] | None = None
    statistics: Any
    files: dict[Annotated[str, StringConstraints(pattern=f"^{re.escape(STATISTICS_FILE)}$")], FileRecord]
    shards: tuple[ShardRecord, ...] = Field(min_length=1)


@dataclass(frozen=True, eq=False)
class LatentStatistics:
    """Per-channel mean and std [C] float32, and the factor of normalised latents: `(x - mean) / std · multiplier`."""

    mean: torch.Tensor
    std: torch.Tensor
    multiplier: float = 1.0

    def checked(self, source: Path | str) -> "LatentStatistics":
        """Itself; raises LatentsError, naming `source`, where latents cannot be normalised with it."""
        shaped = self.mean.dim() == 1 and self.mean.shape == self.std.shape and len(self.mean) > 0
        finite = shaped and bool(torch.isfinite(torch.stack([self.mean, self.std])).all())
        if not finite or not bool((self.std > 0).all()) or not 0 < self.multiplier < math.inf:
            raise LatentsError(f"{source} has mean {self.mean.tolist()}, std {self.std.tolist()}, multiplier "
                               f"{self.multiplier}: not usable to normalise with")
        return self

    @classmethod
    def neutral(cls, channels: int, multiplier: float = 1.0) -> "LatentStatistics":
        """Mean 0 and std 1, for latents that are only scaled."""
        return cls(torch.zeros(channels), torch.ones(channels), multiplier)

    @classmethod
    def from_record(cls, record: StatisticsRecord, source: Path | str) -> "LatentStatistics":
        """From what `to_json` gave; raises LatentsError, naming `source`, where it is of no use."""
        mean, std = (torch.tensor(values, dtype=torch.float32) for values in (record.mean, record.std))
        return cls(mean, std, record.multiplier).checked(source)

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
        with open_shard(path) as f:
            size = os.fstat(f.fileno()).st_size
            begin = f.read(8)
            length = int.from_bytes(begin, "little")
            if size < 8 or 8 + length > size:
                refuse_stand_ins(path, begin + f.read(100))
                raise LatentsError(f"{path} is truncated: {size:,} bytes do not hold its header")
            if length > HEADER_LIMIT:
                raise LatentsError(f"{path} is no latents shard: its header has {length:,} bytes")
            text = f.read(length)
        header = _parse_header(path, text)
        if size != (needed := 8 + length + max((entry.data_offsets[1] for entry in header.values()), default=0)):
            raise LatentsError(f"{path} is truncated or damaged: {size:,} bytes where its header asks for {needed:,}")
        for name, dtype in _DTYPES.items():
            if name not in header or header[name].dtype != dtype:
                raise LatentsError(f"{path} holds {_describe(header)}; a latents shard has {name} as {dtype}")
        entries = {name: header[name] for name in _DTYPES}
        places = {name: 8 + length + entry.data_offsets[0] for name, entry in entries.items()}
        shape, flipped, labels = (entry.shape for entry in entries.values())
        sizes = [end - start for start, end in (entry.data_offsets for entry in entries.values())]
        values = [4 * math.prod(shape), 4 * math.prod(flipped), 8 * math.prod(labels)]
        if len(shape) != 4 or 0 in shape or shape != flipped or labels != shape[:1] or sizes != values:
            raise LatentsError(f"{path} holds {_describe(entries)}: these do not fit together")
        if any(place % 4 for place in places.values()):
            found = f"tensors that begin at bytes {places}, not at multiples of 4"
            raise LatentsError(f"{path} has {found}; loaded and saved by safetensors 0.3 or later it will do")
        return cls(path, labels[0], shape[1:], places)

    def latents(self) -> torch.Tensor:
        """The plain latents, [N, C, H, W] float32, read whole."""
        return self._tensor("latents", np.float32).view(self.count, *self.shape)

    def labels(self) -> torch.Tensor:
        """[N] int64."""
        return self._tensor("labels", np.int64)

    def _tensor(self, name: str, dtype: type) -> torch.Tensor:
        count = self.count * (1 if name == "labels" else math.prod(self.shape))
        with open_shard(self.path) as f:
            f.seek(self.places[name])
            return torch.from_numpy(np.fromfile(f, dtype, count))


def open_shard(path: Path) -> BinaryIO:
    """Open a shard for reading; raises LatentsError where it is no regular file."""
    try:
        return open_regular(path)
    except FileError as e:
        raise LatentsError(str(e)) from None


class HeaderEntry(Record):
    """A tensor in a safetensors header."""

    dtype: str
    shape: tuple[Count, ...]
    data_offsets: tuple[Count, Count]


_HEADER = TypeAdapter(dict[str, HeaderEntry])


def _parse_header(path: Path, text: bytes) -> "dict[str, HeaderEntry]":
    try:
        content = json.loads(text)
        content.pop("__metadata__", None)
        return _HEADER.validate_json(json.dumps(content))
    except (ValueError, RecursionError, AttributeError):
        raise LatentsError(f"{path} is damaged: its safetensors header cannot be read") from None


def _describe(entries: "dict[str, HeaderEntry]") -> str:
    return ", ".join(f"{name} {e.dtype} {list(e.shape)}" for name, e in entries.items()) or "no tensors"


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest, or None where there is none, as with published latents.

    Raises LatentsError where it is damaged, or its extraction has not come to an end.
    """
    manifest = _manifest(directory)
    if manifest is None and (directory / UNFINISHED_FILE).exists():
        raise LatentsError(f"{directory} is unfinished: run the extraction again to complete it")
    return manifest


def _manifest(directory: Path) -> Manifest | None:
    path = directory / MANIFEST_FILE
    return _read_record(path, Manifest) if os.path.lexists(path) else None


def _read_record(path: Path, record: type[Record]) -> Any:
    try:
        return read_record(path, record)
    except FileError as e:
        raise LatentsError(str(e)) from None


def read_statistics(directory: Path, multiplier: float = 1.0) -> LatentStatistics:
    """The set's statistics; raises LatentsError where the file is missing, unreadable or of no use."""
    path = directory / STATISTICS_FILE
    if not os.path.lexists(path):
        raise LatentsError(f"{path} is missing: latent_norm: true needs the statistics of the latents. Make it with "
                           f"`python -m launch extract --statistics {directory}`")
    try:
        content = read_tensors(path, ())
        mean, std = (content[key].float().flatten() for key in ("mean", "std"))
    except (WeightsError, KeyError) as e:
        raise LatentsError(f"{path} cannot be read as {{mean, std}} tensors: {e}") from None
    return LatentStatistics(mean, std, multiplier).checked(path)


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
        make_directory(self.directory)
        self._identity = json.loads(json.dumps(identity))
        for leftover in self.directory.glob(f".latents_rank{rank:02d}_*.tmp"):
            leftover.unlink()
        counts = self._finished_shards()
        _claim(self.directory)
        self.position = self._next_shard = self._filled = 0
        while (name := self._shard_name(self._next_shard)) in counts:
            self.position, self._next_shard = self.position + counts[name], self._next_shard + 1
        self._buffers: dict[str, torch.Tensor] = {}

    def _finished_shards(self) -> dict[str, int]:
        """Name → latents of each shard that is there; raises LatentsError where another extraction made one."""
        if (manifest := _manifest(self.directory)) is not None:
            shards, identities = manifest.shards, [manifest.identity] * len(manifest.shards)
        else:
            shards = _records(self.directory)
            identities = [record.identity for record in shards]
        for shard, identity in zip(shards, identities, strict=True):
            if identity != self._identity:
                raise LatentsError(
                    f"{self.directory / shard.file} belongs to another extraction: {identity}, this one is "
                    f"{self._identity}. Give an empty directory, or delete that one"
                )
        return {shard.file: shard.count for shard in shards}

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
        # The published files' metadata.
        write_tensors(path, tensors, {"total_size": str(self._filled), "dtype": "torch.float32", "device": "cpu"})
        record = {"file": path.name, "rank": self.rank, "count": self._filled, "shape": list(latents.shape[1:])}
        record |= {"moments": _moments(latents).model_dump(), "identity": self._identity} | file_entry(path)
        write_json(path.with_suffix(".json"), record)
        self.position += self._filled
        self._next_shard, self._filled = self._next_shard + 1, 0


def finish(directory: Path | str, *, world_size: int = 1, tokenizer: dict | None = None, expected: int | None = None,
           classes: Sequence[str] | None = None) -> Manifest:
    """Make a directory of closed writers a complete set: statistics file, then `manifest.json` → the manifest.

    The statistics are over all plain latents (not the mirrored ones), std unbiased, merged from float64 sums.
    tokenizer: what made the latents (any JSON, such as name and hash). classes: names of the labels. Raises
    LatentsError where shards of a rank are missing, do not fit together, or do not add up to `expected`. Calling it
    again changes nothing.
    """
    directory = Path(directory)
    if (manifest := _manifest(directory)) is not None:
        _tidy(directory, manifest)  # a kill may have come before it
        return manifest
    records = _records(directory)
    known = {record.file for record in records}
    strays = [p.name for p in directory.glob("*.safetensors") if p.name not in known]
    if strays or not records:
        what = f"unfinished shards {', '.join(sorted(strays))}" if strays else "no complete shard"
        raise LatentsError(f"{directory} holds {what}; run the extraction again to complete it")
    ranks, shapes = {record.rank for record in records}, {record.shape for record in records}
    count = sum(record.count for record in records)
    if max(ranks) >= world_size or len(shapes) > 1 or expected not in (None, count):
        raise LatentsError(
            f"{directory} holds {count} latents of shapes {sorted(shapes)} by ranks {sorted(ranks)}; "
            f"expected {'any number' if expected is None else expected} of one shape by ranks below {world_size}"
        )
    statistics = merge_moments(record.moments for record in records)
    write_statistics(directory, statistics)
    write_sealed(directory / MANIFEST_FILE, {
        "format": 1, "count": count, "shape": records[0].shape, "tokenizer": tokenizer,
        "identity": records[0].identity, "classes": None if classes is None else list(classes),
        "statistics": statistics, "files": {STATISTICS_FILE: file_entry(directory / STATISTICS_FILE)},
        "shards": [record.model_dump(include=set(ShardRecord.model_fields)) for record in records],
    })  # fmt: skip
    manifest = _manifest(directory)
    _tidy(directory, manifest)
    return manifest


def write_statistics(directory: Path, statistics: dict) -> None:
    """Write `latents_stats.pt` of {"mean", "std"} per channel."""
    tensors = {key: torch.tensor(statistics[key]).view(1, -1, 1, 1) for key in ("mean", "std")}
    save_pickled(directory / STATISTICS_FILE, tensors)


def _tidy(directory: Path, manifest: Manifest) -> None:
    """Remove what a complete set has no use for."""
    for shard in manifest.shards:
        (directory / shard.file).with_suffix(".json").unlink(missing_ok=True)
    (directory / UNFINISHED_FILE).unlink(missing_ok=True)


def _records(directory: Path) -> "list[FinishedShard]":
    """What is known of the complete shards of an extraction that goes on, in the order of their names."""
    paths = [p for p in sorted(directory.glob("latents_rank*_shard*.safetensors")) if p.with_suffix(".json").exists()]
    records = [_read_record(p.with_suffix(".json"), FinishedShard) for p in paths]
    for path, record in zip(paths, records, strict=True):
        if record.file != path.name:
            raise LatentsError(f"{path.with_suffix('.json')} is damaged: it is of {record.file}")
    return records


def _claim(directory: Path) -> None:
    """Mark a directory as one that an extraction is writing, unless that has ended."""
    marker = directory / UNFINISHED_FILE
    if marker.exists() or (directory / MANIFEST_FILE).exists():
        return
    if shards := sorted(directory.glob("*.safetensors")):
        raise LatentsError(f"{shards[0]} is of no extraction that could go on here: give an empty directory")
    write_text(marker, "These latents are being written, or their extraction was interrupted: run it again.\n")


def _finite(shard: Shard) -> torch.Tensor:
    """Its plain latents; raises LatentsError where one is not finite."""
    latents = shard.latents()
    if not torch.isfinite(latents).all():
        raise LatentsError(f"{shard.path} has latents that are not finite")
    return latents


def _moments(x: torch.Tensor) -> Moments:
    """Count, mean and sum of squared deviations per channel of [N, C, H, W], in float64."""
    x = x.transpose(0, 1).flatten(1)
    means, deviations = [], []
    for channel in x:  # one at a time: the whole in float64 would double the memory of a shard
        channel = channel.double()
        means.append(float(channel.mean()))
        deviations.append(float((channel - channel.mean()).square().sum()))
    return Moments(count=x.shape[1], mean=tuple(means), m2=tuple(deviations))


def merge_moments(parts: "Iterable[Moments]") -> dict:
    """Mean and unbiased std of the union, by the pairwise update of Chan, Golub and LeVeque (1979)."""
    count, mean, m2 = 0, np.zeros(()), np.zeros(())
    for part in parts:
        n, delta = part.count, np.array(part.mean) - mean
        m2 = m2 + np.array(part.m2) + delta**2 * count * n / (count + n)
        mean, count = mean + delta * n / (count + n), count + n
    return {"mean": mean.tolist(), "std": np.sqrt(m2 / max(count - 1, 1)).tolist(), "count": count}


def make_statistics(directory: Path) -> dict:
    """Write the statistics of a set that has none, such as the published ones → {"mean", "std", "count"}.

    Raises LatentsError where there is no set, it is unfinished, its latents are not finite, or it has statistics.
    """
    path = directory / STATISTICS_FILE
    if os.path.lexists(path):
        raise LatentsError(f"{path} is already there")
    if not directory.is_dir():
        raise LatentsError(f"{directory} is no directory")
    read_manifest(directory)
    shards = [Shard.read(shard) for shard in sorted(directory.glob("*.safetensors"))]
    if not shards or len({shard.shape for shard in shards}) > 1:
        raise LatentsError(f"{directory} holds {len(shards)} shards; at least one is wanted, and all of one shape")
    statistics = merge_moments(_moments(_finite(shard)) for shard in shards)
    write_statistics(directory, statistics)
    return statistics
