"""Writer of latents directories (`lightningdit.latents`): shards by any number of processes, statistics, manifest."""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from common.files import file_entry
from common.records import write_checksummed
from common.tensors import write_tensors
from lightningdit.latents import (
    MANIFEST_FILE,
    SHARDS_PER_RANK,
    STATISTICS_FILE,
    UNFINISHED_FILE,
    LatentsError,
    Manifest,
    ShardRecord,
    Store,
    StoredDtype,
    manifest_in,
    numbered_shard,
    read_latents_record,
    shard_files,
)
from lightningdit.latents_parts import (
    FinishedShard,
    Part,
    Stored,
    begin,
    complete_set,
    finished_shards,
    keep_intact,
    part_name,
    remove_part,
)
from lightningdit.latents_shards import STORED, Shard, parts_of
from lightningdit.latents_statistics import merge_moments, moments_of, write_statistics

SAVE_SECONDS = 300.0  # of work that a kill may cost, where a shard takes longer
MOST_SHARDS = 100 * SHARDS_PER_RANK  # beyond, names no longer sort as their numbers do


class LatentsWriter:
    """Writer of rows of a latents directory: whole shards, or parts of those that it is given a part of.

        writer = LatentsWriter(directory, identity={...})
        for batch in images[writer.position:]: writer.add(latents, latents_flip, labels)
        writer.close()
        finish(directory)

    Several processes write a set of `total` rows together: one of them calls `begin`, each makes a writer with `found`,
    adds its rows with `at`, and closes it; when all have, each calls `merge`, and when all have, one calls `finish`.
    Shard s is rows s·shard_size to (s + 1)·shard_size: what is in a file, and what it is called, depends neither on the
    number of processes nor on when they were interrupted.

    Args:
        shard_size: rows of a shard.
        identity: what the latents depend on (any JSON); a directory begun under another one is refused, and so is one
            with shards that no writer began, such as a published set.
        store: what is stored of each image: of `moments`, `add` takes means and standard deviations, as 2·C channels.
        dtype: what it is stored as, rounded to the nearest.
        total: rows of the set; None: those that are added, one after the other.
        found: records of what the directory has, from `begin`; None: this process writes alone, and `begin` is called.
        save_seconds: where a shard takes longer, what there is of it is written as a part.

    Attributes: `position`, the first row that is not there; `records` of what this writer wrote.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        shard_size: int = 10_000,
        identity: Any = None,
        store: Store = "sample",
        dtype: StoredDtype = "float32",
        total: int | None = None,
        found: Sequence[Stored] | None = None,
        save_seconds: float = SAVE_SECONDS,
    ):
        if total is not None and total > MOST_SHARDS * shard_size:
            raise LatentsError(f"{total:,} latents in shards of {shard_size:,}: at most {MOST_SHARDS:,} shards")
        self.directory, self.shard_size, self.total = Path(directory), shard_size, total
        self.store, self.dtype, self._save_seconds = store, getattr(torch, dtype), save_seconds
        self._identity = json.loads(json.dumps(identity))
        self._alone = found is None
        there: Iterable[tuple[int, int]]
        if found is not None:
            there = [record.rows for record in found]
        elif manifest := complete_set(self.directory, self._identity):
            there = [(0, manifest.count)]
        else:
            found = keep_intact(self.directory, begin(self.directory, self._identity))
            there = [record.rows for record in found]
        self._found, self.records = list(found or ()), list[Stored]()
        self.position = _first_missing(there)
        self._start, self._filled, self._saved = self.position, 0, time.monotonic()
        self._buffers: dict[str, torch.Tensor] = {}

    def add(
        self, latents: torch.Tensor, latents_flip: torch.Tensor, labels: torch.Tensor, *, at: int | None = None
    ) -> None:
        """Append latents and their mirror images' [b, C, H, W] ([b, 2·C, H, W] of moments) with labels [b].

        at: row of the first; None: after the last. Raises ValueError on shapes that do not fit, and on values that are
        not finite as they would be stored.
        """
        if latents.dim() != 4 or latents.shape != latents_flip.shape or labels.shape != latents.shape[:1]:
            shapes = [tuple(v.shape) for v in (latents, latents_flip, labels)]
            raise ValueError(f"latents, latents_flip, labels have shapes {shapes}; wanted [b, C, H, W] twice and [b]")
        if latents.shape[1] % parts_of(self.store):
            raise ValueError(f"{latents.shape[1]} channels of moments: wanted as many means as standard deviations")
        if at is not None and at != self._start + self._filled:
            self._flush()
            self._start = at
        self._allocate(tuple(latents.shape[1:]))
        start = 0
        while start < len(labels):
            taken = min(len(labels) - start, self._shard_end() - self._start - self._filled)
            for name, value in (("latents", latents), ("latents_flip", latents_flip), ("labels", labels)):
                into = self._buffers[name][self._filled : self._filled + taken]
                into.copy_(value[start : start + taken])
                self._require_finite(into, value[start : start + taken])
            start, self._filled = start + taken, self._filled + taken
            if self._start + self._filled == self._shard_end():
                self._flush()
        if time.monotonic() > self._saved + self._save_seconds:
            self._flush()

    def close(self) -> None:
        """Write what remains: the last, shorter shard, or a part; a writer alone also merges the parts there are."""
        if self._alone and self.total is None:
            self.total = max(self._start + self._filled, self.position)
        self._flush()
        self._buffers = {}
        if self._alone:
            self.merge([*self._found, *self.records])

    def merge(self, records: Sequence[Stored], *, rank: int = 0, world_size: int = 1) -> None:
        """Make shards of the parts among the records of a set, and remove those.

        Of several processes, `rank` does every `world_size`-th shard. Raises LatentsError where rows are missing.
        """
        whole = {record.rows[0] // self.shard_size for record in records if isinstance(record, FinishedShard)}
        parts = defaultdict[int, list[Part]](list)
        for record in records:
            if isinstance(record, Part):
                parts[record.shard].append(record)
        for number in sorted(parts)[rank::world_size]:
            if number not in whole:
                self._join(number, sorted(parts[number], key=lambda part: part.rows))
            for part in parts[number]:
                remove_part(self.directory / part.file)

    def _join(self, number: int, parts: Sequence[Part]) -> None:
        self._start, self._filled = number * self.shard_size, 0
        for part in parts:
            if part.start != self._start + self._filled:
                continue  # of rows that came twice, or after some that are missing
            shard = Shard.read(self.directory / part.file)
            tensors = {name: shard.stored(name) for name in STORED} | {"labels": shard.labels()}
            self._allocate(tuple(tensors["latents"].shape[1:]))
            for name, value in tensors.items():
                self._buffers[name][self._filled : self._filled + shard.count].copy_(value)
            self._filled += shard.count
        if self._start + self._filled != min(self._shard_end(), self.total or self._shard_end()):
            raise LatentsError(
                f"{self.directory} lacks rows of {numbered_shard(number)}, {self._start + self._filled} and later: run "
                "the extraction again to complete it"
            )
        self._flush()

    def _shard_end(self) -> int:
        """The row at which the shard of the rows in memory ends."""
        return (self._start // self.shard_size + 1) * self.shard_size

    def _allocate(self, shape: tuple[int, ...]) -> None:
        if not self._buffers:
            for name in STORED:
                self._buffers[name] = torch.empty(self.shard_size, *shape, dtype=self.dtype)
            self._buffers["labels"] = torch.empty(self.shard_size, dtype=torch.int64)
        elif shape != (expected := tuple(self._buffers["latents"].shape[1:])):
            raise ValueError(f"latents of shape {shape} after latents of shape {expected}")

    def _require_finite(self, stored: torch.Tensor, given: torch.Tensor) -> None:
        if torch.isfinite(stored).all():
            return
        path = self.directory / numbered_shard(self._start // self.shard_size)
        if not torch.isfinite(given).all():
            raise LatentsError(f"{path}: the latents to store are not finite")
        raise LatentsError(
            f"{path}: latents to store reach {given.abs().max().item():,.0f}, and {self.dtype} ends at "
            f"{torch.finfo(self.dtype).max:,.0f}: store them as bfloat16 or float32"
        )

    def _flush(self) -> None:
        """Write the rows in memory: as a shard where they are all of one, else as a part."""
        self._saved = time.monotonic()
        if not self._filled:
            return
        start, number = self._start, self._start // self.shard_size
        whole = start % self.shard_size == 0 and start + self._filled in (self._shard_end(), self.total)
        path = self.directory / (numbered_shard(number) if whole else part_name(number, start))
        tensors = {name: buffer[: self._filled] for name, buffer in self._buffers.items()}
        write_tensors(path, tensors, self._metadata())
        channels, *sides = tensors["latents"].shape[1:]
        record = {"file": path.name, "start": start, "count": self._filled, "identity": self._identity}
        record |= {"shape": [channels // parts_of(self.store), *sides]} | file_entry(path)
        if whole:
            moments = moments_of(tensors["latents"], self.store)
            record |= {"rank": number // SHARDS_PER_RANK, "moments": moments.model_dump()}
        else:
            record |= {"shard": number}
        write_checksummed(path.with_suffix(".json"), record)
        self.records.append((FinishedShard if whole else Part).model_validate_json(json.dumps(record)))
        self._start, self._filled = start + self._filled, 0
        self.position = self._start

    def _metadata(self) -> dict[str, str]:
        """The published files' metadata, and what is stored where that is not what they store."""
        published = {"total_size": str(self._filled), "dtype": str(self.dtype), "device": "cpu"}
        return published if self.store == "sample" else published | {"store": self.store}


