"""What is known of a reference, measured once and kept: its moments, and the features of its images."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from common.files import FileError, file_entry, make_directory, sha256
from common.records import FileRecord, Record, read_record, write_checksummed
from common.tensors import read_tensors, write_tensors
from launch.evaluation.moments import Moments
from launch.evaluation.one_pass import ImageFeatures
from launch.evaluation.reference import NAMES
from vavae.sources import open_source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KnownFeatures:
    """What is known of the reference.

    Fields:
        sha256: of the images' hashes in order, or of the file of statistics.
        moments: by the name of the features, as an extractor gives them.
        kept: float32 `[N, D]`; None of statistics alone, and of more images than `one_pass.MAX_KEPT`.
    """

    description: str
    count: int | None
    sha256: str
    moments: Mapping[str, Moments]
    kept: Tensor | None = None


class CachedReference(Record):
    """The JSON file beside the features of a reference; written last, it makes them count."""

    count: int
    sha256: str
    file: FileRecord


def files_hash(path: Path) -> str:
    """SHA-256 of a file, or of the images of a folder, with their names, in their order."""
    if path.is_file() and path.suffix == ".npz":
        return sha256(path)
    source, digest = open_source(path, split="val", labelled=False), hashlib.sha256()
    for index in range(len(source)):
        content = source.read(index)
        digest.update(f"{Path(source.name(index)).name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def known_features(measured: ImageFeatures) -> KnownFeatures:
    moments = {kind: statistics.moments for kind, statistics in measured.moments.items()}
    return KnownFeatures(measured.description, measured.count, measured.sha256, moments, measured.kept)


def write_cached(path: Path, known: KnownFeatures) -> None:
    pairs = [pair for kind, moments in known.moments.items() for pair in zip(NAMES[kind], moments, strict=True)]
    tensors = dict(pairs)
    if known.kept is not None:
        tensors["kept"] = known.kept
    make_directory(path.parent)
    entry = write_tensors(path, tensors)
    write_checksummed(path.with_suffix(".json"), {"count": known.count, "sha256": known.sha256, "file": entry})


def read_cached(path: Path, description: str) -> KnownFeatures | None:
    """What was kept; None where nothing is whole, which is said where something was there."""
    beside = path.with_suffix(".json")
    if not beside.exists():
        return None
    try:
        facts = read_record(beside, CachedReference)
        if (found := file_entry(path)) != facts.file.model_dump():
            raise FileError(f"{path} has {found['bytes']:,} bytes, or others, than {beside.name} says")
        tensors = read_tensors(path, ())
    except (FileError, OSError) as e:
        log.warning("the reference is measured again: %s", e)
        return None
    moments = {kind: (tensors[mu], tensors[sigma]) for kind, (mu, sigma) in NAMES.items() if mu in tensors}
    return KnownFeatures(description, facts.count, facts.sha256, moments, tensors.get("kept"))
