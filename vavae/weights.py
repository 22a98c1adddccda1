"""Weights in files: read without running code, load strictly, write what others can read.

A published tokenizer holds, under `state_dict` or at the top, `encoder. decoder. quant_conv. post_quant_conv.`; a
published training checkpoint adds `linear_proj.`, the frozen `foundation_model.` and the whole `loss.` (LPIPS,
discriminator, logvar).
"""

import hashlib
import json
import logging
import os
import pickle
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vavae.config import AutoencoderConfig
from vavae.model import AutoencoderKL

log = logging.getLogger(__name__)

AUTOENCODER_PREFIXES = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
PROJECTION_PREFIX = "linear_proj."
DISCRIMINATOR_PREFIX = "loss.discriminator."
FROZEN_PREFIXES = ("foundation_model.", "loss.perceptual_loss.", "loss.logvar")
Tensors = dict[str, torch.Tensor]


class WeightsError(ValueError):
    """A weights file cannot be read, or does not fit."""


def read_tensors(path: str | Path) -> Tensors:
    """The tensors of a `.safetensors` file, or of a `.pt`, `.pth` or `.ckpt` file with or without `state_dict` around.

    Raises:
        WeightsError: no such file, a broken one, or one that would need to run code to be read.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"weights file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise WeightsError(f"weights file {path} is broken or holds more than tensors: {error}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise WeightsError(f"weights file {path} holds a {type(content).__name__}, not tensors by name")
    return {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None):
    """Write a `.safetensors` file, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=dict(metadata or {}))
    os.replace(temporary, path)


def load_strict(module: nn.Module, tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Load tensors that must be exactly the module's.

    Raises:
        WeightsError: naming `what` and the keys that are missing, unexpected, or of another shape.
    """
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in tensors]
    unexpected = [key for key in tensors if key not in wanted]
    shapes = [f"{key} {list(tensors[key].shape)} instead of {list(value.shape)}" for key, value in wanted.items()
              if key in tensors and tensors[key].shape != value.shape]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    faults = [f"{len(keys)} {kind}: {', '.join(keys[:5])}{', …' if len(keys) > 5 else ''}"
              for kind, keys in kinds.items() if keys]
    if faults:
        raise WeightsError(f"weights {what} do not fit: {'; '.join(faults)}")
    module.load_state_dict(tensors)


@dataclass(frozen=True)
class TokenizerWeights:
    """The parts of a tokenizer file.

    Fields:
        autoencoder: keys as in `AutoencoderKL`, with `linear_proj.` where the file has it.
        discriminator: keys as in `NLayerDiscriminator`; empty where the file has none.
        dropped: number of tensors left out, by what they belong to.
    """

    autoencoder: Tensors
    discriminator: Tensors
    dropped: dict[str, int]


def split_tokenizer(tensors: Mapping[str, torch.Tensor]) -> TokenizerWeights:
    """Sort the tensors of a tokenizer file by what they belong to; those of frozen networks are dropped and counted.

    Raises:
        WeightsError: a key that belongs to no known part.
    """
    autoencoder, discriminator, dropped, unknown = {}, {}, Counter(), []
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
        raise WeightsError(f"{len(unknown)} keys belong to no part of a tokenizer: {', '.join(unknown[:5])}")
    return TokenizerWeights(autoencoder, discriminator, dict(dropped))


def load_tokenizer(path: str | Path, ops: Any, config: AutoencoderConfig | None = None) -> AutoencoderKL:
    """A tokenizer to encode and decode with, in evaluation mode, from an export of ours or a published checkpoint.

    Args:
        path: weights file; an export has its `.json` beside it.
        ops: bundle for the model.
        config: sizes; may be left out for an export.

    Raises:
        WeightsError: unreadable, or not exactly this model's weights.
        ValueError: no config given and none beside the file.
    """
    if config is None:
        config = read_export_config(path)
    return build_tokenizer(read_tensors(path), config, ops, path)


def build_tokenizer(tensors: Mapping[str, torch.Tensor], config: AutoencoderConfig, ops: Any,
                    source: str | Path) -> AutoencoderKL:
    """A tokenizer to encode and decode with, of a training run's tensors or a tokenizer's; `source` names them.

    Raises:
        WeightsError: not exactly this model's weights.
    """
    parts = split_tokenizer(tensors)
    own = {k: v for k, v in parts.autoencoder.items() if not k.startswith(PROJECTION_PREFIX)}
    model = AutoencoderKL(config, ops)
    load_strict(model, own, f"{source} as a tokenizer")
    projection, discriminator = len(parts.autoencoder) - len(own), len(parts.discriminator)
    log_dropped(source, parts.dropped | {PROJECTION_PREFIX: projection, DISCRIMINATOR_PREFIX: discriminator})
    return model.eval().requires_grad_(False)


def log_dropped(source: str | Path, dropped: Mapping[str, int]) -> None:
    """Say which parts of a file were not used."""
    used = {prefix: count for prefix, count in dropped.items() if count}
    if used:
        log.info("%s: left out %s", source, ", ".join(f"{count} tensors {prefix}*" for prefix, count in used.items()))


def write_export(path: str | Path, tensors: Mapping[str, torch.Tensor], config: AutoencoderConfig, **facts: Any):
    """Write `<name>.safetensors` and, beside it, `<name>.json` with the config and `facts` such as step and weights.

    Each file is replaced whole, and neither before both could be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path.with_name(f"{path.name}.safetensors")
    document = {"kind": "vavae", "config": config.model_dump(mode="json"), **facts}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.json.tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    write_tensors(path, tensors)
    os.replace(temporary, path.with_suffix(".json"))


def read_export_config(path: str | Path) -> AutoencoderConfig:
    """The model config in the `.json` beside an exported weights file.

    Raises:
        ValueError: there is none, or it is not a tokenizer's.
    """
    beside = Path(path).with_suffix(".json")
    if not beside.is_file():
        raise ValueError(f"{path} has no {beside.name} beside it: give the tokenizer's config")
    document = json.loads(beside.read_text())
    if document.get("kind") != "vavae":
        raise ValueError(f"{beside}: kind is {document.get('kind')!r}, not 'vavae'")
    return AutoencoderConfig(**document["config"])


def fingerprint(model: nn.Module) -> str:
    """SHA-256 (hexadecimal) of a model's tensors by name: the same for the same weights in whatever file."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
