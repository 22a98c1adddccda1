"""JPEG headers: size and orientation of those files that every JPEG decoder reads alike."""

import io
from typing import NamedTuple

from PIL import Image

from vavae.image_files import UPRIGHT, orientation
from vavae.images import MAX_ASPECT_RATIO

_BEGIN, _END = b"\xff\xd8", b"\xff\xd9"
_RED_GREEN_BLUE = list(b"RGB")  # names of components that are no YCbCr, where no marker says what they are


class JpegHeader(NamedTuple):
    """Stored size in pixels, and EXIF orientation (1 to 8; 1 where it is not to be followed)."""

    height: int
    width: int
    orientation: int


def read_header(content: bytes, *, rotate: bool) -> JpegHeader | None:
    """The header of a JPEG file; None for everything that is left to Pillow.

    That is what is no JPEG, ends before its end marker, has four channels (whose meaning depends on Adobe's marker) or
    three that are no YCbCr, or is longer than `MAX_ASPECT_RATIO` times its short side.
    """
    if not (content.startswith(_BEGIN) and content.endswith(_END)):
        return None
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            names = [component for component, *_ in getattr(image, "layer", ())]
            if image.mode not in ("RGB", "L") or image.info.get("adobe_transform") == 0 or names == _RED_GREEN_BLUE:
                return None
            turned = orientation(image) if rotate else UPRIGHT
    except Exception:  # Pillow says of which kind when it is to decode the file
        return None
    width, height = image.size
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        return None
    return JpegHeader(height, width, turned)
