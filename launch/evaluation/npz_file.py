"""Arrays of an `.npz`, read as far as they are needed (images by batches, statistics, labels, a text), and written."""

import math
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from common.files import FileError, open_regular
from launch.runtime.read_ahead import read_in_threads

ARRAY = "arr_0"  # the images' name inside an npz, as the ADM evaluator expects it
LABELS = "arr_1"  # that of their labels, where they have some
MAX_PIXELS = 2**24  # of an image in an npz, which is read by batches
MAX_BYTES = 2**30  # of statistics; Inception's are 34 MB
MAX_TEXT = 2**20


def batch_ranges(size: int, start: int, stop: int) -> Iterator[range]:
    """The images `start` to `stop` in batches of `size`, of which the last may be smaller."""
    return (range(first, min(first + size, stop)) for first in range(start, stop, size))


class NpzImages:
    """The array `arr_0`, uint8 `[N, H, W, 3]`, of an npz, read batch by batch: 50,000 images of 256² are 10 GB.

    Raises ValueError, naming the file, where it is no npz, is damaged, or holds something else or nothing.
    """

    def __init__(self, path: str | Path):
        self.path, self.description = Path(path), str(path)
        with _opened_array(self.path, ARRAY) as (_, shape, fortran_order, dtype):
            if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran_order:
                raise ValueError(
                    f"{self.path}: {ARRAY} must be uint8 [N, H, W, 3] in C order, it is {dtype} {list(shape)}"
                )
            if min(shape) < 1 or shape[1] * shape[2] > MAX_PIXELS:
                raise ValueError(
                    f"{self.path}: {ARRAY} is {list(shape)}; wanted is an image at least, each of at most "
                    f"{MAX_PIXELS:,} pixels"
                )
            self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """See `ImageSource.batches`; read ahead by a thread."""
        with _opened_array(self.path, ARRAY) as (file, *_):
            if start:
                file.seek(file.tell() + start * math.prod(self.shape[1:]))
            parts = batch_ranges(size, start, len(self) if stop is None else stop)
            yield from read_in_threads(partial(self._block, file), parts, threads=1)

    def _block(self, file: IO[bytes], part: range) -> Tensor:
        """The next images of an opened array, those of `part`, uint8 `[b, H, W, 3]`."""
        image = math.prod(self.shape[1:])
        with _damage_named(self.path):
            block = bytearray(file.read(len(part) * image))
        if len(block) != len(part) * image:
            raise ValueError(f"{self.path}: {ARRAY} ends after image {part[0] + len(block) // image} of {len(self)}")
        return torch.frombuffer(block, dtype=torch.uint8).view(len(part), *self.shape[1:])

    def array(self, name: str) -> np.ndarray | None:
        """Another array beside the images, as float64; None where there is none. Raises ValueError as `read_npz`."""
        return read_npz(self.path, name) if name in npz_names(self.path) else None


def npz_names(path: str | Path) -> list[str]:
    """Names of the arrays inside an npz; raises ValueError where it is no npz."""
    with _opened(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_text_of(path: str | Path, name: str) -> str | None:
    """A text of an npz, as `numpy.savez` stores one; None where there is none; raises ValueError for anything else."""
    if name not in npz_names(path):
        return None
    with _opened_array(path, name) as (file, shape, _, dtype):
        if dtype.kind != "U" or shape != () or not 0 < dtype.itemsize <= MAX_TEXT:
            raise ValueError(
                f"{path}: {name} must be a text of at most {MAX_TEXT:,} bytes, it is {dtype} {list(shape)}"
            )
        content = file.read(dtype.itemsize)
        if len(content) != dtype.itemsize:
            raise ValueError(f"{path}: {name} ends after {len(content):,} bytes of {dtype.itemsize:,}")
        try:
            return str(np.frombuffer(content, dtype)[0])
        except ValueError as e:
            raise ValueError(f"{path}: {name} is no text: {e}") from None


def read_npz(path: str | Path, name: str) -> np.ndarray:
    """An array of an npz as float64; raises ValueError where it is damaged, of another kind, or larger than 1 GiB."""
    with _opened_array(path, name) as (file, shape, fortran_order, dtype):
        size = math.prod(shape) * dtype.itemsize
        if dtype.kind not in "fiu":
            raise ValueError(f"{path}: {name} must be numbers, it is {_kind(dtype)} {list(shape)}")
        if not 0 < size <= MAX_BYTES:
            raise ValueError(
                f"{path}: {name} must be numbers of at most {MAX_BYTES:,} bytes, it is {dtype} {list(shape)}"
            )
        content = file.read(size)
        if len(content) != size:
            raise ValueError(f"{path}: {name} ends after {len(content):,} bytes of {size:,}")
        return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran_order else "C").astype(np.float64)


def write_images(archive: zipfile.ZipFile, count: int, blocks: Iterable[np.ndarray]) -> None:
    """Write `arr_0` of blocks uint8 `[b, H, W, 3]`, one at least, which are `count` images together."""
    with _new_member(archive, ARRAY) as file:
        for number, block in enumerate(blocks):
            if not number:
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, *block.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(block.tobytes())


def write_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    with _new_member(archive, name) as file:
        np.lib.format.write_array(file, array, allow_pickle=False)


def _new_member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    # A ZipInfo of one's own has a fixed date: equal arrays are equal files.
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)


def read_npy(path: Path) -> np.ndarray:
    """The array of an .npy; raises FileError where it is none, or is damaged."""
    with open_regular(path) as file:
        try:
            return np.load(file, allow_pickle=False)
        except (ValueError, OSError, EOFError) as e:
            first_line = str(e).partition("\n")[0]
            raise FileError(f"{path} is damaged, or no .npy: {first_line}") from None


def _kind(dtype: np.dtype) -> str:
    """A kind of values in words, where they are no numbers."""
    return {"U": "text", "S": "text", "O": "objects", "b": "booleans"}.get(dtype.kind, str(dtype))


@contextmanager
def _opened_array(path: str | Path, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], bool, np.dtype]]:
    """An array of an npz: its file, behind the header, and the header: shape, whether in Fortran order, dtype."""
    with _opened(path) as archive, archive.open(f"{name}.npy") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            header = read(file)
        except Exception as e:  # the header is a Python literal, and a damaged one fails in many ways
            first_line = str(e).partition("\n")[0]
            raise ValueError(f"{path}: {name} is no array, or is damaged: {first_line}") from None
        yield file, *header


@contextmanager
def _opened(path: str | Path) -> Iterator[zipfile.ZipFile]:
    with _damage_named(path), open_regular(path) as file, zipfile.ZipFile(file) as archive:
        yield archive


@contextmanager
def _damage_named(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, KeyError, RuntimeError, struct.error) as e:
        raise ValueError(f"{path} is not an npz, or is damaged: {e}") from None
