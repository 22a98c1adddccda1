"""Images to measure, features small enough to take by hand, and what is measured of them by NumPy and SciPy."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import linalg, ndimage

import kernels
from vavae.config import AutoencoderConfig, FoundationConfig
from vavae.foundation import FoundationModel
from vavae.model import AutoencoderKL

FACTS = {
    "solver": "euler",
    "nfe": 49,
    "dtype": "float32",
    "guidance": 2.0,
    "hashes": {"model": "ab"},
    "guidance_scale": 2.0,
    "guidance_interval": [0.0, 1.0],
    "labels": "index modulo number of classes",
    "weights": "ema",
}


def images(seed, count=40, size=16, width=None, high=256):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, (count, size, width or size, 3), generator=generator, dtype=torch.uint8)


class MemoryImages:
    """An image source of one tensor, uint8 `[N, H, W, 3]`."""

    description = "memory"

    def __init__(self, pixels):
        self.images = pixels

    def __len__(self):
        return len(self.images)

    def batches(self, size, start=0, stop=None):
        return iter(self.images[start:stop].split(size))


def means(batch):
    """Twelve features: the colours of the quarters of an image."""
    quarters = batch.double().unflatten(1, (2, -1)).unflatten(3, (2, -1)).mean((2, 4))
    return {"features": quarters.flatten(1) / 10}


# Truths by NumPy and SciPy, from the definitions.


def quarters(pixels: torch.Tensor) -> np.ndarray:
    """The features of `means`, [N, 12]."""
    half = pixels.shape[1] // 2
    x = pixels.numpy().astype(np.float64)
    parts = [x[:, i : i + half, j : j + half].mean((1, 2)) for i in (0, half) for j in (0, half)]
    return np.concatenate(parts, 1) / 10


def moments(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of the features of `means`."""
    x = quarters(pixels)
    return torch.from_numpy(x.mean(0)), torch.from_numpy(np.cov(x.T))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of features [N, D] and [M, D]."""
    one, other = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(one @ other).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + other - 2 * root))


def share_inside(centres: np.ndarray, points: np.ndarray) -> float:
    """Of the points, those that lie within the distance of some centre to its third nearest neighbour."""
    radii = [sorted(np.linalg.norm(centres - c, axis=1))[3] for c in centres]
    return float(np.mean([any(np.linalg.norm(centres - p, axis=1) <= radii) for p in points]))


def peak_ratio(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR in dB, the mean over images [N, H, W, 3]."""
    errors = ((a.astype(np.float64) - b) ** 2).mean((1, 2, 3))
    return float((10 * np.log10(255**2 / errors)).mean())


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM, the mean over images, of windows that lie inside: SciPy's Gaussian of 11 pixels reaches 5 to each side."""

    def blur(x):
        return ndimage.gaussian_filter(x, (0, 1.5, 1.5, 0), truncate=3.5)[:, 5:-5, 5:-5]

    a, b = a.astype(np.float64), b.astype(np.float64)
    x, y = blur(a), blur(b)
    c, d = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * x * y + c) * (2 * (blur(a * b) - x * y) + d)
    return float((top / ((x**2 + y**2 + c) * (blur(a * a) - x**2 + blur(b * b) - y**2 + d))).mean())


def save_folder(folder, pixels):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image.numpy()).save(folder / f"{i:03d}.png")
    return folder


def small_foundation(folder: Path) -> Path:
    """A small vision transformer's weights for 16 × 16 pixels, with the JSON that says how to build it."""
    torch.manual_seed(1)
    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2}
    config = FoundationConfig(model_name="vit_tiny_patch16_224", model_args=arguments, normalization="published")
    path = folder / "net.safetensors"
    FoundationModel.classifier(config, 4, 10).save(path)
    path.with_suffix(".json").write_text(json.dumps({"config": config.model_dump(mode="json"), "grid": 4}))
    return path


def small_tokenizer() -> AutoencoderKL:
    torch.manual_seed(0)
    config = AutoencoderConfig(
        embed_dim=4, z_channels=4, ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), resolution=16
    )
    return AutoencoderKL(config, kernels.select("reference")).eval()
