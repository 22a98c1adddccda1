"""Crops, PSNR, and conversions between 8-bit images and float images in [−1, 1]."""

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as TF


def to_float(pixels: np.ndarray) -> torch.Tensor:
    """8-bit [H, W, 3] → float32 [3, H, W] in [−1, 1]; see `to_float_batch`."""
    return to_float_batch(torch.from_numpy(np.array(pixels))[None])[0]


def to_float_batch(images: torch.Tensor) -> torch.Tensor:
    """8-bit [B, H, W, 3] → float32 [B, 3, H, W] in [−1, 1]: `(x/255 − ½)/½`, each step rounded as in torchvision."""
    return images.permute(0, 3, 1, 2).contiguous().float().div_(255.0).sub_(0.5).div_(0.5)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float images in [−1, 1] → 8 bits: `clamp(127.5·x + 128, 0, 255)`, truncated. Exact on what `to_float` gave."""
    return (127.5 * images + 128.0).clamp(0, 255).to(torch.uint8)


def psnr(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each image, [B], of two 8-bit batches [B, C, H, W]; infinite where equal."""
    mse = (x.double() - y.double()).square().mean(dim=(1, 2, 3))
    return 20.0 * torch.log10(255.0 / mse.sqrt())


MAX_ASPECT_RATIO = 32


def _limit_aspect_ratio(image: Image.Image) -> Image.Image:
    """The image, or its middle where its long side is more than `MAX_ASPECT_RATIO` times the short one: a row of 2,000
    pixels, scaled to 256 rows, would take a gigabyte."""
    longest = MAX_ASPECT_RATIO * min(image.size)
    width, height = (min(side, longest) for side in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre crop of ADM (arXiv 2105.05233): halve while the short side is at least twice `size`, then scale it.

    Halving averages (BOX), scaling is BICUBIC; odd margins leave the larger part at the bottom and on the right.
    """
    image = _limit_aspect_ratio(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """Scale (bilinear) so that the short side is `size`; the long side is rounded down.

    Only the middle is kept of an image beyond `MAX_ASPECT_RATIO`.
    """
    image = _limit_aspect_ratio(image)
    short = min(image.size)
    if short == size:
        return image
    return image.resize((size * image.width // short, size * image.height // short), Image.Resampling.BILINEAR)


def published_eval_crop(image: Image.Image, size: int) -> torch.Tensor:
    """Float32 [3, size, size] in [−1, 1] as the published tokenizers were evaluated: scaled and cropped as floats."""
    scaled = TF.resize(TF.to_tensor(_limit_aspect_ratio(image)), size, antialias=True)
    return TF.center_crop(scaled, size).sub_(0.5).div_(0.5)
