"""Writer of latents directories (`lightningdit.latents`): resumable shards, statistics, manifest."""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, model_validator

from common.files import file_entry, make_directory, path_exists, write_text
from common.records import Record, write_checksummed
from common.tensors import save_pickled, write_tensors
from lightningdit.latents import (
    MANIFEST_FILE,
    STATISTICS_FILE,
    UNFINISHED_FILE,
    LatentsError,
    Manifest,
    Positive,
    Shard,
    ShardRecord,
    damage_of,
    manifest_in,
    read_latents_record,
    read_manifest,
    shard_files,
    shard_name,
    shards_of,
)

log = logging.getLogger(__name__)


class Moments(Record):
    """Moments of a shard's latents, per channel: count, mean and sum of squared deviations m2."""

    count: Positive
    mean: tuple[float, ...]
    m2: tuple[Annotated[float, Field(ge=0)], ...]


class FinishedShard(ShardRecord):
    """The JSON beside a shard of an extraction that has not finished."""

    shape: tuple[Positive, Positive, Positive]
    moments: Moments
    identity: Any

    @model_validator(mode="after")
    def _moments_are_the_shards(self) -> "FinishedShard":
        channels, height, width = self.shape
        moments = self.moments
        if moments.count != self.count * height * width or {len(moments.mean), len(moments.m2)} != {channels}:
            raise ValueError(
                f"moments of {moments.count} values in {len(moments.mean)} channels, of {self.count} "
                f"latents {list(self.shape)}"
            )
        return self


class LatentsWriter:
    """Writer of one process's shards of a latents directory; each shard appears complete or not at all.

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
        _mark_unfinished(self.directory)
        self.position = self._next_shard = self._filled = 0
        while (name := shard_name(self.rank, self._next_shard)) in counts:
            self.position, self._next_shard = self.position + counts[name], self._next_shard + 1
        self._buffers: dict[str, torch.Tensor] = {}

    def _finished_shards(self) -> dict[str, int]:
        """Name → number of latents of each complete shard; raises LatentsError where another extraction made one.

        A shard of this process that is truncated or was changed since is not counted while the extraction has not
        finished; afterwards it is an error.
        """
        shards: Sequence[ShardRecord]
        if (manifest := manifest_in(self.directory)) is not None:
            manifest.check(self.directory, checksums=None)
            shards, identities = manifest.shards, [manifest.identity] * len(manifest.shards)
        else:
            shards = records = _records(self.directory)
            identities = [record.identity for record in records]
        for shard, identity in zip(shards, identities, strict=True):
            if identity != self._identity:
                raise LatentsError(
                    f"{self.directory / shard.file} belongs to another extraction: {identity}, this one is "
                    f"{self._identity}. Give an empty directory, or delete that one"
                )
        counted = [s for s in shards if manifest or s.rank != self.rank or self._is_intact(s)]
        return {shard.file: shard.count for shard in counted}

    def _is_intact(self, shard: ShardRecord) -> bool:
        path = self.directory / shard.file
        damage = damage_of(path, shard)
        if damage:
            log.warning("%s; it is written again", damage)
            path.with_suffix(".json").unlink()
        return not damage

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
        """Write the remaining latents as a last, shorter shard."""
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

    def _write_shard(self) -> None:
        tensors = {name: buffer[: self._filled] for name, buffer in self._buffers.items()}
        latents, path = tensors["latents"], self.directory / shard_name(self.rank, self._next_shard)
        if not bool(torch.isfinite(latents).all() & torch.isfinite(tensors["latents_flip"]).all()):
            raise LatentsError(f"{path}: the latents to store are not finite")
        # The published files' metadata.
        write_tensors(path, tensors, {"total_size": str(self._filled), "dtype": "torch.float32", "device": "cpu"})
        record = {"file": path.name, "rank": self.rank, "count": self._filled, "shape": list(latents.shape[1:])}
        record |= {"moments": _moments(latents).model_dump(), "identity": self._identity} | file_entry(path)
        write_checksummed(path.with_suffix(".json"), record)
        self.position += self._filled
        self._next_shard, self._filled = self._next_shard + 1, 0


def finish(
    directory: Path | str,
    *,
    world_size: int = 1,
    tokenizer: dict | None = None,
    expected: int | None = None,
    classes: Sequence[str] | None = None,
) -> Manifest:
    """Complete a directory of closed writers with the statistics file, then `manifest.json` → the manifest.

    The statistics are over all plain latents (not the mirrored ones), std unbiased, merged from float64 sums.
    tokenizer: the tokenizer of the latents (any JSON, such as name and hash). classes: names of the labels. Raises
    LatentsError where shards of a rank are missing, do not fit together, or do not add up to `expected`. Calling it
    again changes nothing.
    """
    directory = Path(directory)
    if (manifest := manifest_in(directory)) is not None:
        manifest.check(directory, checksums=None)
        _remove_records(directory, manifest)  # an earlier call may have been killed before it
        return manifest
    records = _records(directory)
    known = {record.file for record in records}
    strays = [p.name for p in shard_files(directory) if p.name not in known]
    if strays or not records:
        what = f"unfinished shards {', '.join(strays)}" if strays else "no complete shard"
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
    content = {
        "format": 1,
        "count": count,
        "shape": records[0].shape,
        "tokenizer": tokenizer,
        "identity": records[0].identity,
        "classes": None if classes is None else list(classes),
        "statistics": statistics,
        "files": {STATISTICS_FILE: file_entry(directory / STATISTICS_FILE)},
        "shards": [record.model_dump(include=set(ShardRecord.model_fields)) for record in records],
    }
    write_checksummed(directory / MANIFEST_FILE, content)
    manifest = read_latents_record(directory / MANIFEST_FILE, Manifest)
    _remove_records(directory, manifest)
    return manifest


def write_statistics(directory: Path, statistics: dict) -> None:
    """Write `latents_stats.pt` of {"mean", "std"} per channel."""
    tensors = {key: torch.tensor(statistics[key]).view(1, -1, 1, 1) for key in ("mean", "std")}
    save_pickled(directory / STATISTICS_FILE, tensors)


def _remove_records(directory: Path, manifest: Manifest) -> None:
    """Remove the records beside the shards and the marker of an unfinished set: the manifest replaces them."""
    for shard in manifest.shards:
        (directory / shard.file).with_suffix(".json").unlink(missing_ok=True)
    (directory / UNFINISHED_FILE).unlink(missing_ok=True)


def _records(directory: Path) -> "list[FinishedShard]":
    """The records of the complete shards of an unfinished extraction, sorted by the shards' names."""
    paths = [p for p in shard_files(directory) if path_exists(p.with_suffix(".json"))]
    records = [read_latents_record(p.with_suffix(".json"), FinishedShard) for p in paths]
    for path, record in zip(paths, records, strict=True):
        if record.file != path.name:
            raise LatentsError(f"{path.with_suffix('.json')} is damaged: it describes {record.file}")
    return records


