"""Models of timm's registry: looked up by name, built for the size at which their features fit the latents."""

import inspect
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from timm.models._hub import hf_hub_download
from torch import nn

from common.files import DownloadError
from common.tensors import is_downloaded
from common.text import nearest
from vavae.config import FoundationConfig
from vavae.foundation.names import SHORT_NAMES

HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # that timm looks for, in this order
#: Of images to the size where each latent position has one feature, as the published tokenizers were trained.
PUBLISHED_RESIZE: Mapping[str, Any] = {"mode": "bilinear"}
#: Raised by timm and its layers for sizes that do not fit together; a download raises others.
ARGUMENT_ERRORS = (TypeError, AssertionError, ValueError, ArithmeticError, AttributeError, LookupError)


@dataclass(frozen=True)
class Entry:
    """A model of timm's registry.

    Fields:
        name: timm's, with the tag of the weights (timm's default one where none was given), if it has any.
        pretrained: what timm says of those weights; None where it knows none.
    """

    name: str
    pretrained: PretrainedCfg | None

    def require_weights(self) -> PretrainedCfg:
        """Raise ValueError unless timm has weights to download."""
        if self.pretrained is None or not _has_weights(self.pretrained):
            raise ValueError(
                f"foundation.model_name: timm has no weights of {self.name!r}; name a file in foundation.weights"
            )
        return self.pretrained

    def is_cached(self) -> bool:
        """Whether the weights are on this machine already."""
        source = self.require_weights()
        url = source.url[0] if isinstance(source.url, tuple) else source.url
        if not source.hf_hub_id:
            return url is not None and is_downloaded(url)
        for name in HUB_FILES if source.hf_hub_filename is None else (source.hf_hub_filename,):
            with suppress(OSError):
                hf_hub_download(source.hf_hub_id, name, local_files_only=True)
                return True
        return False

    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Per channel, of pixels from 0 to 1; raises ValueError where timm states none."""
        try:
            stated = self.require_weights()
            mean, std = tuple(map(float, stated.mean or ())), tuple(map(float, stated.std or ()))
        except ValueError:  # what stands there without weights is a default of timm's source file
            mean, std = (), ()
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                f"foundation.normalization is model, but timm states no mean and std of {self.name!r}: "
                "set foundation.normalization to imagenet, or to published for images from -1 to 1"
            )
        return mean, std


def find(model_name: str) -> Entry:
    """The model of a short name or a name of timm's; raises ValueError, with the nearest name, for another."""
    name = SHORT_NAMES.get(model_name, model_name)
    architecture, _, tag = name.partition(".")
    known = timm.list_models(pretrained=True) if tag else timm.list_models()
    if name not in known:
        raise ValueError(
            f"foundation.model_name: timm has no {name!r}{nearest(name, [*SHORT_NAMES, *known])}; "
            f"short names: {', '.join(SHORT_NAMES)}"
        )
    pretrained = get_pretrained_cfg(name)
    if not tag and pretrained is not None and pretrained.tag and _has_weights(pretrained):
        name = f"{architecture}.{pretrained.tag}"
    return Entry(name, pretrained)


def _has_weights(pretrained: PretrainedCfg) -> bool:
    return bool(pretrained.hf_hub_id or pretrained.url)


@dataclass(frozen=True)
class Plan:
    """How a model is built, and what it then takes and gives.

    Fields:
        name: timm's.
        arguments: for `create`.
        input_size: pixels along a side.
        resize: how images are brought to that size, as arguments of `F.interpolate`.
        width, feature_grid: channels of the features, and positions along a side.
    """

    name: str
    arguments: Mapping[str, Any]
    input_size: int
    resize: Mapping[str, Any]
    width: int
    feature_grid: int


