"""Where images to measure come from: a folder of files or an `.npz`. uint8 `[B, H, W, 3]`, a fixed order."""

import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vavae.image_files import EXTENSIONS, ImageListing, open_image
from vavae.images import center_crop, published_eval_crop, to_uint8

log = logging.getLogger(__name__)

ARRAY = "arr_0"  # the images' name inside an npz, as the ADM evaluator expects it


class ImageSource(Protocol):
    """Images that can be gone through as often as needed."""

    description: str

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[Tensor]:
        """uint8 `[size, H, W, 3]` (the last one may be smaller), always in the same order."""
        ...


class NpzImages:
    """The array `arr_0`, uint8 `[N, H, W, 3]`, of an npz, read batch by batch: 50,000 images of 256² are 10 GB."""

    def __init__(self, path: str | Path):
        self.path, self.description = Path(path), str(path)
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{ARRAY}.npy") as file:
            self.shape = self._header(file)

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int) -> Iterator[Tensor]:
        image = int(np.prod(self.shape[1:]))
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{ARRAY}.npy") as file:
            self._header(file)
            for start in range(0, len(self), size):
                count = min(size, len(self) - start)
                block = bytearray(file.read(count * image))
                if len(block) != count * image:
                    raise ValueError(
                        f"{self.path}: {ARRAY} ends after image {start + len(block) // image} of {len(self)}"
                    )
                yield torch.frombuffer(block, dtype=torch.uint8).view(count, *self.shape[1:])

    def _header(self, file) -> tuple[int, ...]:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(file)
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran_order:
            raise ValueError(f"{self.path}: {ARRAY} must be uint8 [N, H, W, 3] in C order, it is {dtype} {list(shape)}")
        return shape


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
            raise ValueError(f"no images below {self.path} (of {', '.join(sorted(EXTENSIONS))})"
                             f"{listing.describe_left_out()}")
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
                    raise ValueError(f"{file} is {_size(pixels)}, earlier ones are {_size(shape)}: give an image size")
                block.append(pixels)
            yield torch.stack(block)

    def _pixels(self, image: Image.Image) -> Tensor:
        if self.image_size is None:
            return torch.from_numpy(np.array(image))
        if self.crop == "published_eval":
            return to_uint8(published_eval_crop(image, self.image_size)).permute(1, 2, 0)
        return torch.from_numpy(np.array(center_crop(image, self.image_size)))


def _size(pixels: Tensor | torch.Size) -> str:
    shape = pixels if isinstance(pixels, torch.Size) else pixels.shape
    return f"{shape[1]}×{shape[0]}"


def open_images(path: str | Path, image_size: int | None = None, crop: str = "center") -> ImageSource:
    """The images at `path`: an `.npz` with `arr_0`, a folder with a `samples.npz` (as `sample` writes), or of files.

    Raises ValueError where there are none.
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
    return NpzImages(path)


def npz_names(path: str | Path) -> list[str]:
    """Names of the arrays inside an npz; raises ValueError where it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except zipfile.BadZipFile as e:
        raise ValueError(f"{path} is not an npz: {e}") from None