def _mark_unfinished(directory: Path) -> None:
    """Mark a directory as one that an extraction is writing, unless it is marked or has finished."""
    marker = directory / UNFINISHED_FILE
    if path_exists(marker) or path_exists(directory / MANIFEST_FILE):
        return
    if shards := sorted(directory.glob("*.safetensors")):
        raise LatentsError(
            f"{shards[0]} was not written by an extraction that can be resumed here: give an empty directory"
        )
    write_text(marker, "These latents are being written, or their extraction was interrupted: run it again.\n")


def _finite(shard: Shard) -> torch.Tensor:
    """The shard's latents without the mirrored ones; raises LatentsError where one is not finite."""
    latents = shard.latents()
    if not torch.isfinite(latents).all():
        raise LatentsError(f"{shard.path} has latents that are not finite")
    return latents


def _moments(x: torch.Tensor) -> Moments:
    """Count, mean and sum of squared deviations per channel of [N, C, H, W], in float64."""
    x = x.transpose(0, 1).flatten(1)
    means, deviations = [], []
    for channel in x:  # one at a time: all in float64 would take twice the memory of the shard
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
    if path_exists(path):
        raise LatentsError(f"{path} is already there")
    if not directory.is_dir():
        raise LatentsError(f"{directory} is not a directory")
    shards = [Shard.read(shard) for shard in shards_of(directory, read_manifest(directory))]
    if len(shapes := {shard.shape for shard in shards}) > 1:
        raise LatentsError(f"{directory} holds latents of shapes {sorted(shapes)}; all of one shape are wanted")
    statistics = merge_moments(_moments(_finite(shard)) for shard in shards)
    write_statistics(directory, statistics)
    return statistics
