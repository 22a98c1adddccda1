"""Random damage to what a run starts from: every flipped bit and every cut is harmless, or named with its file."""

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.files import FileError
from launch.training import checkpoint
from launch.training.checkpoint_search import find_checkpoint
from lightningdit.config import ModelConfig
from lightningdit.data import LatentDataset
from lightningdit.latents import LatentStatistics, Manifest
from lightningdit.weights import Export, read_export, save_export
from tests import toy

DAMAGES = 700  # of each kind of directory


def make_checkpoint(directory: Path) -> None:
    g = torch.Generator().manual_seed(0)
    tensors = {name: torch.rand(*shape, generator=g) for name, shape in {"a.weight": (3, 2), "a.bias": (3,)}.items()}
    state = toy.checkpoint_state(20, "lightningdit", versions={"torch": "2"})
    state["config"]["train"]["max_steps"] = 30
    checkpoint.save(directory, state, {"model": {key: tensors for key in checkpoint.KEYS}})


def read_checkpoint(directory: Path) -> list:
    found = find_checkpoint(directory)
    shapes = {"a.weight": torch.Size([3, 2]), "a.bias": torch.Size([3])}
    return [found.step, found.state, *(sorted(t.items()) for _, t in found.states("model", shapes))]


def read_latents(directory: Path) -> list:
    data = LatentDataset(directory, num_classes=3)
    everything = torch.arange(len(data))
    batches = [data.batch(everything, everything, [flip] * len(data)) for flip in (False, True)]
    manifest = data.manifest.model_dump(include=set(Manifest.model_fields))  # a key that is none says nothing
    return [*(sorted(b.items()) for b in batches), data.statistics.to_json(), manifest]


def make_export(directory: Path) -> None:
    state = {"a.weight": torch.arange(6.0).view(3, 2)}  # whether they fit a network is asked where they are loaded
    save_export(directory / "x", Export(ModelConfig(), state, 20, "ema", LatentStatistics.identity(4), {"note": "x"}))


def read_exported(directory: Path) -> list:
    found = read_export(directory / "x")
    facts = (found.config, found.step, found.weights, found.latents.to_json(), found.extra["note"])
    return [sorted(found.state.items()), *facts]


KINDS: dict[str, tuple[Callable, Callable]] = {
    "checkpoint": (make_checkpoint, read_checkpoint),
    "latents": (toy.write_latents, read_latents),
    "export": (make_export, read_exported),
}


def digest(content: list) -> str:
    """Of all values, whatever they are held in."""
    torch.set_printoptions(profile="full", precision=9)
    try:
        return hashlib.sha256(repr(content).encode()).hexdigest()
    finally:
        torch.set_printoptions(profile="default")


def damaged(content: bytes, rng: random.Random) -> bytes:
    """One bit flipped, or cut short, or a block zeroed."""
    place, kind = rng.randrange(len(content)), rng.choice(("bit", "bit", "cut", "zeros"))
    if kind == "cut":
        return content[:place]
    if kind == "zeros":
        return content[:place] + bytes(min(64, len(content) - place)) + content[place + 64 :]
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_harmless_or_named(tmp_path, kind):
    make, read = KINDS[kind]
    make(tmp_path)
    whole, rng, harmless = digest(read(tmp_path)), random.Random(0), 0
    files = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    for _ in range(DAMAGES):
        file = rng.choice(files)
        content = file.read_bytes()
        file.write_bytes(hurt := damaged(content, rng))
        try:
            assert digest(read(tmp_path)) == whole, f"{file.name} reads otherwise, without a word"
            harmless += hurt != content
        except FileError as e:
            # A damaged manifest may also show in what it says of another file.
            assert file.name in str(e) or (file.suffix == ".json" and file.name.split(".")[0] in str(e)), str(e)
            assert "\n" not in str(e)
        finally:
            file.write_bytes(content)
    # Of a file of statistics its numbers count, which the manifest has too, and most of its bytes are others.
    assert digest(read(tmp_path)) == whole and harmless < DAMAGES / (8 if kind == "latents" else 20)
