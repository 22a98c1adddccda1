"""Tokenizers as diffusers' `AutoencoderKL`: its names of parameters and its `config.json`, from ours and to ours.

Its networks are the same but for names, the order of the decoder's levels (there the first runs first), and attention
by linear layers in place of 1×1 convolutions. The layout is defined by diffusers (its version: `VERSION`) in
models/autoencoders/autoencoder_kl.py (the fields of the config) and vae.py, models/unets/unet_2d_blocks.py (the levels)
and models/attention_processor.py; the older names of attention layers, in models/modeling_utils.py. diffusers itself is
not needed here.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from common.files import FileError, path_exists, write_json
from common.records import Record, read_record
from common.tensors import FOLDER_WEIGHTS, Tensors, WeightsError, write_tensors
from vavae.config import GROUPS, AutoencoderConfig

VERSION = "0.42.1"
CONFIG_FILE = "config.json"
CLASS = "AutoencoderKL"

_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # as diffusers before 0.18 saved
_OLDER_LAYER = re.compile(rf"(\.attentions\.\d+)\.({'|'.join(_OLDER)})\.")
_NUMBER = r"(0|[1-9][0-9]{0,2})"


def _modules() -> dict[str, str]:
    """Names of modules with parameters, ours → diffusers'; # stands for a number."""
    found = {name: name for name in ("quant_conv", "post_quant_conv")}
    sides = {
        "encoder": ("down.#", "down_blocks.#", "downsample.conv", "downsamplers.0.conv"),
        "decoder": ("up.#", "up_blocks.#", "upsample.conv", "upsamplers.0.conv"),
    }
    for side, (level, block, resample, resampler) in sides.items():
        parts = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
        parts[f"{level}.{resample}"] = f"{block}.{resampler}"
        resnets = {"mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1"}
        resnets[f"{level}.block.#"] = f"{block}.resnets.#"
        attentions = {"mid.attn_1": "mid_block.attentions.0", f"{level}.attn.#": f"{block}.attentions.#"}
        for outer, layers in ((resnets, _RESNET), (attentions, _ATTENTION)):
            parts |= {f"{a}.{x}": f"{b}.{y}" for a, b in outer.items() for x, y in layers.items()}
        found |= {f"{side}.{ours}": f"{side}.{theirs}" for ours, theirs in parts.items()}
    return found


def _patterns(names: Mapping[str, str]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(re.escape(name).replace(r"\#", _NUMBER)), other) for name, other in names.items()]


_TO_DIFFUSERS = _patterns(_modules())
_FROM_DIFFUSERS = _patterns({theirs: ours for ours, theirs in _modules().items()})


def _renamed(key: str, patterns: list[tuple[re.Pattern[str], str]], levels: int) -> str | None:
    """A parameter's name in the other layout; None where it has none."""
    module, _, parameter = key.rpartition(".")
    for pattern, other in patterns if parameter in ("weight", "bias") else ():
        if found := pattern.fullmatch(module):
            numbers = [int(number) for number in found.groups()]
            if numbers and module.startswith("decoder.up"):
                numbers[0] = levels - 1 - numbers[0]
            for number in numbers:
                other = other.replace("#", str(number), 1)
            return f"{other}.{parameter}"
    return None


def is_diffusers(keys: Mapping[str, torch.Tensor]) -> bool:
    """Whether these are names that diffusers gives the parts of an autoencoder."""
    return any(re.match(r"(encoder|decoder)\.((down|up)_blocks\.\d|mid_block\.)", key) for key in keys)


def from_diffusers(tensors: Mapping[str, torch.Tensor], source: str | Path) -> Tensors:
    """The tensors of an `AutoencoderKL` under our names and in our shapes.

    Raises:
        WeightsError: naming `source`; a key that is no parameter's, or two for one parameter.
    """
    numbers = (re.match(rf"decoder\.up_blocks\.{_NUMBER}\.", key) for key in tensors)
    levels = 1 + max((int(found[1]) for found in numbers if found), default=-1)
    named: Tensors = {}
    unknown = []
    for key, value in tensors.items():
        name = _renamed(_OLDER_LAYER.sub(lambda m: f"{m[1]}.{_OLDER[m[2]]}.", key), _FROM_DIFFUSERS, levels)
        if name is None:
            unknown.append(key)
            continue
        if name in named:
            raise WeightsError(f"{source} has a parameter twice, once as {key}: under a newer and an older name")
        named[name] = value[:, :, None, None] if value.ndim == 2 and ".attn" in name else value
    if unknown:
        raise WeightsError(
            f"{source} is no {CLASS} of diffusers that is read here: {len(unknown)} keys belong to no part of one: "
            f"{', '.join(unknown[:5])}"
        )
    return named


def to_diffusers(tensors: Mapping[str, torch.Tensor], config: AutoencoderConfig) -> Tensors:
    """The tensors of our `AutoencoderKL` under diffusers' names and in its shapes; see `inexpressible`."""
    named: Tensors = {}
    for key, value in tensors.items():
        name = _renamed(key, _TO_DIFFUSERS, len(config.ch_mult))
        assert name is not None, key
        named[name] = value[:, :, 0, 0] if ".attentions." in name and value.ndim == 4 else value
    return named


