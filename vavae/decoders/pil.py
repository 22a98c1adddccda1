"""Decoding by Pillow: the pixels that the published code was trained on."""

from collections.abc import Sequence

import numpy as np
import torch

from vavae.decoders.decoder import Crop, EncodedFiles, Square, cut_square, scale
from vavae.image_files import UnreadableImage


class PilDecoder:
    """See `Decoder`. With `cache`, scaled images are kept and never read again."""

    name, device, threaded = "pil", torch.device("cpu"), False
    most_readers: int | None = None

    def __init__(self, crop: Crop, *, cache: bool = False):
        self._crop = crop
        self._cache: dict[int, np.ndarray | torch.Tensor] | None = {} if cache else None

    def squares(self, files: EncodedFiles, indices: Sequence[int], draws: Sequence[int]) -> list[Square]:
        return [self._square(files, index, draw) for index, draw in zip(indices, draws, strict=True)]

    def _square(self, files: EncodedFiles, index: int, draw: int) -> Square:
        try:
            scaled = self._scaled(files, index)
        except UnreadableImage as error:
            return Square(error)
        return Square(cut_square(scaled, self._crop.size, draw))

    def _scaled(self, files: EncodedFiles, index: int) -> np.ndarray | torch.Tensor:
        if self._cache is None:
            return scale(files.read(index), files.name(index), self._crop)
        if index not in self._cache:
            self._cache[index] = scale(files.read(index), files.name(index), self._crop)
        return self._cache[index]