def plan(entry: Entry, config: FoundationConfig, grid: int) -> Plan:
    """Choose the input size and learn, without weights, what features the model gives for it.

    Unless `config.input_size` says another, the size is that of one feature for each of grid × grid latent positions;
    where the model does not take it, the one that it was trained with, resized as then.

    Raises:
        ValueError: arguments that do not fit the model; a size that it does not take; a model without a map of
            features.
    """
    arguments = dict(config.model_args)
    model = _on_meta(entry.name, arguments)
    size, resize = _input_size(config, grid, stride=_stride(model, entry.name), name=entry.name), PUBLISHED_RESIZE
    if hasattr(model, "set_input_size") and not arguments.get("dynamic_img_size"):
        # Built for one size, a model holds positions of that size and does not interpolate them in each pass.
        if arguments.get("img_size", size) != size:
            raise ValueError(
                f"foundation.model_args: img_size {arguments['img_size']}, but images of {size} pixels are what "
                f"{entry.name} is given: leave it out, or set foundation.input_size"
            )
        arguments["img_size"] = size
        if "dynamic_img_size" in inspect.signature(type(model).__init__).parameters:
            arguments["dynamic_img_size"] = False
        model = _on_meta(entry.name, arguments)
    shape = _map_shape(model, size)
    if isinstance(shape, Exception) and config.input_size is None:
        size, resize = _native(entry, arguments)
        shape = _map_shape(model, size)
    if isinstance(shape, Exception):
        raise ValueError(
            f"foundation.model_name: {entry.name!r} gives no map of features for images of {size} pixels: "
            f"{_reason(shape)}"
        )
    return Plan(entry.name, arguments, size, resize, width=shape[1], feature_grid=shape[2])


def _input_size(config: FoundationConfig, grid: int, *, stride: int, name: str) -> int:
    size = config.input_size or grid * stride
    if size % stride:
        allowed = [
            str(multiple) for multiple in (size // stride * stride, size // stride * stride + stride) if multiple
        ]
        raise ValueError(
            f"foundation.input_size {size} is no multiple of the patch of {name} ({stride} pixels): "
            f"use {' or '.join(allowed)}, or null"
        )
    return size


def _native(entry: Entry, arguments: Mapping[str, Any]) -> tuple[int, Mapping[str, Any]]:
    """The size that a model was trained with, and how timm resizes images to it."""
    stated = entry.pretrained or PretrainedCfg()
    mode = "bicubic" if stated.interpolation == "bicubic" else "bilinear"
    return arguments.get("img_size") or stated.input_size[-1], {"mode": mode, "antialias": True}


def create(name: str, arguments: Mapping[str, Any], *, num_classes: int = 0, download: bool = False) -> nn.Module:
    """A model of timm's; raises ValueError for arguments that do not fit it, DownloadError where `download` fails."""
    try:
        return timm.create_model(name, pretrained=download, num_classes=num_classes, **arguments)
    except Exception as error:
        if not download or isinstance(error, ARGUMENT_ERRORS):
            raise ValueError(f"foundation.model_args {dict(arguments)} do not fit {name}: {_reason(error)}") from error
        raise DownloadError(
            f"could not download the weights of {name} ({error}); name a local copy in foundation.weights"
        ) from error


def feature_map(model: Any, images: torch.Tensor) -> torch.Tensor:
    """The last map of `forward_intermediates` [B, C, h, w] after the final norm, without class and register tokens.

    For SAM that is the map after its neck. Where the only final norm stands behind the pooling over tokens (`fc_norm`:
    EVA-02, BEiT), it is applied to each token.
    """
    (features,) = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
    if _norms_after_pooling(model):
        features = model.fc_norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
    return features


def drop_heads(model: nn.Module) -> None:
    """Remove from a model without classes what its features do not go through: attention pooling, a norm after it."""
    unused = ("attn_pool",) if _norms_after_pooling(model) else ("attn_pool", "fc_norm")
    for name in unused:
        if isinstance(getattr(model, name, None), nn.Module):
            setattr(model, name, nn.Identity())


def _norms_after_pooling(model: Any) -> bool:
    after = getattr(model, "fc_norm", None)
    return isinstance(getattr(model, "norm", None), nn.Identity) and not isinstance(after, nn.Identity | None)


def _on_meta(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return create(name, arguments).eval()


def _stride(model: Any, name: str) -> int:
    """Pixels between two features: the patch size of a plain vision transformer."""
    try:
        return int(model.feature_info[-1]["reduction"])
    except ARGUMENT_ERRORS as error:
        raise ValueError(f"foundation.model_name: timm states no stride of the features of {name!r}") from error


@torch.no_grad()
def _map_shape(model: nn.Module, size: int) -> torch.Size | Exception:
    """Shape of the features of a model on the meta device for images of a size, or why there are none."""
    try:
        features = feature_map(model, torch.empty(1, 3, size, size, device="meta"))
        if features.ndim != 4 or features.shape[2] != features.shape[3]:
            return ValueError(f"features of shape {list(features.shape)}, not [1, C, h, h]")
        return features.shape
    except (*ARGUMENT_ERRORS, RuntimeError) as error:
        return error


def _reason(error: Exception) -> str:
    return str(error) or "they contradict each other"
