"""The index of a tar, kept beside it as JSON: where each image lies, how long it is, and its label.

It is made once, and again where the tar was modified since.
"""

import hashlib
import logging
import os
import random
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import AfterValidator, Field

from common.files import FileError, WriteError, make_directory, open_regular, path_exists, replace_file
from common.records import FileRecord, Record, read_record, write_checksummed
from vavae.sources.tar_scan import NO_LABEL, scan_tar

log = logging.getLogger(__name__)

FORMAT = 1
_ENDS = 65536  # bytes of each end of a tar that tell it from others
_READERS = 8  # threads: most of the time is waiting for a file system on a network
_REMOVE = "remove it to have it made anew"
_CountFrom0 = Annotated[int, Field(ge=0)]


def _known(number: int) -> int:
    if number != FORMAT:
        raise ValueError(f"it has format {number}, written by another version; read here is format {FORMAT}")
    return number


class LeftOutRecord(Record):
    """How many members or samples of one kind are left out, and the first names."""

    count: _CountFrom0
    first: tuple[str, ...]


class TarRecord(Record):
    """An index file. Columns are text, an entry a sample: names by lines, numbers by spaces.

    Fields:
        name, tar: name of the tar, its size, and SHA-256 of its two ends.
        modified_ns: modification time of the tar (`st_mtime_ns`) before it was gone through.
        labels: index into `label_texts`, or −1 where a sample has no label.
    """

    format: Annotated[int, AfterValidator(_known)]
    name: str
    tar: FileRecord
    modified_ns: int
    samples: _CountFrom0
    names: str
    offsets: str
    sizes: str
    labels: str
    label_texts: tuple[str, ...]
    left_out: dict[str, LeftOutRecord]


@dataclass(frozen=True)
class TarIndex:
    """Where the images of a tar lie, in its order.

    Fields:
        names: of the members.
        offsets, sizes: int64, in bytes.
        labels: int64, index into `label_texts`, or NO_LABEL.
        left_out: kind → number and first names.
    """

    names: list[str]
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    label_texts: tuple[str, ...]
    left_out: dict[str, tuple[int, tuple[str, ...]]]


def load_indexes(path: str, tars: Sequence[Path]) -> list[TarIndex]:
    """The index of each tar, made where none is up to date; how many were and how long it took is logged.

    Of several processes that begin at once each takes the tars in an order of its own, and leaves out those that
    another has made meanwhile.

    Raises FileError, naming it, for a tar that is damaged, and an index that is, or is of another tar.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        found = [index for index, _ in pool.map(_load, tars)]
    missing = [place for place, index in enumerate(found) if index is None]
    random.Random(_process_name()).shuffle(missing)
    begin, made, anew, not_kept = time.monotonic(), 0, 0, None
    for place in missing:
        found[place], outdated = _load(tars[place])
        if found[place] is None:
            found[place], problem = _make(tars[place])
            made, anew, not_kept = made + 1, anew + outdated, problem or not_kept
    if made:
        modified = f", {anew:,} of them anew because the tar was modified" if anew else ""
        log.info(
            "%s: made the index of %s of %s tars in %.1f s%s",
            *(path, f"{made:,}", f"{len(tars):,}", time.monotonic() - begin, modified),
        )
    if not_kept:
        log.warning("%s: indexes are not kept, so the next start makes them again: %s", path, not_kept)
    return [index for index in found if index is not None]


def index_paths(tar: Path) -> list[Path]:
    """Where the index of a tar may lie: beside it, and in the user's cache, for a folder that cannot be written."""
    name = hashlib.sha256(os.fsencode(os.path.realpath(tar))).hexdigest()
    paths = [tar.with_name(f"{tar.name}.index.json")]
    with suppress(RuntimeError):  # no home folder
        cache = os.environ.get("XDG_CACHE_HOME", "")
        root = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
        paths.append(root / "lightningdit" / "tar_index" / f"{name}.json")
    return paths


def _process_name() -> str:
    return f"{socket.gethostname()}.{os.getpid()}"


def _identity(tar: Path) -> tuple[FileRecord, int]:
    """Size and hash of the ends of a tar, and its modification time in ns."""
    with open_regular(tar) as file:
        status = os.fstat(file.fileno())
        size = status.st_size
        ends = os.pread(file.fileno(), _ENDS, 0) + os.pread(file.fileno(), _ENDS, max(size - _ENDS, 0))
    return FileRecord(bytes=size, sha256=hashlib.sha256(ends).hexdigest()), status.st_mtime_ns


def _load(tar: Path) -> tuple[TarIndex | None, bool]:
    """The index of a tar where one lies that is up to date, and whether one lies there that is not.

    Raises FileError where one is of another tar or damaged.
    """
    paths = [path for path in index_paths(tar) if path_exists(path)]
    if not paths:
        return None, False
    identity, modified_ns = _identity(tar)
    for path in paths:
        try:
            record = read_record(path, TarRecord)
        except FileError as e:
            raise FileError(f"{e}; {_REMOVE}") from None
        if record.tar != identity and record.name != tar.name:
            raise FileError(
                f"{path} is the index of another tar, {record.name} of {record.tar.bytes:,} bytes, than {tar} of "
                f"{identity.bytes:,}; {_REMOVE}"
            )
        if record.tar == identity and record.modified_ns == modified_ns:
            return _index(path, record), False
    return None, True


def _index(path: Path, record: TarRecord) -> TarIndex:
    names = record.names.split("\n") if record.names else []
    try:
        offsets, sizes, labels = (
            np.array(column.split(), dtype=np.int64) for column in (record.offsets, record.sizes, record.labels)
        )
        fits = (
            len(names) == len(offsets) == len(sizes) == len(labels) == record.samples
            and bool((offsets >= 0).all() and (sizes >= 0).all() and (offsets + sizes <= record.tar.bytes).all())
            and bool(((labels >= NO_LABEL) & (labels < len(record.label_texts))).all())
        )
    except (ValueError, OverflowError):
        fits = False
    if not fits:
        raise FileError(f"{path} is damaged: its columns do not fit each other or the tar; {_REMOVE}")
    left_out = {kind: (item.count, item.first) for kind, item in record.left_out.items()}
    return TarIndex(names, offsets, sizes, labels, record.label_texts, left_out)


def _make(tar: Path) -> tuple[TarIndex, str | None]:
    """Scan a tar and keep its index, in place of one that lies there; returns it, and why it could not be kept."""
    identity, modified_ns = _identity(tar)
    scan = scan_tar(tar)
    record = TarRecord(
        format=FORMAT,
        name=tar.name,
        tar=identity,
        modified_ns=modified_ns,
        samples=len(scan.names),
        names="\n".join(scan.names),
        offsets=" ".join(map(str, scan.offsets)),
        sizes=" ".join(map(str, scan.sizes)),
        labels=" ".join(map(str, scan.labels)),
        label_texts=tuple(scan.label_texts),
        left_out={
            kind: LeftOutRecord(count=count, first=tuple(names)) for kind, (count, names) in scan.left_out.items()
        },
    )
    problem = None
    for path in index_paths(tar):
        try:
            _keep(path, record)
        except WriteError as e:
            problem = str(e)
        else:
            return _index(path, record), None
    return _index(tar, record), problem


def _keep(path: Path, record: TarRecord) -> None:
    """Write an index at once, also while other processes write theirs of the same tar; raises WriteError."""
    make_directory(path.parent)
    own = path.with_name(f".{path.name}.{_process_name()}")
    try:
        write_checksummed(own, record.model_dump(mode="json"))
        replace_file(own, path)
    finally:
        with suppress(OSError):
            own.unlink()
