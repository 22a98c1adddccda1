"""Decoding by torchvision: libjpeg-turbo on a CPU, nvJPEG on a GPU; scaling by torch, where the pixels are."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from vavae.decoders.decoder import Crop
from vavae.decoders.jpeg_decoder import Jpeg, JpegDecoder
from vavae.decoders.plan import CropPlan

_MOST_IN_A_BIN = 3  # elements that one of the halves of a row is the mean of


class TorchvisionDecoder(JpegDecoder):
    """See `Decoder`."""

    name = "torchvision"

    def __init__(self, crop: Crop, *, threads: int, device: torch.device | str = "cpu"):
        super().__init__(crop, threads=threads, device=device)
        self._mode = "bicubic" if crop.kind == "center" else "bilinear"

    def _decode(self, group: Sequence[Jpeg]) -> Sequence[torch.Tensor]:
        files = (torch.frombuffer(bytearray(jpeg.content), dtype=torch.uint8) for jpeg in group)
        if self.device.type == "cuda":
            images = iter(decode_jpeg(list(files), mode=ImageReadMode.RGB, device=self.device))
        else:
            images = (decode_jpeg(file, mode=ImageReadMode.RGB) for file in files)
        return [scaled_square(image, jpeg.plan, self._mode) for image, jpeg in zip(images, group, strict=True)]


def scaled_square(image: torch.Tensor, plan: CropPlan, mode: str) -> torch.Tensor:
    """The square uint8 [3, S, S] of an image uint8 [3, H, W]; `mode`: of the last scaling, bilinear or bicubic."""
    for size in plan.halved:
        image = halve(image) if image.is_cuda else _halve_by_pillow(image, size)
    x = image[None]  # [1, 3, H, W]
    if x.shape[2:] != plan.scaled:
        x = _resize(x, plan.scaled, mode)
    x = x[0, :, plan.top : plan.top + plan.size, plan.left : plan.left + plan.size]
    return plan.upright(x)


def _resize(x: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """8-bit images [1, 3, H, W] scaled as Pillow scales them, but for rounding; on a GPU by way of floats."""
    if x.device.type == "cpu":
        return F.interpolate(x, size, mode=mode, antialias=True)
    return F.interpolate(x.float(), size, mode=mode, antialias=True).round_().clamp_(0, 255).to(torch.uint8)


def _halve_by_pillow(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The same, several times as fast on a CPU."""
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size[::-1], Image.Resampling.BOX)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def halve(image: torch.Tensor) -> torch.Tensor:
    """An image uint8 [3, H, W] at half its size, rounded down, as Pillow's BOX gives it."""
    return _halve(_halve(image, 2), 1)


def _halve(x: torch.Tensor, dim: int) -> torch.Tensor:
    """8-bit numbers halved along `dim` as Pillow's BOX does: rounded means of 2, of an odd length some of 3 or 1."""
    starts, counts = _box_bins(x.shape[dim], x.device)  # [length // 2]
    total = x.new_zeros((), dtype=torch.int16)
    counts = counts.view([-1 if d == dim else 1 for d in range(x.ndim)])
    for offset in range(_MOST_IN_A_BIN):
        places = (starts + offset).clamp_(max=x.shape[dim] - 1)
        total = total + x.index_select(dim, places) * (counts > offset).to(torch.int16)
    return ((2 * total + counts) // (2 * counts)).to(torch.uint8)


@lru_cache(maxsize=1024)
def _box_bins(length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """First element (int64) and number (int16) of those that each of the halves is the mean of, [length // 2] each.

    In Pillow's order of double-precision operations (`precompute_coeffs`), which decides about elements at the edges.
    """
    scale = length / (length // 2)
    centers = (np.arange(length // 2) + 0.5) * scale
    starts = np.maximum((centers - 0.5 * scale + 0.5).astype(np.int64), 0)
    ends = np.minimum((centers + 0.5 * scale + 0.5).astype(np.int64), length)
    places = starts[:, None] + np.arange(4)  # at most 3, and one beyond
    distances = (places - centers[:, None] + 0.5) * (1 / scale)
    inside = (places < ends[:, None]) & (distances > -0.5) & (distances <= 0.5)
    bins = starts + inside.argmax(1), inside.sum(1).astype(np.int16)
    first, counts = (torch.from_numpy(values).to(device) for values in bins)
    return first, counts
