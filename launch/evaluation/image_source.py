"""Images to evaluate, from a folder of files or an `.npz`, in batches: uint8 `[B, H, W, 3]` in a fixed order."""

import logging
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.files import open_regular
from vavae.image_files import EXTENSIONS, ImageListing, open_image
from vavae.images import center_crop, published_eval_crop, to_uint8

log = logging.getLogger(__name__)

ARRAY = "arr_0"  # the images' name inside an npz, as the ADM evaluator expects it
MAX_PIXELS = 2**24  # of an image in an npz, which is read by batches
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


class FolderImages:
    """The image files below a folder, by sorted path. All of one size, unless they are cropped to `image_size`.

    How many there are and what was left out is logged.

    `crop` is `center` (ADM's centre crop) or `published_eval` (that of the published tokenizer evaluation).
    """

    def __init__(self, path: str | Path, image_size: int | None = None, crop: str = "center"):
        if crop not in ("center", "published_eval"):
            raise ValueError(f"crop {crop!r} is not known: center, published_eval")
        self.path, self.description = Path(path), str(path)
        self.image_size, self.crop = image_size, crop
        listing = ImageListing(self.path)
        self.files = sorted(self.path / file for file in listing.images())
        listing.refuse_empty()
        if not self.files:
            raise ValueError(
                f"no images below {self.path} (of {', '.join(sorted(EXTENSIONS))}){listing.describe_left_out()}"
            )
        log.info("%s: %s images%s", self.path, f"{len(self.files):,}", listing.describe_left_out())

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, size: int) -> Iterator[Tensor]:
        shape = None
        for start in range(0, len(self), size):
            block = []
            for file in self.files[start : start + size]:
                pixels = self._pixels(open_image(file))
                shape = shape or pixels.shape
                if pixels.shape != shape:
                    raise ValueError(
                        f"{file} is {_size(pixels.shape)}, earlier ones are {_size(shape)}: give an image size"
                    )
                block.append(pixels)
            yield torch.stack(block)

    def _pixels(self, image: Image.Image) -> Tensor:
        if self.image_size is None:
            return torch.from_numpy(np.array(image))
        if self.crop == "published_eval":
            return to_uint8(published_eval_crop(image, self.image_size)).permute(1, 2, 0)
        return torch.from_numpy(np.array(center_crop(image, self.image_size)))


def open_images(path: str | Path, image_size: int | None = None, crop: str = "center") -> ImageSource:
    """The images at `path`: an `.npz` with `arr_0`, a folder with a `samples.npz` (as `sample` writes), or of files.

    Raises ValueError where there are none, or an npz holds others than squares of `image_size`: it is not cropped.
    """
    path = Path(path)
    if (path / "samples.npz").is_file():
        path = path / "samples.npz"
    if path.is_dir():
        return FolderImages(path, image_size, crop)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.suffix != ".npz":
        raise ValueError(f"{path} is neither a folder of images nor an .npz")
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
