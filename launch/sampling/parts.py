"""The parts of an unfinished set: what is made of some stretches of samples, in files that a later run goes on from.

A part is an npz of arrays with a row for each of its samples, named by them: `parts/0000032-0000048.npz`. It comes into
being whole, so that it counts if it is there; and it depends on its samples alone, so that any number of processes may
go on with any size of batch. Parts never overlap.
"""

import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from common.files import FileError, atomic_write, make_directory, open_regular
from launch.sampling.units import Rows

Part = dict[str, np.ndarray]
_ADVICE = "remove it, and its images are made again"
_KINDS = {"images": np.uint8, "latents": np.float32}
_NAME = re.compile(r"([0-9]{7,})-([0-9]{7,})\.npz")


class Parts:
    """The parts below a directory of results."""

    def __init__(self, output: Path):
        self.directory = output / "parts"

    def path(self, rows: Rows) -> Path:
        """The file of samples `rows[0]` to `rows[1]`."""
        return self.directory / f"{rows[0]:07d}-{rows[1]:07d}.npz"

    def begin(self) -> list[Rows]:
        """Make the directory and clear what killed processes left half written, on one process → the parts there."""
        make_directory(self.directory)
        for leftover in self.directory.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        return self.rows()

    def rows(self) -> list[Rows]:
        """The samples of each part that is there, in order."""
        matches = (_NAME.fullmatch(path.name) for path in self.directory.glob("*.npz"))
        return sorted((int(match[1]), int(match[2])) for match in matches if match)

    def write(self, rows: Rows, arrays: Part) -> None:
        """Keep arrays [rows[1] − rows[0], …] of these samples."""
        with atomic_write(self.path(rows)) as file:
            np.savez(file, first=rows[0], **cast(dict[str, Any], arrays))

    def read_all(self, total: int, wanted: str | None, counts: Sequence[str]) -> Iterator[tuple[Rows, Part]]:
        """All parts of samples 0 to `total`, in order, each with its samples.

        wanted: the images or latents that each must have, of one shape. counts: numbers that each must have.

        Raises FileError where a part is damaged, or samples are missing.
        """
        position, shape = 0, None
        for rows in self.rows():
            if rows[0] != position:
                break
            part = self._read(rows, wanted, counts)
            if wanted is not None and (shape := shape or part[wanted].shape[1:]) != part[wanted].shape[1:]:
                raise FileError(f"{self.path(rows)} holds {wanted} of another size than those before it: {_ADVICE}")
            yield rows, part
            position = rows[1]
        if position != total:
            raise FileError(
                f"{self.directory} holds the first {position:,} samples without a gap, where {total:,} are wanted: "
                "run it again, and those that are missing are made"
            )

    def _read(self, rows: Rows, wanted: str | None, counts: Sequence[str]) -> Part:
        path, count = self.path(rows), rows[1] - rows[0]
        try:
            with open_regular(path) as file, np.load(file) as content:
                part = dict(content)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            first_line = str(error).partition("\n")[0]
            raise FileError(f"{path} is damaged ({first_line}): {_ADVICE}") from None
        first = part.pop("first", None)
        complete = set(counts) <= part.keys() and (wanted is None or _is_kind(part.get(wanted), wanted))
        if not complete or first is None or any(array.shape[:1] != (count,) for array in part.values()):
            raise FileError(f"{path} does not hold {count} {wanted or 'images'}: {_ADVICE}")
        if first.tolist() != rows[0]:
            raise FileError(f"{path} holds the images from {first.tolist()} on: {_ADVICE}")
        return part

    def drop(self, rows: Rows) -> None:
        """Remove a part, so that its samples are made again."""
        self.path(rows).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove all parts; what they were gathered into is there."""
        shutil.rmtree(self.directory, ignore_errors=True)


def _is_kind(array: np.ndarray | None, name: str) -> bool:
    return array is not None and array.ndim == 4 and array.dtype == _KINDS[name]
