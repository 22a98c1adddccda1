"""The features of FDD, the Fréchet distance in DINOv2 (arXiv 2306.04675): the class token of ViT-L/14."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from common.files import FileError, path_exists, sha256
from launch.evaluation.features import FoundationRecord, read_description
from vavae.config import FoundationConfig
from vavae.foundation.model import IMAGENET
from vavae.foundation.registry import find, plan
from vavae.foundation.weights import build_from_file

SIZE = 224  # pixels a side that the network is given
_TRAINED = 518, 37  # those that it was trained with, and its patches a side
_OFFSET = 0.1  # that DINOv2's own code adds to the grid where it scales positions
#: Of files whose hash is known; the authors' `dinov2_vitl14_pretrain.pth` has 1,217,586,395 bytes.
KNOWN = {"d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428": "the authors' dinov2_vitl14_pretrain.pth"}


class ClassTokenFeatures:
    """The class token of a vision transformer behind its last norm, `dinov2 [B, width]` float32.

    As arXiv 2306.04675's evaluation has it: each image is scaled by Pillow, bicubic and antialiased, to 224 × 224 in 8
    bits, and brought to ImageNet's mean and standard deviation.

    Args:
        vit: a model of timm's for images of `size` pixels a side, on its device.
    """

    def __init__(self, vit: Any, size: int, facts: dict):
        self._vit, self._size = vit.eval().requires_grad_(False), size
        self._device = next(vit.parameters()).device
        self._mean, self._std = (torch.tensor(values).view(3, 1, 1).to(self._device) for values in IMAGENET)
        self._threads = ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0))), "resize")
        self.name = facts["name"]
        self.facts = facts | {
            "gives": {"dinov2": f"class token behind the last norm, {vit.num_features}"},
            "resize": f"{size} × {size}, bicubic with antialiasing (Pillow, 8 bits)",
        }

    @classmethod
    def from_file(cls, path: str | Path, device: torch.device | str = "cpu") -> "ClassTokenFeatures":
        """ViT-L/14's weights, the authors' file or timm's; a `FoundationRecord` beside it names another network.

        Raises ValueError: no file, or not those weights.
        """
        path, beside = Path(path), Path(path).with_suffix(".json")
        try:
            found = sha256(path)
            if path_exists(beside):
                record = read_description(beside)
                vit, size = _described(record, path)
                name = f"class token of {record.config.model_name}"
            else:
                vit, size, name = _large(path), SIZE, "dinov2 ViT-L/14, class token"
        except FileError as e:
            raise ValueError(f"--dinov2-weights: {e}") from None
        facts = {"name": name, "weights": str(path), "sha256": found, "published": found in KNOWN}
        return cls(vit.to(device), size, facts)

    def to(self, device: torch.device | str) -> None:
        """Move the network."""
        self._vit.to(device)
        self._device = next(self._vit.parameters()).device
        self._mean, self._std = self._mean.to(device), self._std.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        pixels = torch.stack(list(self._threads.map(self._scaled, images))).to(self._device)  # uint8 [B, S, S, 3]
        x = (pixels.permute(0, 3, 1, 2).float() / 255 - self._mean) / self._std
        return {"dinov2": self._vit.forward_features(x)[:, 0].float()}

    def _scaled(self, image: Tensor) -> Tensor:
        """uint8 [H, W, 3] → uint8 [S, S, 3]."""
        if tuple(image.shape[:2]) == (self._size, self._size):
            return image
        size = (self._size, self._size)
        return torch.from_numpy(np.array(Image.fromarray(image.numpy()).resize(size, Image.Resampling.BICUBIC)))


def _described(record: FoundationRecord, path: Path) -> tuple[nn.Module, int]:
    config = record.config.model_copy(update={"weights": str(path)})
    planned = plan(find(config.model_name), config, record.grid)
    return build_from_file(planned, str(path)), planned.input_size


def _large(path: Path) -> nn.Module:
    """DINOv2's ViT-L/14 for images of 224 pixels, its positions scaled as DINOv2's code does (timm's antialiases)."""
    pixels, grid = _TRAINED
    config = FoundationConfig(model_name="dinov2-l", weights=str(path), input_size=pixels)
    vit = build_from_file(plan(find("dinov2-l"), config, grid), str(path))
    return with_positions(vit, SIZE)


def with_positions(vit: Any, size: int) -> nn.Module:
    """A model of timm's for images of `size` pixels, its positions scaled as DINOv2's own code scales them."""
    positions = scale_positions(vit.pos_embed, size // vit.patch_embed.patch_size[0])
    vit.set_input_size(img_size=size)
    vit.pos_embed = nn.Parameter(positions, requires_grad=False)
    return vit


def scale_positions(positions: Tensor, side: int) -> Tensor:
    """Positions [1, 1 + g², D] of a class token and a grid → [1, 1 + side², D], by bicubic interpolation.

    DINOv2 asks for a scale of (side + 0.1) / g, so that positions lie a little closer than at side / g.
    """
    grid = round((positions.shape[1] - 1) ** 0.5)
    on_grid = positions[:, 1:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    scale = (side + _OFFSET) / grid
    scaled = F.interpolate(on_grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1], scaled.flatten(2).transpose(1, 2)], 1)
