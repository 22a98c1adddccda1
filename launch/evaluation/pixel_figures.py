"""PSNR and SSIM of pairs of images, uint8 `[N, H, W, 3]`."""

import torch
from torch import Tensor

from vavae import images


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair of uint8 images `[N, H, W, 3]`: `20·log10(255/√mse)`.

    Returns `[N]` float64; a pair without any difference is `inf`.
    """
    _require_images(a, b)
    return images.psnr(a, b)  # a mean over all but the first dimension: the layout does not matter to it


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair of uint8 images `[N, H, W, 3]`, `[N]` float64; see `vavae.images.ssim`.

    Raises ValueError for images of fewer than 11 pixels a side.
    """
    _require_images(a, b)
    return images.ssim(*(x.permute(0, 3, 1, 2) for x in (a, b)))


def _require_images(a: Tensor, b: Tensor) -> None:
    for name, x in (("first", a), ("second", b)):
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[-1] != 3:
            raise ValueError(f"the {name} images must be uint8 [N, H, W, 3], got {x.dtype} {tuple(x.shape)}")
    if a.shape != b.shape:
        raise ValueError(f"images of different shapes cannot be compared: {tuple(a.shape)} and {tuple(b.shape)}")
