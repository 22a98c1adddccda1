"""Weights of a tokenizer: splitting a file into networks, strict loading, exports (`.safetensors` and `.json`).

A published tokenizer holds, under `state_dict` or at the top, `encoder. decoder. quant_conv. post_quant_conv.`; a
published training checkpoint adds `linear_proj.`, the frozen `foundation_model.` and the whole `loss.` (LPIPS,
discriminator, logvar). A tokenizer in the layout of diffusers (`vavae.diffusers_layout`) becomes the same one.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.files import atomic_write, make_directory
from common.records import Record, read_record, require_kind, write_checksummed
from common.sections import SectionError
from common.tensors import Tensors, WeightsError, load_strict, read_tensors, write_safetensors
from kernels.registry import Ops
from vavae.config import AutoencoderConfig
from vavae.diffusers_layout import is_diffusers, read_config
from vavae.model import AutoencoderKL
from vavae.sizes import infer_config, published_layout

log = logging.getLogger(__name__)

AUTOENCODER_PREFIXES = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
PROJECTION_PREFIX = "linear_proj."
DISCRIMINATOR_PREFIX = "loss.discriminator."
FROZEN_PREFIXES = ("foundation_model.", "loss.perceptual_loss.", "loss.logvar")


@dataclass(frozen=True)
class TokenizerWeights:
    """The parts of a tokenizer file.

    Fields:
        autoencoder: keys as in `AutoencoderKL`, with `linear_proj.` where the file has it.
        discriminator: keys as in `NLayerDiscriminator`; empty where the file has none.
        dropped: number of tensors left out, by prefix.
    """

    autoencoder: Tensors
    discriminator: Tensors
    dropped: dict[str, int]


def split_tokenizer(tensors: Mapping[str, torch.Tensor], source: str | Path) -> TokenizerWeights:
    """Split the tensors of a tokenizer file by network; those of frozen networks are dropped and counted.

    Tensors of diffusers are renamed. What its `config.json` says of the latents' scale is logged and not applied.

    Raises:
        WeightsError: naming `source`; a key that belongs to no known part. See `vavae.sizes.published_layout`, too.
    """
    if is_diffusers(tensors):
        _log_normalisation(source)
    tensors = published_layout(tensors, source)
    autoencoder: Tensors = {}
    discriminator: Tensors = {}
    dropped: Counter[str] = Counter()
    unknown: list[str] = []
    for key, value in tensors.items():
        if key.startswith((*AUTOENCODER_PREFIXES, PROJECTION_PREFIX)):
            autoencoder[key] = value
        elif key.startswith(DISCRIMINATOR_PREFIX):
            discriminator[key.removeprefix(DISCRIMINATOR_PREFIX)] = value
        elif key.startswith(FROZEN_PREFIXES):
            dropped[next(prefix for prefix in FROZEN_PREFIXES if key.startswith(prefix))] += 1
        else:
            unknown.append(key)
    if unknown:
        raise WeightsError(
            f"{source} is not a tokenizer: {len(unknown)} keys belong to no part of one: {', '.join(unknown[:5])}"
        )
    return TokenizerWeights(autoencoder, discriminator, dict(dropped))


def load_tokenizer(path: str | Path, ops: Ops, config: AutoencoderConfig | None = None) -> AutoencoderKL:
    """A tokenizer in evaluation mode, without gradients, from an export or a published checkpoint.

    Args:
        path: weights file; an export has its `.json` beside it. Or a folder of diffusers' `AutoencoderKL`.
        ops: of `kernels.select`.
        config: by default that of the JSON beside the file, else the one inferred from the tensors' shapes.

    Raises:
        WeightsError: unreadable, or not exactly this model's weights.
    """
    if config is None and not Path(path).is_dir() and Path(path).with_suffix(".json").is_file():
        config = read_export_config(path)
    tensors = read_tensors(path)
    return build_tokenizer(tensors, config or infer_config(tensors, path), ops, path)


def build_tokenizer(
    tensors: Mapping[str, torch.Tensor], config: AutoencoderConfig, ops: Ops, source: str | Path
) -> AutoencoderKL:
    """A tokenizer in evaluation mode, without gradients, from tensors of `source`; those of other networks are dropped.

    Raises:
        WeightsError: not exactly this model's weights.
    """
    parts = split_tokenizer(tensors, source)
    autoencoder = {k: v for k, v in parts.autoencoder.items() if not k.startswith(PROJECTION_PREFIX)}
    model = AutoencoderKL(config, ops)
    renamed = ", its keys under VA-VAE's names," if is_diffusers(tensors) else ""
    load_strict(model, autoencoder, f"{source}{renamed} as a tokenizer")
    projection, discriminator = len(parts.autoencoder) - len(autoencoder), len(parts.discriminator)
    log_dropped(source, parts.dropped | {PROJECTION_PREFIX: projection, DISCRIMINATOR_PREFIX: discriminator})
    return model.eval().requires_grad_(False)


def _log_normalisation(source: str | Path) -> None:
    stated = read_config(source)
    if stated is not None and (formula := stated.normalisation()) is not None:
        same = f"; data.latent_norm=false data.latent_multiplier={stated.scaling_factor:g} do the same"
        log.info(
            "%s: by its config.json, pipelines of diffusers train on %s; here latents are what the encoder makes, and "
            "a LightningDiT's run normalises them as its data section says%s",
            source,
            formula,
            same if formula.startswith("z ") else "",
        )


def log_dropped(source: str | Path, dropped: Mapping[str, int]) -> None:
    """Log the number of dropped tensors by prefix, where there are any."""
    parts = [f"{count} tensor{'s' * (count != 1)} {prefix}*" for prefix, count in dropped.items() if count]
    if parts:
        log.info("%s: left out %s", source, ", ".join(parts))


def write_export(
    path: str | Path, tensors: Mapping[str, torch.Tensor], config: AutoencoderConfig, **facts: Any
) -> None:
    """Write `<name>.safetensors` and, beside it, `<name>.json` with the config and `facts` such as step and weights."""
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path.with_name(f"{path.name}.safetensors")
    make_directory(path.parent)
    with atomic_write(path) as f:
        write_safetensors(f, tensors)
        f.flush()
        # Before the tensors are in place: if this fails, the old pair is still there.
        write_checksummed(
            path.with_suffix(".json"), {"kind": "vavae", "config": config.model_dump(mode="json"), **facts}
        )


class ExportFacts(Record):
    """The JSON beside an exported tokenizer's tensors."""

    kind: str
    config: dict[str, Any]


def read_export_config(path: str | Path) -> AutoencoderConfig:
    """The model config in the `.json` beside an exported weights file.

    Raises:
        FileError: there is none, or it is not a tokenizer's.
    """
    beside = Path(path).with_suffix(".json")
    require_kind(beside, "vavae")
    facts = read_record(beside, ExportFacts)
    try:
        return AutoencoderConfig.read(facts.config, f"{beside} has an invalid model config")
    except SectionError as e:
        raise WeightsError(str(e)) from None


def fingerprint(model: nn.Module) -> str:
    """SHA-256 (hexadecimal) of a model's tensors and their names, independent of the file they come from."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
