"""Inference of a tokenizer's config from the shapes of its tensors, as published weights come without one; tensors of
either layout, VA-VAE's and diffusers', under the names of the first."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from common.tensors import Tensors, WeightsError, model_of
from vavae.config import AutoencoderConfig
from vavae.diffusers_layout import DiffusersConfig, from_diffusers, is_diffusers, read_config


def infer_config(tensors: Mapping[str, torch.Tensor], source: str | Path) -> AutoencoderConfig:
    """The config of a tokenizer with these tensors, of either layout; `source` names them.

    Dropout leaves no trace in the weights and is set to 0; `resolution` serves only to name the levels with attention,
    which those have at any image size.

    Raises:
        WeightsError: tensors of no such tokenizer; see `published_layout`, too.
    """
    named, config = _published(tensors, source)
    return _inferred(named, source) if config is None else config


def published_layout(tensors: Mapping[str, torch.Tensor], source: str | Path) -> Mapping[str, torch.Tensor]:
    """The tensors of a tokenizer file under the published names: as they are, or those of diffusers renamed.

    The sizes that tensors of diffusers have are compared with its `config.json` where that lies beside `source` (or in
    it, where it is a folder). A 1×1 convolution that the config does without is one that changes nothing here.

    Raises:
        WeightsError: a LightningDiT's tensors; keys of diffusers that are no parameter's; a `config.json` that is of
            another network or contradicts the tensors, each difference named.
    """
    return _published(tensors, source)[0]


def _published(
    tensors: Mapping[str, torch.Tensor], source: str | Path
) -> tuple[Mapping[str, torch.Tensor], AutoencoderConfig | None]:
    """As `published_layout`, and the config where it has been inferred."""
    if model_of(tensors) == "LightningDiT":
        raise WeightsError(f"{source} holds a LightningDiT's weights; a tokenizer's are wanted")
    if not is_diffusers(tensors):
        return tensors, None
    named = from_diffusers(tensors, source)
    stated = read_config(source)
    if stated is None:
        return named, None
    named |= _identities(named, stated)
    config = _inferred(named, source, stated.sample_size)
    if wrong := stated.contradictions(config, tensors):
        raise WeightsError(f"{source} and the config.json beside it contradict each other: {'; '.join(wrong)}")
    return named, config


def _identities(named: Tensors, stated: DiffusersConfig) -> Tensors:
    """Weights that change nothing for the 1×1 convolutions that an `AutoencoderKL` does without."""
    sides = {
        "quant_conv": (stated.use_quant_conv, "encoder.conv_out.bias", 1),
        "post_quant_conv": (stated.use_post_quant_conv, "decoder.conv_in.weight", 4),
    }
    found: Tensors = {}
    for name, (used, beside, dims) in sides.items():
        if not used and f"{name}.weight" not in named and beside in named and named[beside].ndim == dims:
            channels = named[beside].shape[min(1, dims - 1)]
            found[f"{name}.weight"] = torch.eye(channels)[:, :, None, None]
            found[f"{name}.bias"] = torch.zeros(channels)
    return found


def _inferred(
    tensors: Mapping[str, torch.Tensor], source: str | Path, image_size: int | tuple[int, ...] | None = None
) -> AutoencoderConfig:
    try:
        return _config(tensors, image_size)
    except KeyError as error:
        raise WeightsError(f"{source} is not a tokenizer of this layout: it has no {error.args[0]}") from None
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise WeightsError(f"{source} does not have the sizes of a tokenizer: {error}") from None


def _config(tensors: Mapping[str, torch.Tensor], image_size: int | tuple[int, ...] | None) -> AutoencoderConfig:
    """image_size: taken as `resolution` where all levels have whole sizes for it."""
    ch, in_channels = tensors["encoder.conv_in.weight"].shape[:2]
    levels, blocks = _count(tensors, r"encoder\.down\.(\d+)\."), _count(tensors, r"encoder\.down\.0\.block\.(\d+)\.")
    widths = [tensors[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
    if any(width % ch for width in widths):
        raise ValueError(f"levels of {widths} channels are no multiples of {ch}")
    resolution = max(256, 2 ** (levels - 1))
    if isinstance(image_size, int) and image_size > 0 and image_size % 2 ** (levels - 1) == 0:
        resolution = image_size
    attention, decoder_attention = (
        tuple(resolution >> level for level in range(levels) if f"{side}.{level}.attn.0.q.weight" in tensors)
        for side in ("encoder.down", "decoder.up")
    )
    z_channels, embed_dim = tensors["post_quant_conv.weight"].shape[:2]
    return AutoencoderConfig(
        embed_dim=embed_dim,
        ch=ch,
        ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=blocks,
        attn_resolutions=attention,
        resolution=resolution,
        in_channels=in_channels,
        decoder_attn_resolutions=None if decoder_attention == attention else decoder_attention,
        out_ch=tensors["decoder.conv_out.weight"].shape[0],
        z_channels=z_channels,
    )


def _count(tensors: Mapping[str, torch.Tensor], pattern: str) -> int:
    """One more than the largest number in keys that begin so."""
    numbers = [int(found[1]) for key in tensors if (found := re.match(pattern, key))]
    return max(numbers, default=-1) + 1