def _first_missing(there: Iterable[tuple[int, int]]) -> int:
    """The first row that is not among these stretches of rows."""
    position = 0
    for start, stop in sorted(there):
        if start > position:
            break
        position = max(position, stop)
    return position


def finish(
    directory: Path | str,
    records: Sequence[Stored] | None = None,
    *,
    tokenizer: dict | None = None,
    expected: int | None = None,
    classes: Sequence[str] | None = None,
    check: Callable[[], None] | None = None,
) -> Manifest:
    """Complete a directory of closed writers with the statistics file, then `manifest.json` → the manifest.

    The statistics are over all plain latents (not the mirrored ones), std unbiased, merged from float64 sums.
    records: of the set's shards; None: those that lie beside them. tokenizer: the tokenizer of the latents (any JSON,
    such as name and hash). classes: names of the labels. check: called when all but the manifest is there; what it
    raises leaves the set unfinished. Raises LatentsError where shards are missing, do not fit together, or do not add
    up to `expected`. Calling it again changes nothing.
    """
    directory = Path(directory)
    if (manifest := manifest_in(directory)) is not None:
        manifest.check(directory, checksums=None)
        _remove_records(directory, manifest)  # an earlier call may have been killed before it
        return manifest
    shards = _whole_set(directory, finished_shards(directory) if records is None else records, expected)
    statistics = merge_moments(shard.moments for shard in shards)
    write_statistics(directory, statistics)
    first = Shard.read(directory / shards[0].file)
    if check is not None:
        check()
    content = {
        "format": 1,
        "count": sum(shard.count for shard in shards),
        "shape": first.shape,
        "store": first.store,
        "dtype": str(first.dtype).removeprefix("torch."),
        "tokenizer": tokenizer,
        "identity": shards[0].identity,
        "classes": None if classes is None else list(classes),
        "statistics": statistics,
        "files": {STATISTICS_FILE: file_entry(directory / STATISTICS_FILE)},
        "shards": [shard.model_dump(include=set(ShardRecord.model_fields)) for shard in shards],
    }
    write_checksummed(directory / MANIFEST_FILE, content)
    manifest = read_latents_record(directory / MANIFEST_FILE, Manifest)
    _remove_records(directory, manifest)
    return manifest