class DiffusersConfig(Record):
    """`config.json` of an `AutoencoderKL`: the arguments of its constructor, with their defaults."""

    class_name: str | None = Field(None, alias="_class_name")
    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def unsupported(self) -> list[str]:
        """Why this is no network of ours; empty where it is."""
        unknown = [key for key in self.model_extra or {} if not key.startswith("_")]
        reasons = {
            f"_class_name is {self.class_name!r}, not {CLASS!r}": self.class_name != CLASS,
            f"{', '.join(unknown)}: not known, as diffusers {VERSION} has no such field (to take it out helps where "
            "it says nothing of the network)": unknown,
            f"act_fn is {self.act_fn!r}, not 'silu'": self.act_fn not in ("silu", "swish"),
            f"norm_num_groups is {self.norm_num_groups}, not {GROUPS}": self.norm_num_groups != GROUPS,
            "mid_block_add_attention is false, but attention in the middle is always there": (
                not self.mid_block_add_attention
            ),
        }
        return [reason for reason, holds in reasons.items() if holds]

    def contradictions(self, config: AutoencoderConfig, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """What it says otherwise than its tensors, under our names, whose sizes `config` holds."""
        found = sizes(config)
        if config.z_channels != self.latent_channels:
            found["latent_channels"] = config.z_channels
        found |= {f"use_{name}": f"{name}.weight" in tensors for name in ("quant_conv", "post_quant_conv")}
        stated = {name: getattr(self, name) for name in found}
        return [
            f"{name} is {stated[name]}, the tensors have {found[name]}" for name in found if stated[name] != found[name]
        ]

    def normalisation(self) -> str | None:
        """What diffusers' pipelines make of latents z before a diffusion model sees them; None where nothing."""
        scaled = "" if self.scaling_factor == 1 else f" · {self.scaling_factor:g}"
        if self.latents_mean is not None and self.latents_std is not None:
            return f"(z − latents_mean) / latents_std{scaled}"
        if self.shift_factor:
            return f"(z − {self.shift_factor:g}){scaled}"
        return f"z{scaled}" if scaled else None


def read_config(source: str | Path) -> DiffusersConfig | None:
    """The `config.json` beside a weights file of this layout, or in a folder; None where there is none.

    Raises:
        WeightsError: naming it; it cannot be read, or is of another network than ours.
    """
    source = Path(source)
    path = (source if source.is_dir() else source.parent) / CONFIG_FILE
    try:
        found = read_record(path, DiffusersConfig) if path_exists(path) else None
    except FileError as e:
        raise WeightsError(str(e)) from None
    if found is not None and (reasons := found.unsupported()):
        raise WeightsError(f"{path} is of an autoencoder that is not read here: {'; '.join(reasons)}")
    return found


def sizes(config: AutoencoderConfig) -> dict[str, Any]:
    """The sizes of an autoencoder as fields of diffusers' config."""
    decoder = config.decoder_attn_resolutions
    attention = {
        "DownEncoderBlock2D": config.attn_resolutions,
        "UpDecoderBlock2D": config.attn_resolutions if decoder is None else decoder,
    }
    down, up = (
        tuple(f"Attn{block}" if size in attended else block for size in config.level_resolutions)
        for block, attended in attention.items()
    )
    return {
        "in_channels": config.in_channels,
        "out_channels": config.out_ch,
        "down_block_types": down,
        "up_block_types": up[::-1],
        "block_out_channels": tuple(config.ch * multiple for multiple in config.ch_mult),
        "layers_per_block": config.num_res_blocks,
        "latent_channels": config.embed_dim,
    }


def inexpressible(config: AutoencoderConfig) -> list[str]:
    """Why diffusers has no such `AutoencoderKL`; empty where it has. Dropout, of training alone, has no field there."""
    ch, first = config.ch, config.ch * config.ch_mult[0]
    reasons = {
        f"its first convolution has {ch} channels and its first level {first}, which is one number there "
        "(block_out_channels)": ch != first,
        f"it has {config.embed_dim} embed_dim and {config.z_channels} z_channels, which are one number there "
        "(latent_channels)": config.embed_dim != config.z_channels,
    }
    return [reason for reason, holds in reasons.items() if holds]


def write_folder(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: AutoencoderConfig,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    scaling_factor: float = 1.0,
    shift_factor: float | None = None,
    **facts: Any,
) -> list[Path]:
    """Write a tokenizer as `diffusers.AutoencoderKL.from_pretrained(folder)` reads it → both paths.

    Args:
        folder: is there, and empty.
        tensors: of our `AutoencoderKL`, no others.
        config: its sizes, for which `inexpressible` is empty.
        mean, std: per channel of the latents. Pipelines normalise latents z by `(z − mean) / std · scaling_factor`,
            without the two by `(z − shift_factor) · scaling_factor`.
        facts: such as step and weights; they go into the config as `_exported`, which diffusers leaves alone.
    """
    content = {
        "_class_name": CLASS,
        "_diffusers_version": VERSION,
        "_exported": facts,
        **sizes(config),
        "act_fn": "silu",
        "norm_num_groups": GROUPS,
        "sample_size": config.resolution,
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
        "latents_mean": None if mean is None else list(mean),
        "latents_std": None if std is None else list(std),
        "force_upcast": True,  # pipelines in float16 then decode in float32, for which alone the weights were tried
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    }
    written = [folder / CONFIG_FILE, folder / FOLDER_WEIGHTS[0]]
    write_json(written[0], content)
    write_tensors(written[1], to_diffusers(tensors, config))
    return written
