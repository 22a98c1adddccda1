"""Inference of a tokenizer's config from the shapes of its tensors, as published weights come without one."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from common.tensors import WeightsError, model_of
from vavae.config import AutoencoderConfig

_DIFFUSERS = re.compile(r"(encoder|decoder)\.(down|up)_blocks\.\d+\.")


def infer_config(tensors: Mapping[str, torch.Tensor], source: str | Path) -> AutoencoderConfig:
    """The config of a tokenizer with these tensors; `source` names them.

    Dropout leaves no trace in the weights and is set to 0; `resolution` serves only to name the levels with attention,
    which those have at any image size.

    Raises:
        WeightsError: tensors of no such tokenizer.
    """
    refuse_other_layouts(tensors, source)
    try:
        return _config(tensors)
    except KeyError as error:
        raise WeightsError(f"{source} is not a tokenizer of this layout: it has no {error.args[0]}") from None
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise WeightsError(f"{source} does not have the sizes of a tokenizer: {error}") from None


def refuse_other_layouts(keys: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Raise WeightsError where keys are those of a LightningDiT, or of another library's autoencoder, with other names
    for the same parts."""
    if model_of(keys) == "LightningDiT":
        raise WeightsError(f"{source} holds a LightningDiT's weights; a tokenizer's are wanted")
    if any(map(_DIFFUSERS.match, keys)):
        raise WeightsError(
            f"{source} is an AutoencoderKL of diffusers (keys such as encoder.down_blocks.0…); read are "
            "weights in the layout of latent diffusion (encoder.down.0…), as VA-VAE publishes them"
        )


def _config(tensors: Mapping[str, torch.Tensor]) -> AutoencoderConfig:
    ch, in_channels = tensors["encoder.conv_in.weight"].shape[:2]
    levels, blocks = _count(tensors, r"encoder\.down\.(\d+)\."), _count(tensors, r"encoder\.down\.0\.block\.(\d+)\.")
    widths = [tensors[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
    if any(width % ch for width in widths):
        raise ValueError(f"levels of {widths} channels are no multiples of {ch}")
    resolution = max(256, 2 ** (levels - 1))
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
