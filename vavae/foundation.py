"""The frozen vision transformer (DINOv2, MAE or any ViT of timm) whose features the latents are aligned to.

The only file that imports timm.
"""

from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from timm.models._hub import hf_hub_download
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

from common.files import DownloadError
from common.tensors import is_downloaded, load_strict, read_tensors, write_tensors
from common.text import nearest
from vavae.config import FoundationConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # that timm looks for, in this order
#: Raised by timm and its layers for sizes that do not fit together; a download raises others.
ARGUMENT_ERRORS = (TypeError, AssertionError, ValueError, ArithmeticError, AttributeError, LookupError)
VIT_MODULES = ("timm.models.vision_transformer", "timm.models.deit")


class FoundationModel(nn.Module):
    """Feature maps of a vision transformer: the tokens after its final norm, without class and register tokens.

    Args:
        vit: a timm vision transformer built for dynamic image sizes.
        input_size: images are resized to this many pixels (bilinear).
        normalization: see `FoundationConfig`.
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, vit: VisionTransformer, input_size: int, normalization: str):
        super().__init__()
        self.vit = vit
        self.input_size = input_size
        shift, scale = torch.zeros(3), torch.ones(3)
        if normalization == "imagenet":  # ((x + 1) / 2 − mean) / std, as one multiply-add
            mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
            shift, scale = (0.5 - mean) / std, 0.5 / std
        self.register_buffer("shift", shift.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", scale.view(1, 3, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, config: FoundationConfig, grid: int, *, pretrained: bool = True) -> "FoundationModel":
        """The frozen model with its weights, sized so that it gives grid × grid tokens.

        Args:
            config: which model, its weights and its input.
            grid: latent positions along a side.
            pretrained: False leaves the weights as initialised (plans, tests).

        Raises:
            ValueError: unknown model, or one without weights; weights of another shape; a token grid that is not the
                latent grid.
            DownloadError: timm's weights could not be downloaded.
        """
        weights = config.weights if pretrained else None
        # Weights that are about to be overwritten need no initialisation; the caller's random state is kept.
        with torch.random.fork_rng(devices=[]), torch.device("meta") if weights is not None else nullcontext():
            vit = _create(config, num_classes=0, download=pretrained and weights is None)
        if weights is not None:
            tensors = {k: v for k, v in read_tensors(weights).items() if not k.startswith("head.")}
            load_strict(vit.to_empty(device="cpu"), tensors, f"{weights} as timm model {config.model_name}")
        return cls(vit, _input_size(config, vit, grid), config.normalization).eval().requires_grad_(False)

    @classmethod
    def classifier(cls, config: FoundationConfig, grid: int, num_classes: int) -> "FoundationModel":
        """A trainable model with fresh weights and a classification head, for `logits` and `save`."""
        vit = _create(config, num_classes=num_classes, download=False)
        return cls(vit, _input_size(config, vit, grid), config.normalization)

    @property
    def width(self) -> int:
        """Channels of the features."""
        return self.vit.embed_dim

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] in [−1, 1] → resized, normalised [B, 3, input_size, input_size] in the weights' dtype."""
        images = images * self.scale + self.shift
        if images.shape[-2:] != (self.input_size, self.input_size):
            images = F.interpolate(images, size=self.input_size, mode="bilinear", align_corners=False)
        return images.to(self.vit.patch_embed.proj.weight.dtype)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features [B, width, grid, grid] of images [B, 3, H, W] in [−1, 1]."""
        x = self.prepare(images)  # [B, 3, input_size, input_size]
        maps = self.vit.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
        assert isinstance(maps, list)
        return maps[0]  # [B, width, grid, grid]

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores [B, num_classes] of images [B, 3, H, W] in [−1, 1]."""
        return self.vit(self.prepare(images))

    def save(self, path: str | Path) -> None:
        """Write the transformer's weights, head included, as a `.safetensors` file for `FoundationConfig.weights`."""
        write_tensors(path, self.vit.state_dict())


def to_download(config: FoundationConfig) -> str | None:
    """Description of what `FoundationModel.from_config` would download; None for a local file or one in the cache.

    Raises ValueError: timm has no such model, or no weights of it.
    """
    if config.weights is not None:
        return None
    _check_name(config.model_name)
    source = _source(config.model_name)
    url = source.url[0] if isinstance(source.url, tuple) else source.url
    cached = _is_cached(source.hf_hub_id) if source.hf_hub_id else url is not None and is_downloaded(url)
    return None if cached else f"the weights of {config.model_name} (or name a local copy in foundation.weights)"


def _is_cached(repository: str) -> bool:
    """Whether the hub's cache has the weights of a repository."""
    for name in HUB_FILES:
        with suppress(OSError):
            hf_hub_download(repository, name, local_files_only=True)
            return True
    return False


def _source(name: str) -> PretrainedCfg:
    source = get_pretrained_cfg(name)
    if source is None or not (source.hf_hub_id or source.url):
        raise ValueError(f"foundation.model_name: timm has no weights of {name!r}; name a file in foundation.weights")
    return source


def _create(config: FoundationConfig, *, num_classes: int, download: bool) -> VisionTransformer:
    _check_name(config.model_name)
    if download:
        _source(config.model_name)
    arguments: dict[str, Any] = {"dynamic_img_size": True, **config.model_args}
    try:
        vit = timm.create_model(config.model_name, pretrained=download, num_classes=num_classes, **arguments)
    except Exception as error:
        if not download or isinstance(error, ARGUMENT_ERRORS):
            reason = str(error) or "they contradict each other"
            raise ValueError(f"foundation.model_args {arguments} do not fit {config.model_name}: {reason}") from error
        raise DownloadError(
            f"could not download the weights of {config.model_name} ({error}); name a local copy in foundation.weights"
        ) from error
    return cast(VisionTransformer, vit)  # see _check_name


def _check_name(name: str) -> None:
    architecture, _, tag = name.partition(".")
    known = timm.list_models(pretrained=True) if tag else timm.list_models()
    if name not in known:
        raise ValueError(f"foundation.model_name: timm has no {name!r}{nearest(name, known)}")
    if timm.model_entrypoint(architecture).__module__ not in VIT_MODULES:
        raise ValueError(f"foundation.model_name: {name!r} is not a plain vision transformer of timm")


def _input_size(config: FoundationConfig, vit: VisionTransformer, grid: int) -> int:
    patch = vit.patch_embed.patch_size[0]
    size = config.input_size or grid * patch
    if size % patch or size // patch != grid:
        raise ValueError(
            f"foundation.input_size {size} gives {config.model_name} (patch {patch}) {size / patch:g} "
            f"tokens per side, but the latents have {grid}: use {grid * patch}, or null"
        )
    return size
