"""Decoders that read most JPEG files themselves, in groups and on whatever device, and leave all else to Pillow."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import torch

from vavae.decoders.decoder import Crop, EncodedFiles, Square, cut_square, scale
from vavae.decoders.jpeg import read_header
from vavae.decoders.plan import CropPlan, plan_crop
from vavae.image_files import UnreadableImage

log = logging.getLogger(__name__)

GROUP_PIXELS = 2**26  # decoded at once, so that a batch of large photographs fits: 200 MB


@dataclass(frozen=True)
class Jpeg:
    """A JPEG file that a decoder reads itself, its place among the files, and what becomes of its pixels."""

    index: int
    content: bytes
    height: int
    width: int
    plan: CropPlan


class JpegDecoder:
    """See `Decoder`. Sub-classes decode groups of JPEG files.

    Args:
        threads: that read files, and decode by Pillow, for a GPU, whose memory is to hold few batches at a time. On a
            CPU each caller does all for its batch.
        device: where images are decoded.
    """

    name: str
    threaded = True

    def __init__(self, crop: Crop, *, threads: int, device: torch.device | str = "cpu"):
        assert crop.kind in ("random", "center")
        self._crop, self._threads, self.device = crop, threads, torch.device(device)
        self._spreads = self.device.type == "cuda" and threads > 1
        self.most_readers = 2 if self.device.type == "cuda" else None
        self._failed: set[int] = set()

    def _decode(self, group: Sequence[Jpeg]) -> Sequence[torch.Tensor]:
        """Squares uint8 [3, S, S] on the device; raises RuntimeError where one of the files cannot be decoded."""
        raise NotImplementedError

    def squares(self, files: EncodedFiles, indices: Sequence[int], draws: Sequence[int]) -> list[Square]:
        read = list(self._map(lambda index, draw: self._read(files, index, draw), indices, draws))
        found: dict[int, Square] = {}
        for group in _groups([(place, jpeg) for place, jpeg in enumerate(read) if isinstance(jpeg, Jpeg)]):
            found |= self._squares_of_group(group, files)
        rest = [place for place in range(len(read)) if place not in found]

        def by_pillow(place: int) -> torch.Tensor | UnreadableImage:
            return self._by_pillow(files.name(indices[place]), read[place], draws[place])

        for place, pixels in zip(rest, self._map(by_pillow, rest), strict=True):
            there = pixels if isinstance(pixels, UnreadableImage) else pixels.to(self.device)
            found[place] = Square(there, by_pillow=True)
        return [found[place] for place in range(len(read))]

    def _read(self, files: EncodedFiles, index: int, draw: int) -> Jpeg | bytes | UnreadableImage:
        """A file for this decoder, or one for Pillow, or why there is none."""
        try:
            content = files.read(index)
        except UnreadableImage as error:
            return error
        header = None if index in self._failed else read_header(content, rotate=self._crop.rotate)
        if header is None:
            return content
        height, width, orientation = header
        plan = plan_crop(height, width, self._crop.size, self._crop.kind, draw, orientation)
        return Jpeg(index, content, height, width, plan)

    def _squares_of_group(self, group: Sequence[tuple[int, Jpeg]], files: EncodedFiles) -> dict[int, Square]:
        """Squares by place; without those of files that turn out not to be this decoder's."""
        try:
            decoded = self._decode([jpeg for _, jpeg in group])
            if self.device.type == "cuda":  # libraries reuse on streams of their own what this one may still read
                torch.cuda.current_stream(self.device).synchronize()
            return {place: Square(pixels) for (place, _), pixels in zip(group, decoded, strict=True)}
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except RuntimeError as error:
            if len(group) == 1:
                self._leave_to_pillow(group[0][1], files, error)
                return {}
        # Each alone: what is at fault with one file must not change which decoder reads the others.
        return {place: square for one in group for place, square in self._squares_of_group([one], files).items()}

    def _leave_to_pillow(self, jpeg: Jpeg, files: EncodedFiles, error: RuntimeError) -> None:
        """Not to fail on a file again; the first one is logged, as it may be the decoder's fault."""
        if not self._failed:
            reason = str(error).partition("\n")[0]
            log.warning("%s fails on %s, which Pillow decodes: %s", self.name, files.name(jpeg.index), reason)
        self._failed.add(jpeg.index)

    def _by_pillow(self, name: str, read: Jpeg | bytes | UnreadableImage, draw: int) -> torch.Tensor | UnreadableImage:
        if isinstance(read, UnreadableImage):
            return read
        content = read.content if isinstance(read, Jpeg) else read
        try:
            return cut_square(scale(content, name, self._crop), self._crop.size, draw)
        except UnreadableImage as error:
            return error

    def _map(self, function: Callable, *arguments: Iterable) -> Iterable:
        return self._pool.map(function, *arguments) if self._spreads else map(function, *arguments)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        # One thread of torch in each, lest every one start a team for its part of an image.
        return ThreadPoolExecutor(self._threads, self.name, initializer=torch.set_num_threads, initargs=(1,))


def _groups(jpegs: Sequence[tuple[int, Jpeg]]) -> Iterator[list[tuple[int, Jpeg]]]:
    """Runs of files of at most `GROUP_PIXELS` pixels together, or of one file."""
    group: list[tuple[int, Jpeg]] = []
    pixels = 0
    for place, jpeg in jpegs:
        more = jpeg.height * jpeg.width
        if group and pixels + more > GROUP_PIXELS:
            yield group
            group, pixels = [], 0
        group.append((place, jpeg))
        pixels += more
    if group:
        yield group
