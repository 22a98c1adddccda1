"""Images to evaluate, uint8 `[B, H, W, 3]` in a fixed order: of files (in folders, tars or lists) or an `.npz`."""

import logging
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from torch import Tensor

from common.files import open_regular
from launch.runtime.read_ahead import read_in_threads
from vavae.decoders.choice import choose_decoder
from vavae.decoders.decoder import Crop, Decoder
from vavae.decoders.make import make_decoder
from vavae.image_files import UnreadableImage, decode_image
from vavae.images import to_uint8
from vavae.sources import open_source

log = logging.getLogger(__name__)

ARRAY = "arr_0"  # the images' name inside an npz, as the ADM evaluator expects it
MAX_PIXELS = 2**24  # of an image in an npz, which is read by batches
THREADS = min(8, len(os.sched_getaffinity(0)))  # that decode, where a decoder takes several
MAX_BYTES = 2**30  # of statistics; Inception's are 34 MB


class ImageSource(Protocol):
    """Images that can be gone through as often as needed."""

    description: str

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[Tensor]:
        """uint8 `[size, H, W, 3]` (the last one may be smaller), always in the same order."""
        ...


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

    def batches(self, size: int) -> Iterator[Tensor]:
        image = math.prod(self.shape[1:])
        with _opened_array(self.path, ARRAY) as (file, *_):
            for start in range(0, len(self), size):
                count = min(size, len(self) - start)
                block = bytearray(file.read(count * image))
                if len(block) != count * image:
                    raise ValueError(
                        f"{self.path}: {ARRAY} ends after image {start + len(block) // image} of {len(self)}"
                    )
                yield torch.frombuffer(block, dtype=torch.uint8).view(count, *self.shape[1:])


@dataclass(frozen=True)
class Decoding:
    """How image files are decoded: fields of `vavae.config.DataConfig`, and the device; by default as published."""

    decoder: str = "pil"
    exif_rotation: bool = False
    device: str = "cpu"


AS_PUBLISHED = Decoding()


class EncodedImages:
    """The image files of a folder, of tars or of a list, a folder's by sorted path; see `vavae.sources`.

    All of one size, unless they are cropped to `image_size`: by `center` (ADM's centre crop) or `published_eval` (that
    of the published tokenizer evaluation). How many there are, what was left out and what decodes them is logged.

    Attributes:
        facts: how images are decoded and cropped; empty where they are not cropped (then Pillow decodes them).
    """

    def __init__(
        self,
        path: str | Path,
        image_size: int | None = None,
        crop: str = "center",
        decoding: Decoding = AS_PUBLISHED,
    ):
        if crop not in ("center", "published_eval"):
            raise ValueError(f"crop {crop!r} is not known: center, published_eval")
        self.description, self._rotate = str(path), decoding.exif_rotation
        self._source = open_source(path, split="val", labelled=False)
        self.facts: dict[str, str | bool | int] = {}
        self._decoder: Decoder | None = None
        if image_size is not None:
            name, reason = choose_decoder(decoding.decoder, decoding.device, crop=crop)
            self._decoder = make_decoder(
                name, Crop(crop, image_size, self._rotate), threads=THREADS, device=decoding.device
            )
            log.info("%s: decoded by %s on %s (%s)", path, name, self._decoder.device, reason)
            self.facts = {
                "decoder": name,
                "decoded_on": self._decoder.device.type,
                "exif_rotation": self._rotate,
                "crop": crop,
                "image_size": image_size,
            }

    def __len__(self) -> int:
        return len(self._source)

    def batches(self, size: int) -> Iterator[Tensor]:
        parts = [range(start, min(start + size, len(self))) for start in range(0, len(self), size)]
        if self._decoder is not None:
            threads = (self._decoder.most_readers or THREADS) if self._decoder.threaded else 1
            yield from read_in_threads(partial(self._squares, self._decoder), parts, threads=threads)
            return
        shape = None
        for part in parts:
            block = []
            for index in part:
                name = self._source.name(index)
                pixels = np.array(decode_image(self._source.read(index), name, rotate=self._rotate))
                shape = shape or pixels.shape
                if pixels.shape != shape:
                    raise ValueError(
                        f"{name} is {_size(pixels.shape)}, earlier ones are {_size(shape)}: give an image size"
                    )
                block.append(torch.from_numpy(pixels))
            yield torch.stack(block)

    def _squares(self, decoder: Decoder, part: range) -> Tensor:
        """Those of the images at these places, uint8 [B, S, S, 3] on the CPU; raises UnreadableImage."""
        squares = []
        for pixels, _ in decoder.squares(self._source, part, [0] * len(part)):
            if isinstance(pixels, UnreadableImage):
                raise pixels
            squares.append(pixels)
        images = torch.stack(squares).cpu()
        eight_bits = images if images.dtype == torch.uint8 else to_uint8(images)
        return eight_bits.permute(0, 2, 3, 1).contiguous()


def open_images(
    path: str | Path, image_size: int | None = None, crop: str = "center", decoding: Decoding = AS_PUBLISHED
) -> ImageSource:
    """The images at `path`: an `.npz` with `arr_0`, a folder with a `samples.npz` (as `sample` writes), or of files.

    Raises ValueError where there are none, or an npz holds others than squares of `image_size`: it is not cropped.
    """
    path = Path(path)
    if (path / "samples.npz").is_file():
        path = path / "samples.npz"
    if path.suffix != ".npz" or path.is_dir():
        return EncodedImages(path, image_size, crop, decoding)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if ARRAY not in npz_names(path):
        raise ValueError(f"{path} holds no images: no array {ARRAY!r}, only {', '.join(npz_names(path)) or 'nothing'}")
    images = NpzImages(path)
    if image_size is not None and images.shape[1:3] != (image_size, image_size):
        raise ValueError(
            f"{path} holds images of {_size(images.shape[1:])}; an image size of {image_size} crops those "
            "of folders only"
        )
    return images


def image_sides(images: ImageSource) -> tuple[int, int]:
    """Height and width of the images of a source, which are all of one size: those of the first."""
    return tuple(next(iter(images.batches(1))).shape[1:3])


def image_size(images: ImageSource) -> str:
    """Width × height of the images of a source, for messages; see `image_sides`."""
    return _size(image_sides(images))


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]}×{shape[0]}"


def npz_names(path: str | Path) -> list[str]:
    """Names of the arrays inside an npz; raises ValueError where it is no npz."""
    with _opened(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_npz(path: str | Path, name: str) -> np.ndarray:
    """An array of an npz as float64; raises ValueError where it is damaged, of another kind, or larger than 1 GiB."""
    with _opened_array(path, name) as (file, shape, fortran_order, dtype):
        size = math.prod(shape) * dtype.itemsize
        if dtype.kind not in "fiu" or not 0 < size <= MAX_BYTES:
            raise ValueError(
                f"{path}: {name} must be numbers of at most {MAX_BYTES:,} bytes, it is {dtype} {list(shape)}"
            )
        content = file.read(size)
        if len(content) != size:
            raise ValueError(f"{path}: {name} ends after {len(content):,} bytes of {size:,}")
        return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran_order else "C").astype(np.float64)


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
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, KeyError, RuntimeError, struct.error) as e:
        raise ValueError(f"{path} is not an npz, or is damaged: {e}") from None
