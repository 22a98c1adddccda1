"""What every decoder of images is: many encoded files in, squares of one size out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from vavae.decoders.plan import place_square
from vavae.image_files import UnreadableImage, decode_image
from vavae.images import center_crop, published_eval_crop, resize_short_side


class EncodedFiles(Protocol):
    """Image files by index, in some order; both methods may be called from several threads at once."""

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> bytes:
        """The whole file; raises UnreadableImage where it cannot be read."""
        ...


class Square(NamedTuple):
    """One decoded image, or why there is none.

    Fields:
        pixels: uint8 [3, S, S], or float32 [3, S, S] in [−1, 1] of the crop that is one of floats.
        by_pillow: whether Pillow stood in for a decoder that does not read such a file.
    """

    pixels: torch.Tensor | UnreadableImage
    by_pillow: bool = False


@dataclass(frozen=True)
class Crop:
    """How images become squares.

    Fields:
        kind: `random`, `center` or `published_eval`, as in `DataConfig`.
        size: side of the squares.
        rotate: whether EXIF orientation is followed.
    """

    kind: str
    size: int
    rotate: bool


class Decoder(Protocol):
    """Decodes, scales and crops image files.

    Attributes:
        name: as in `data.decoder`.
        device: where the squares are.
        threaded: it may be called from several threads at once, and leaves Python's lock to others while it works.
            Otherwise it is for processes.
        most_readers: threads of which more would only hold more batches in memory, as it spreads each over threads
            of its own; None where there is no such number.
    """

    name: str
    device: torch.device
    threaded: bool
    most_readers: int | None

    def squares(self, files: EncodedFiles, indices: Sequence[int], draws: Sequence[int]) -> list[Square]:
        """The squares of the files at `indices`; a random crop is placed by the 64 bits of its draw."""
        ...


def scale(content: bytes, name: str, crop: Crop) -> np.ndarray | torch.Tensor:
    """A file decoded and scaled by Pillow: uint8 [h, w, 3], or float32 [3, S, S] of the crop that is one of floats.

    Raises UnreadableImage.
    """
    image = decode_image(content, name, rotate=crop.rotate)
    if crop.kind == "published_eval":
        return published_eval_crop(image, crop.size)
    scaled = center_crop if crop.kind == "center" else resize_short_side
    return np.asarray(scaled(image, crop.size))


def cut_square(scaled: np.ndarray | torch.Tensor, size: int, draw: int) -> torch.Tensor:
    """The square [3, S, S] of what `scale` gives, placed by `draw` where it is larger; of 8-bit images a copy."""
    if isinstance(scaled, torch.Tensor):
        return scaled
    height, width = scaled.shape[:2]
    top, left = place_square(height, width, size, draw)
    return torch.from_numpy(np.array(scaled[top : top + size, left : left + size])).permute(2, 0, 1)
