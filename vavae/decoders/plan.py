"""From stored pixels to a square, as sizes: what a decoder that scales by itself has to do to an image."""

from dataclasses import dataclass

import torch

from vavae.image_files import TURNS, UPRIGHT, Turn


@dataclass(frozen=True)
class CropPlan:
    """How stored pixels [height, width] become a square [size, size], all in their frame until it is turned upright.

    Fields:
        size: side of the square.
        halved: sizes (height, width) after each halving of the centre crop.
        scaled: size after the last scaling.
        top, left: of the square in the scaled image.
        turn: what turns the square upright.
    """

    size: int
    halved: tuple[tuple[int, int], ...]
    scaled: tuple[int, int]
    top: int
    left: int
    turn: Turn

    def upright(self, square: torch.Tensor) -> torch.Tensor:
        """The square [3, size, size], cut from the scaled image, turned upright."""
        if self.turn.transpose:
            square = square.transpose(1, 2)
        backwards = [dim for dim, flip in ((1, self.turn.flip_rows), (2, self.turn.flip_columns)) if flip]
        return square.flip(backwards) if backwards else square


def place_square(height: int, width: int, size: int, draw: int) -> tuple[int, int]:
    """Top and left of a square in an image, each place as likely: of 64 random bits, 32 choose each."""
    return (draw >> 32) % (height - size + 1), (draw & 0xFFFFFFFF) % (width - size + 1)


def plan_crop(height: int, width: int, size: int, crop: str, draw: int, orientation: int = UPRIGHT) -> CropPlan:
    """The plan for stored pixels [height, width], which gives what `vavae.images` gives for the image turned upright.

    Args:
        crop: `center` (ADM's centre crop) or `random` (short side to `size`, a square placed by `draw`).
        draw: 64 random bits.
        orientation: EXIF's, 1 to 8.
    """
    halved = []
    if crop == "center":
        while min(height, width) >= 2 * size:
            height, width = height // 2, width // 2
            halved.append((height, width))
        scale = size / min(height, width)
        height, width = round(height * scale), round(width * scale)
    else:
        short = min(height, width)
        height, width = size * height // short, size * width // short
    turn = TURNS[orientation]
    upright = (width, height) if turn.transpose else (height, width)
    if crop == "center":
        top, left = (upright[0] - size) // 2, (upright[1] - size) // 2
    else:
        top, left = place_square(*upright, size, draw)
    if turn.flip_rows:
        top = upright[0] - size - top
    if turn.flip_columns:
        left = upright[1] - size - left
    if turn.transpose:
        top, left = left, top
    return CropPlan(size, tuple(halved), (height, width), top, left, turn)