def _whole_set(directory: Path, records: Sequence[Stored], expected: int | None) -> list[FinishedShard]:
    """The shards among the records, in order; raises LatentsError where they are not a whole set."""
    shards = sorted((r for r in records if isinstance(r, FinishedShard)), key=lambda shard: shard.rows)
    known = {shard.file for shard in shards}
    strays = [path.name for path in shard_files(directory) if path.name not in known]
    if strays or not shards:
        what = f"unfinished shards {', '.join(strays)}" if strays else "no complete shard"
        raise LatentsError(f"{directory} holds {what}; run the extraction again to complete it")
    count, shapes = sum(shard.count for shard in shards), {shard.shape for shard in shards}
    missing = _first_missing(shard.rows for shard in shards)
    if missing != count or len(shapes) > 1 or expected not in (None, count):
        raise LatentsError(
            f"{directory} holds {count} latents of shapes {sorted(shapes)}, the first {missing} without a gap; "
            f"expected {'any number' if expected is None else expected} of one shape"
        )
    return shards


def _remove_records(directory: Path, manifest: Manifest) -> None:
    """Remove the records beside the shards and the marker of an unfinished set: the manifest replaces them."""
    for shard in manifest.shards:
        (directory / shard.file).with_suffix(".json").unlink(missing_ok=True)
    (directory / UNFINISHED_FILE).unlink(missing_ok=True)
