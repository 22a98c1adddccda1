"""An extraction that has not finished: which rows of its set are on the disk, in shards or in parts of them.

Row i is image i. Of a shard there is the whole, or parts, each some rows in a file of the shards' format under another
name, which `LatentsWriter.merge` joins. Either counts once its small JSON record lies beside it, so that a process can
be killed at any moment. No record names a process: what some began, any number may finish.
"""

import logging
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import StringConstraints, model_validator

from common.files import make_directory, path_exists, write_text
from common.records import FileRecord
from lightningdit.latents import (
    MANIFEST_FILE,
    SHARD_NAME,
    UNFINISHED_FILE,
    Count,
    LatentsError,
    Manifest,
    Positive,
    ShardRecord,
    damage_of,
    manifest_in,
    numbered_shard,
    read_latents_record,
    shard_files,
)
from lightningdit.latents_statistics import Moments

log = logging.getLogger(__name__)

_SHARD_STEM = SHARD_NAME.pattern.removesuffix(r"\.safetensors")
_PARTS = "latents_rank*.rows-*.part"
Rows = tuple[int, int]


class FinishedShard(ShardRecord):
    """The JSON beside a shard of an extraction that has not finished.

    start: its first row; None in records of earlier versions, where the shards of each process began from 0.
    """

    start: Count | None = None
    shape: tuple[Positive, Positive, Positive]
    moments: Moments
    identity: Any

    @model_validator(mode="after")
    def _moments_are_the_shards(self) -> "FinishedShard":
        channels, height, width = self.shape
        moments = self.moments
        lengths = {len(values) for values in (moments.mean, moments.m2, moments.variance) if values is not None}
        if moments.count != self.count * height * width or lengths != {channels}:
            raise ValueError(
                f"moments of {moments.count} values in {len(moments.mean)} channels, of {self.count} "
                f"latents {list(self.shape)}"
            )
        return self

    @property
    def rows(self) -> Rows:
        assert self.start is not None, "`_records` gives none without"
        return self.start, self.start + self.count


class Part(FileRecord):
    """The JSON beside `count` rows from `start` on, of shard `shard`."""

    file: Annotated[str, StringConstraints(pattern=rf"^{_SHARD_STEM}\.rows-[0-9]{{8,}}\.part$")]
    shard: Count
    start: Count
    count: Positive
    shape: tuple[Positive, Positive, Positive]
    identity: Any

    @property
    def rows(self) -> Rows:
        return self.start, self.start + self.count


Stored = FinishedShard | Part


def part_name(shard: int, start: int) -> str:
    """The file of a part of a shard from row `start` of the set on."""
    return numbered_shard(shard).replace(".safetensors", f".rows-{start:08d}.part")


def complete_set(directory: Path, identity: Any, same: Callable[[Any, Any], bool] = operator.eq) -> Manifest | None:
    """The manifest of a set that this extraction completed; None where there is none.

    same: whether the identities of two extractions, the one that was and this one, are one. Raises LatentsError where
    they are not, or the set is damaged.
    """
    if (manifest := manifest_in(directory)) is None:
        return None
    manifest.check(directory, checksums=None)
    if not same(manifest.identity, identity):
        raise LatentsError(_belongs_to_another(directory / manifest.shards[0].file, manifest.identity, identity))
    return manifest


def begin(directory: Path, identity: Any) -> list[Stored]:
    """Prepare a directory to be written into, on one process alone → records of what it has already, by rows.

    What killed processes left half done is removed, and the directory is marked as unfinished. Raises LatentsError
    where it holds what another extraction, an earlier version of this one, or none of ours wrote.
    """
    make_directory(directory)
    records: list[Stored] = [*finished_shards(directory), *_parts(directory)]
    for record in records:
        if record.identity != identity:
            raise LatentsError(_belongs_to_another(directory / record.file, record.identity, identity))
    _mark_unfinished(directory)
    known = {record.file for record in records}
    for path in directory.glob(_PARTS):
        if path.name not in known:
            path.unlink()
    for leftover in directory.glob(".latents_rank*.tmp"):
        leftover.unlink()
    return sorted(records, key=lambda record: record.rows)


def keep_intact(directory: Path, records: Sequence[Stored]) -> list[Stored]:
    """Those whose files are what their records say; the records of others are removed, so that they are written again.

    It reads everything: several processes may share a set's records among them.
    """
    intact = []
    for record in records:
        path = directory / record.file
        if damage := damage_of(path, record):
            log.warning("%s; it is written again", damage)
            remove_part(path) if isinstance(record, Part) else path.with_suffix(".json").unlink()
        else:
            intact.append(record)
    return intact


def remove_part(path: Path) -> None:
    """Remove a part, its record first: without one it counts for nothing."""
    path.with_suffix(".json").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def finished_shards(directory: Path) -> list[FinishedShard]:
    """The records of the complete shards of an unfinished extraction."""
    return _records(shard_files(directory), FinishedShard)


def _parts(directory: Path) -> list[Part]:
    return _records(sorted(directory.glob(_PARTS)), Part)


def _records(paths: Sequence[Path], kind: type) -> list:
    records = []
    for path in paths:
        beside = path.with_suffix(".json")
        if path_exists(beside):
            record = read_latents_record(beside, kind)
            if record.file != path.name:
                raise LatentsError(f"{beside} is damaged: it describes {record.file}")
            if record.start is None:
                raise LatentsError(
                    f"{path} is of an extraction that an earlier version began: it divided the images by the number of "
                    "its processes, and this one does not. Finish it with that version, or delete the directory"
                )
            records.append(record)
    return records


def _belongs_to_another(path: Path, theirs: Any, ours: Any) -> str:
    """Name what differs where both are mappings."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = [key for key in theirs | ours if theirs.get(key) != ours.get(key)]
        theirs, ours = ({key: each[key] for key in keys if key in each} for each in (theirs, ours))
    return (
        f"{path} belongs to another extraction: {theirs}, this one is {ours}. Give an empty directory, or delete that "
        "one"
    )


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
