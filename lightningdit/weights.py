"""Weights in and out: published `.pt` files, safetensors, and exports (`<name>.safetensors` with `<name>.json`).

All files hold the published key layout. Loading is strict in both directions and never runs code from a file.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lightningdit.config import ModelConfig
from lightningdit.latents import LatentStatistics

State = dict[str, torch.Tensor]
KIND = "lightningdit"
_WRAPPERS = ("module.", "_orig_mod.")  # of data-parallel wrapping and of torch.compile


class WeightsError(ValueError):
    """A weights file that cannot be read, or does not fit; the message names the file."""


def read_weights(path: Path | str, which: str = "ema") -> State:
    """The tensors of a weights file by published key, on the CPU.

    A `.safetensors` file is taken as it is; of a pickled file (`.pt`, `.pth`, `.ckpt`) the entry `which` ("ema" or
    "model"), or the whole where it is a plain state dict. Prefixes left by wrappers are dropped.

    Raises WeightsError where the file is missing, damaged, holds more than tensors and plain values, or lacks `which`.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path} is no file; a weights file is .safetensors or a published .pt")
    if path.suffix == ".safetensors":
        try:
            return _unwrap(load_file(path))
        except SafetensorError as e:
            raise WeightsError(f"{path} is damaged or truncated: {e}") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # torch raises many kinds on a damaged file
        raise WeightsError(f"{path} cannot be read as a file of tensors alone: {e}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds {type(content).__name__}, not a dict of tensors")
    if which in content:
        return _unwrap(content[which])
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return _unwrap(content)
    raise WeightsError(f"{path} has no {which!r}; it has {', '.join(map(repr, content)) or 'nothing'}")


def _unwrap(state: State) -> State:
    unwrapped = {}
    for key, value in state.items():
        while key.startswith(_WRAPPERS):
            key = key.partition(".")[2]
        unwrapped[key] = value
    return unwrapped


def load_into(model: nn.Module, state: State, source: Path | str) -> None:
    """Copy `state` into `model`; raises WeightsError listing every missing, unexpected or differently shaped key."""
    own = model.state_dict()
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [
            f"{key} {list(state[key].shape)} where the model has {list(own[key].shape)}"
            for key in sorted(own.keys() & state.keys())
            if state[key].shape != own[key].shape
        ],
    }
    if any(problems.values()):
        lines = [f"{len(keys)} {what}: {_some(keys)}" for what, keys in problems.items() if keys]
        raise WeightsError(f"{source} does not fit the model: {'; '.join(lines)}")
    model.load_state_dict(state)


def _some(keys: list[str], limit: int = 8) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


@dataclass(frozen=True, eq=False)
class Export:
    """What an export holds. step: None where unknown. weights: "ema" or "model". latents: how to undo the latents'
    normalisation. extra: whatever else its JSON says."""

    config: ModelConfig
    state: State
    step: int | None
    weights: str
    latents: LatentStatistics
    extra: dict


def save_export(path: Path | str, export: Export) -> tuple[Path, Path]:
    """Write `<path>.safetensors` (float32) and `<path>.json` → both paths. Each file is replaced whole or not at all.

    The JSON holds {"kind", "config", "step", "weights", "latents", "sha256"} and the entries of `export.extra`.
    """
    tensors_path, json_path = export_paths(path)
    tensors_path.parent.mkdir(parents=True, exist_ok=True)
    temporary = tensors_path.with_name(f".{tensors_path.name}.tmp")
    save_file({key: value.detach().cpu().float().contiguous() for key, value in export.state.items()}, temporary)
    content = export.extra | {
        "kind": KIND,
        "config": export.config.model_dump(),
        "step": export.step,
        "weights": export.weights,
        "latents": export.latents.to_json(),
        "sha256": _sha256(temporary),
    }
    os.replace(temporary, tensors_path)
    temporary = json_path.with_name(f".{json_path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, json_path)
    return tensors_path, json_path


def read_export(path: Path | str) -> Export:
    """Read an export by its name, with or without either suffix; raises WeightsError unless it is whole and ours."""
    tensors_path, json_path = export_paths(path)
    for part in (tensors_path, json_path):
        if not part.is_file():
            raise WeightsError(f"{part} is missing; an export is {tensors_path.name} with {json_path.name}")
    try:
        content = json.loads(json_path.read_text())
    except ValueError as e:
        raise WeightsError(f"{json_path} is damaged: {e}") from None
    if content.get("kind") != KIND:
        raise WeightsError(f"{json_path} is of kind {content.get('kind')!r}, not {KIND!r}")
    if (found := _sha256(tensors_path)) != content["sha256"]:
        raise WeightsError(f"{tensors_path} is damaged: SHA-256 {found}, {json_path.name} says {content['sha256']}")
    known = {"kind", "config", "step", "weights", "latents", "sha256"}
    return Export(
        config=ModelConfig(**content["config"]),
        state=read_weights(tensors_path),
        step=content["step"],
        weights=content["weights"],
        latents=LatentStatistics.from_json(content["latents"]),
        extra={key: value for key, value in content.items() if key not in known},
    )


def export_paths(path: Path | str) -> tuple[Path, Path]:
    """The two files of the export called `path`."""
    path = Path(path)
    if path.suffix in (".safetensors", ".json"):
        path = path.with_suffix("")
    return path.with_name(f"{path.name}.safetensors"), path.with_name(f"{path.name}.json")


def save_published(path: Path | str, model: State, ema: State) -> None:
    """Write the published `.pt` layout: a dict with the state dicts `model` and `ema`, float32."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    states = {"model": model, "ema": ema}
    torch.save({n: {k: v.detach().cpu().float() for k, v in s.items()} for n, s in states.items()}, temporary)
    os.replace(temporary, path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
