"""`FoundationModel`: images in, features for the latents out."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from common.tensors import write_tensors
from vavae.config import FoundationConfig
from vavae.foundation.registry import Entry, Plan, create, drop_heads, feature_map, find, plan
from vavae.foundation.relative_positions import gather_relative_positions
from vavae.foundation.weights import build_from_file

log = logging.getLogger(__name__)

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
AS_IT_IS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # which bring pixels from 0 to 1 to [−1, 1]


class FoundationModel(nn.Module):
    """Feature maps of a model of timm at the latents' grid.

    The model works in the dtype of its weights, and so are the features. Normalisation and every resizing are done in
    float32, whatever the images and the weights are.

    Args:
        vit: a model of timm's, built as `plan` says.
        plan: its input size, and the features that it gives.
        grid: latent positions along a side.
        mean, std: of the images that the model was trained with, per channel, for pixels from 0 to 1.
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, vit: nn.Module, plan: Plan, grid: int, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.vit = vit
        self.width, self.input_size, self.grid = plan.width, plan.input_size, grid
        self.resize: Mapping[str, Any] = dict(plan.resize)
        # ((x + 1) / 2 − mean) / std, as one multiply-add
        shift = (0.5 - torch.tensor(mean)) / torch.tensor(std)
        self.register_buffer("shift", shift.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", (0.5 / torch.tensor(std)).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, config: FoundationConfig, grid: int, *, pretrained: bool = True) -> "FoundationModel":
        """The frozen model with its weights, which gives features at grid × grid positions.

        Args:
            config: which model, its weights and its input.
            grid: latent positions along a side.
            pretrained: False leaves the weights as initialised (plans, tests).

        Raises:
            ValueError: unknown model, or one without weights; a size that it does not take; no mean and std of it
                where they are asked for.
            WeightsError: a file that is missing, unreadable or of another model.
            DownloadError: timm's weights could not be downloaded.
        """
        entry = find(config.model_name)
        if config.weights is None:
            entry.require_weights()
        mean, std = _mean_and_std(config, entry)
        with torch.random.fork_rng(devices=[]):  # the caller's random state is kept
            planned = plan(entry, config, grid)
            if pretrained and config.weights is not None:
                vit = build_from_file(planned, config.weights)
            else:
                vit = create(planned.name, planned.arguments, download=pretrained)
                drop_heads(vit)
        gather_relative_positions(vit, planned.feature_grid)
        if pretrained:
            _say(config, planned, grid, mean, std)
        return cls(vit, planned, grid, mean, std).eval().requires_grad_(False)

    @classmethod
    def classifier(cls, config: FoundationConfig, grid: int, num_classes: int) -> "FoundationModel":
        """A trainable model with fresh weights and a classification head, for `logits` and `save`."""
        entry = find(config.model_name)
        planned = plan(entry, config, grid)
        vit = create(planned.name, planned.arguments, num_classes=num_classes)
        return cls(vit, planned, grid, *_mean_and_std(config, entry))

    def _apply(self, fn, recurse=True):
        kept = [(self, "shift"), (self, "scale")]
        rope = getattr(self.vit, "rope", None)  # rotary positions: tables of sine and cosine
        if isinstance(rope, nn.Module):
            kept += [(rope, name) for name, buffer in rope.named_buffers(recurse=False) if buffer.is_floating_point()]
        before = [getattr(module, name) for module, name in kept]
        super()._apply(fn, recurse)
        for (module, name), value in zip(kept, before, strict=True):
            moved = getattr(module, name)
            if torch.finfo(moved.dtype).bits < 32:
                setattr(module, name, value.to(moved.device))  # from before the cast, not rounded
        return self

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] in [−1, 1] → resized, normalised [B, 3, input_size, input_size] in the weights' dtype."""
        images = images * self.scale + self.shift  # float32 or more, as the statistics are
        if images.shape[-2:] != (self.input_size, self.input_size):
            images = F.interpolate(images, size=self.input_size, align_corners=False, **self.resize)
        return images.to(next(self.vit.parameters()).dtype)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features [B, width, grid, grid] of images [B, 3, H, W] in [−1, 1]."""
        x = self.prepare(images)  # [B, 3, input_size, input_size]
        features = feature_map(self.vit, x)  # [B, width, h, w]
        if features.shape[-1] == self.grid:
            return features
        smaller = features.shape[-1] > self.grid
        exact = features.to(torch.promote_types(features.dtype, torch.float32))
        return F.interpolate(exact, self.grid, mode="bilinear", antialias=smaller).to(features.dtype)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores [B, num_classes] of images [B, 3, H, W] in [−1, 1]."""
        return self.vit(self.prepare(images))

    def save(self, path: str | Path) -> None:
        """Write the model's weights, head included, as a `.safetensors` file for `FoundationConfig.weights`."""
        write_tensors(path, self.vit.state_dict())


def to_download(config: FoundationConfig) -> str | None:
    """Description of what `FoundationModel.from_config` would download; None for a local file or one in the cache.

    Raises ValueError: timm has no such model, or no weights of it.
    """
    if config.weights is not None:
        return None
    entry = find(config.model_name)
    if entry.is_cached():
        return None
    return f"the weights of {entry.name} (or name a local copy in foundation.weights)"


def _mean_and_std(config: FoundationConfig, entry: Entry) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if config.normalization == "model":
        return entry.mean_and_std()
    return IMAGENET if config.normalization == "imagenet" else AS_IT_IS


def _say(config: FoundationConfig, planned: Plan, grid: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    log.info(
        "foundation model %s: timm's %s, weights from %s; images of %d pixels, mean %s, std %s; "
        "features of width %d at %d × %d positions%s",
        config.model_name,
        planned.name,
        config.weights or "timm",
        planned.input_size,
        mean,
        std,
        planned.width,
        planned.feature_grid,
        planned.feature_grid,
        "" if planned.feature_grid == grid else f", resampled to the latents' {grid} × {grid}",
    )
