"""Crops, PSNR, SSIM, and conversions between 8-bit images and float images in [−1, 1]."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import functional as TF

SSIM_WINDOW = 11  # pixels a side, and the least of an image that has an SSIM
SSIM_SIGMA = 1.5


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


def ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each image, [B] float64, of two 8-bit batches [B, C, H, W].

    The form of Wang et al. (IEEE TIP 2004) on each colour channel: an 11-wide Gaussian of 1.5 pixels, windows inside
    the image only, (0.01·255)² and (0.03·255)² as stabilisers, the mean over positions and channels.

    Raises ValueError for images of fewer than 11 pixels a side.
    """
    if min(x.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs images of at least {SSIM_WINDOW} pixels a side, got {tuple(x.shape[2:])}")
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=x.device) - (SSIM_WINDOW - 1) / 2
    gauss = (-offsets.square() / (2 * SSIM_SIGMA**2)).exp()
    gauss /= gauss.sum()

    def blur(v: torch.Tensor) -> torch.Tensor:  # separable, each channel by itself
        return F.conv2d(F.conv2d(v, gauss.view(1, 1, -1, 1)), gauss.view(1, 1, 1, -1))

    a, b = (v.flatten(0, 1).unsqueeze(1).double() for v in (x, y))  # [B·C, 1, H, W]
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a.square(), blur(b * b) - mean_b.square()
    cov = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return (luminance * structure).view(len(x), -1).mean(1)


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
