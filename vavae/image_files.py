"""Image files: reading them, and decoding them to 8-bit RGB."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from common.files import FileError, open_regular, refuse_placeholders

FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
# Files are recognised by content, and only as these: some of Pillow's other formats run programs.
_PILLOW_FORMATS = tuple(sorted(set(FORMATS.values())))
_TIFF_BITS, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_TIFF_SAMPLE_FORMAT, _UNSIGNED, _SIGNED = 339, 1, 2
_NO_RANGE = "whose black and white levels are not known; save it as unsigned 8 or 16 bits"


UPRIGHT = 1


class Turn(NamedTuple):
    """What turns stored pixels upright: rows and columns change places, then rows, then columns, run backwards.

    `by_pillow` is the same as Pillow's one step.
    """

    transpose: bool
    flip_rows: bool
    flip_columns: bool
    by_pillow: Image.Transpose | None


#: EXIF orientation → what it asks for.
TURNS = {
    UPRIGHT: Turn(False, False, False, None),
    2: Turn(False, False, True, Image.Transpose.FLIP_LEFT_RIGHT),
    3: Turn(False, True, True, Image.Transpose.ROTATE_180),
    4: Turn(False, True, False, Image.Transpose.FLIP_TOP_BOTTOM),
    5: Turn(True, False, False, Image.Transpose.TRANSPOSE),
    6: Turn(True, False, True, Image.Transpose.ROTATE_270),
    7: Turn(True, True, True, Image.Transpose.TRANSVERSE),
    8: Turn(True, True, False, Image.Transpose.ROTATE_90),
}


class UnreadableImage(FileError):
    """An image file that cannot be decoded; the message names it."""


def open_image(path: str | Path, *, rotate: bool = False) -> Image.Image:
    """A file decoded by `decode_image`; raises UnreadableImage where there is no file, or none that can be decoded."""
    return decode_image(read_image_file(path), path, rotate=rotate)


@contextmanager
def unreadable(name: str | Path) -> Iterator[None]:
    """Raises what hinders the reading of an image as UnreadableImage, which names it."""
    try:
        yield
    except FileError as error:
        raise UnreadableImage(f"cannot read image: {error}") from None
    except OSError as error:
        raise UnreadableImage(f"cannot read image {name}: {error.strerror or error}") from None


def read_image_file(path: str | Path) -> bytes:
    """The content of a file; raises UnreadableImage, naming it, where it is missing, empty, cut short or no file."""
    with unreadable(path), open_regular(path) as file:
        return whole(file.read(), os.fstat(file.fileno()).st_size, path)


def whole(content: bytes, size: int, name: str | Path) -> bytes:
    """The content of an image of so many bytes; raises FileError where it is empty, cut short or a placeholder."""
    if len(content) < size:
        raise FileError(f"{name} is cut short: {len(content):,} of {size:,} bytes")
    if not content:
        raise FileError(f"{name} is empty")
    refuse_placeholders(name, content[:100])
    return content


def decode_image(content: bytes, name: str | Path, *, rotate: bool = False) -> Image.Image:
    """A decoded image, RGB of 8 bits. Its content must be of one of `FORMATS`, whatever its name says.

    Grey of 9 to 16 bits is scaled so that white is 255, rounded to the nearest. Everything else is what Pillow's
    conversion gives: transparency is dropped, a palette looked up, colours of 16 bits lose their lower 8, of several
    images the first is taken. With `rotate` the tag that says how the camera was held (EXIF 0x0112) is followed; in
    TIFF files always, by Pillow itself.

    Raises:
        UnreadableImage, with `name`: damaged or empty content, of another kind, with more pixels than Pillow's limit
            (179 million), of signed or 32-bit integers, or of floats.
    """
    begin = content[:100]
    try:
        whole(content, len(content), name)
        with Image.open(io.BytesIO(content), formats=_PILLOW_FORMATS) as image:
            turn = TURNS[orientation(image) if rotate else UPRIGHT].by_pillow
            rgb = _rgb(image)
        return rgb if turn is None else rgb.transpose(turn)
    except FileError as error:
        raise UnreadableImage(f"cannot read image: {error}") from None
    except UnidentifiedImageError:
        found = f"it begins with {begin[:12]!r}, so it is none of {', '.join(_PILLOW_FORMATS)}, or damaged"
        raise UnreadableImage(f"cannot read image {name}: {found}") from None
    except Exception as error:  # Pillow's decoders raise errors of many types for damaged files
        raise UnreadableImage(f"cannot read image {name}: {error}") from error


def orientation(image: Image.Image) -> int:
    """How an opened image is to be turned once it is decoded: EXIF's 1 (not at all) to 8.

    1 where it says nothing that is known, and of TIFF files, which Pillow turns as it decodes them.
    """
    if isinstance(image, TiffImageFile):
        return UPRIGHT
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
    except Exception:  # damaged EXIF: the picture beside it may be whole
        return UPRIGHT
    return found if found in TURNS else UPRIGHT


def _rgb(image: Image.Image) -> Image.Image:
    # Pillow reads signed 8-bit samples as unsigned.
    if isinstance(image, TiffImageFile) and _SIGNED in image.tag_v2.get(_TIFF_SAMPLE_FORMAT, (_UNSIGNED,)):
        raise ValueError(f"its pixels are signed integers, {_NO_RANGE}")
    # Pillow decodes 16-bit PPM to 32-bit integers. (Its own conversion clips at 255 whatever the range.)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode in ("I", "F"):
        numbers = "floats" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"its pixels are {numbers}, {_NO_RANGE}")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Grey [H, W] of more than 8 bits, scaled by its range."""
    white, inverted = 65535, False
    if isinstance(image, TiffImageFile):  # decoded values are as stored in the file
        white = 2 ** image.tag_v2[_TIFF_BITS][0] - 1
        inverted = image.tag_v2[_TIFF_PHOTOMETRIC] == _WHITE_IS_ZERO
    values = np.asarray(image).astype(np.uint32)
    if inverted:
        values = white - values
    return ((values * 255 + white // 2) // white).astype(np.uint8)
