"""What a tar of samples holds, by WebDataset's rule: which members are images, where they lie, and their labels."""

import os
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from common.files import FileError, open_regular, refuse_placeholders
from common.text import printable
from vavae.sources.listing import EXTENSIONS, is_hidden

LABEL = "cls"
NO_LABEL = -1
_IMAGES = frozenset(extension.removeprefix(".") for extension in EXTENSIONS)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = 512
_LABEL_LIMIT = 1000  # bytes
_NAMES_KEPT = 2  # of what is left out, of each kind
_PADDING = 2**20  # bytes looked at behind the end of a tar


@dataclass
class Scan:
    """The samples of a tar, in the order of their first members.

    Fields:
        names: the members that are images, printable.
        offsets, sizes: of their content in the tar, in bytes.
        labels: index into `label_texts`, or NO_LABEL.
        label_texts: what the label members hold, each once.
        left_out: kind → number of members or samples, and the first names.
    """

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    label_texts: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, tuple[int, list[str]]] = field(default_factory=dict)

    def leave_out(self, kind: str, name: str) -> None:
        count, names = self.left_out.get(kind, (0, []))
        self.left_out[kind] = count + 1, [*names, printable(name)] if count < _NAMES_KEPT else names


@dataclass
class _Sample:
    image: tuple[str, int, int] | None = None  # name, offset, size
    label: int = NO_LABEL
    extensions: set[str] = field(default_factory=set)


def scan_tar(path: Path) -> Scan:
    """Go through a tar once.

    The key of a sample is a member's path up to the first dot of its base name, the rest its extension, in lower case.
    Members of a sample need not follow each other. Its image is of one of `EXTENSIONS`, its label in a member `cls`;
    other members are ignored.

    Raises FileError, naming tar and member, where it is no tar, compressed, damaged or cut short, a sample has two
    images or one member twice, an image or label is sparse, or a label is no text.
    """
    scan = Scan()
    samples: dict[str, _Sample] = defaultdict(_Sample)
    with open_regular(path) as file:
        for member in _members(path, file):
            name = member.name
            while name.startswith("./"):
                name = name[2:].lstrip("/")
            if member.isdir():
                continue
            folder, _, base = name.rpartition("/")
            stem, dot, extension = base.partition(".")
            if any(map(is_hidden, name.split("/"))):
                scan.leave_out("hidden", name)
            elif member.issym() or member.islnk():
                scan.leave_out("link", name)
            elif not member.isreg():
                scan.leave_out("pipe, socket or device", name)
            elif not dot:
                scan.leave_out("without an extension", name)
            else:
                sample = samples[f"{folder}/{stem}"]
                _add(sample, extension.lower(), name, member, scan, path, file)
    for key, sample in samples.items():
        if sample.image is None:
            scan.leave_out("sample without an image", key.removeprefix("/"))
            continue
        name, offset, size = sample.image
        scan.names.append(printable(name))
        scan.offsets.append(offset)
        scan.sizes.append(size)
        scan.labels.append(sample.label)
    return scan


def _add(
    sample: _Sample, extension: str, name: str, member: tarfile.TarInfo, scan: Scan, path: Path, file: BinaryIO
) -> None:
    where = f"{path}: {printable(name)}"
    if extension in sample.extensions:
        raise FileError(f"{where} is there twice")
    sample.extensions.add(extension)
    if extension not in _IMAGES and extension != LABEL:
        return
    if member.issparse():
        raise FileError(f"{where} is stored as a sparse file, which is not read: pack the tar without --sparse")
    if extension == LABEL:
        content = os.pread(file.fileno(), min(member.size, _LABEL_LIMIT + 1), member.offset_data)
        text = content.decode("utf-8", "surrogateescape").strip()
        if not text or len(content) > _LABEL_LIMIT or printable(text) != text:
            raise FileError(f"{where} is no label: it holds {content[:40]!r}; wanted is a number from 0 or a name")
        sample.label = scan.label_texts.setdefault(text, len(scan.label_texts))
    elif sample.image is not None:
        raise FileError(f"{where} is a second image of its sample, beside {printable(sample.image[0])}")
    else:
        sample.image = name, member.offset_data, member.size


def _members(path: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members of a tar; raises FileError where it is none or damaged, also where `tarfile` stops without a word."""
    total = os.fstat(file.fileno()).st_size
    begin = os.pread(file.fileno(), 100, 0)
    if not begin:
        raise FileError(f"{path} is empty, no tar")
    refuse_placeholders(path, begin)
    for signature, kind in _COMPRESSED.items():
        if begin.startswith(signature):
            raise FileError(f"{path} is compressed by {kind}: unpack it first (images in it are addressed by place)")
    try:
        tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8")  # noqa: SIM115 (closes nothing: not its file)
    except (tarfile.TarError, ValueError, OverflowError) as e:
        raise FileError(f"{path} is no tar, or damaged at its begin: {e}") from None
    last = -1
    while True:
        try:
            member = tar.next()
        except (tarfile.TarError, ValueError, OverflowError) as e:
            raise FileError(f"{path} is damaged or cut short after byte {max(last, 0):,}: {e}") from None
        if member is None:
            break
        tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
        if member.size < 0 or member.offset_data <= last:
            raise FileError(f"{path} is damaged: the header of {printable(member.name)} has a wrong size")
        last = member.offset_data
        stored = 0 if member.issparse() or not member.isreg() else member.size
        if last + stored > total:
            raise FileError(
                f"{path} is cut short: {printable(member.name)} reaches to byte {last + stored:,} of {total:,}"
            )
        yield member
    _check_end(path, file, tar.offset, total)


def _check_end(path: Path, file: BinaryIO, offset: int, total: int) -> None:
    """Raise FileError unless zeros follow from `offset`, as they do behind the last member of a whole tar."""
    rest = os.pread(file.fileno(), _PADDING, offset)
    if len(rest) < _BLOCK:
        raise FileError(f"{path} is cut short: its end is missing, {total:,} bytes are there")
    if rest[:_BLOCK].strip(b"\0"):
        raise FileError(f"{path} is damaged: no header of a member at byte {offset:,}")
    if rest.strip(b"\0"):
        raise FileError(f"{path} goes on behind its end at byte {offset:,}: several tars in one file are not read")
