"""Images in files (of folders, tars or lists) to evaluate, decoded by threads, and what was seen of the files."""

import io
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path, PurePath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from launch.evaluation.npz_file import batch_ranges
from launch.runtime.read_ahead import read_in_threads
from vavae.decoders.choice import choose_decoder
from vavae.decoders.decoder import Crop, Decoder
from vavae.decoders.make import make_decoder
from vavae.image_files import FORMATS, UnreadableImage, decode_image
from vavae.images import to_uint8
from vavae.sources import Source, open_source

log = logging.getLogger(__name__)

THREADS = min(8, len(os.sched_getaffinity(0)))  # that decode, where a decoder takes several


@dataclass(frozen=True)
class Decoding:
    """How image files are decoded: fields of `vavae.config.DataConfig`, and the device; by default as published."""

    decoder: str = "pil"
    exif_rotation: bool = False
    device: str = "cpu"


AS_PUBLISHED = Decoding()


class EncodedImages:
    """The image files of a folder, of tars or of a list, a folder's by sorted path; see `vavae.sources`. With
    `by_index` in the order of the whole numbers that are their names, in whichever folders they are.

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
        by_index: bool = False,
    ):
        if crop not in ("center", "published_eval"):
            raise ValueError(f"crop {crop!r} is not known: center, published_eval")
        self.description, self._rotate = str(path), decoding.exif_rotation
        source = open_source(path, split="val", labelled=False)
        self._source = SeenFiles(source, image_size, _by_index(source) if by_index else range(len(source)))
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

    def seen(self, start: int, stop: int) -> dict[str, int]:
        """Of the images `start` to `stop` that were decoded: how many were stored with loss, how many had another size
        than asked for."""
        found = {"lossy": self._source.lossy, "resized": self._source.resized}
        return {kind: sum(start <= place < stop for place in places) for kind, places in found.items()}

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """See `ImageSource.batches`; decoded ahead by threads."""
        parts = batch_ranges(size, start, len(self) if stop is None else stop)
        if self._decoder is not None:
            threads = (self._decoder.most_readers or THREADS) if self._decoder.threaded else 1
            yield from read_in_threads(partial(self._squares, self._decoder), parts, threads=threads)
            return
        shape = None
        for block in read_in_threads(self._as_they_are, parts, threads=THREADS):
            for name, pixels in block:
                shape = shape or pixels.shape
                if pixels.shape != shape:
                    raise ValueError(
                        f"{name} is {as_size(pixels.shape)}, earlier ones are {as_size(shape)}: give an image size"
                    )
            yield torch.stack([pixels for _, pixels in block])

    def _as_they_are(self, part: range) -> list[tuple[str, Tensor]]:
        """Names and pixels, uint8 [H, W, 3], of the images at these places; raises UnreadableImage."""
        names = [self._source.name(index) for index in part]
        decoded = [
            decode_image(self._source.read(index), name, rotate=self._rotate)
            for index, name in zip(part, names, strict=True)
        ]
        return [(name, torch.from_numpy(np.array(image))) for name, image in zip(names, decoded, strict=True)]

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


def _by_index(source: Source) -> list[int]:
    """The places of a source's files in the order of the indices that are their names; raises ValueError for others."""
    stems = [PurePath(source.relative_name(place)).stem for place in range(len(source))]
    if wrong := [place for place, stem in enumerate(stems) if not (stem.isascii() and stem.isdigit())]:
        raise ValueError(f"{source.name(wrong[0])} is not named by its index, as images in folders of classes are")
    indices = [int(stem) for stem in stems]
    order = sorted(range(len(source)), key=indices.__getitem__)
    if twice := [b for a, b in pairwise(order) if indices[a] == indices[b]]:
        raise ValueError(f"{source.name(twice[0])}: there are two images of index {indices[twice[0]]}")
    return order


class SeenFiles:
    """A source's files, which notes of those that are read whether they were stored with loss, and in what size.

    Args:
        size: side of the squares that are made of the images; None where they stay as they are.
        order: the files' places in the source, in the order in which they are gone through.

    Attributes:
        lossy: places, in that order, of JPEG files, and of WebP files with a lossy frame.
        resized: places of images of which the squares are not all pixels as they were.
    """

    def __init__(self, source: Source, size: int | None, order: Sequence[int]):
        self._source, self._size, self._order = source, size, order
        self.lossy: set[int] = set()
        self.resized: set[int] = set()

    def __len__(self) -> int:
        return len(self._order)

    def name(self, index: int) -> str:
        return self._source.name(self._order[index])

    def read(self, index: int) -> bytes:
        """The whole file; raises UnreadableImage."""
        content = self._source.read(self._order[index])
        if is_lossy(content):
            self.lossy.add(index)
        if self._size is not None and _pixels(content) not in (None, (self._size, self._size)):
            self.resized.add(index)
        return content


def is_lossy(content: bytes) -> bool:
    """Whether a file is a JPEG, or a WebP with a frame of its lossy kind (`VP8 `), also inside an extended one."""
    if content[:3] == b"\xff\xd8\xff":
        return True
    if content[:4] != b"RIFF" or content[8:12] != b"WEBP":
        return False
    place = 12
    while place + 8 <= len(content):
        kind, size = content[place : place + 4], int.from_bytes(content[place + 4 : place + 8], "little")
        if kind in (b"VP8 ", b"VP8L"):
            return kind == b"VP8 "
        place += 24 if kind == b"ANMF" else 8 + size + size % 2  # an animation's frame holds such chunks
    return False


def _pixels(content: bytes) -> tuple[int, int] | None:
    """Width and height that the header of a file states; None where it cannot be read, as decoding it will say."""
    try:
        with Image.open(io.BytesIO(content), formats=sorted(set(FORMATS.values()))) as image:
            return image.size
    except Exception:  # Pillow's readers raise errors of many types for damaged files
        return None


def as_size(shape: Sequence[int]) -> str:
    """Width × height of an image [H, W, …], for messages."""
    return f"{shape[1]}×{shape[0]}"
