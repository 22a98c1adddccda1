"""Small real inputs for tests of the programs: latents, images, run files."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from common.files import file_entry, read_json, write_json
from common.records import write_checksummed
from lightningdit import latents_statistics, latents_writer

LIGHTNINGDIT = {
    "preset": "default",
    "data": {"image_size": 16, "num_classes": 3, "num_workers": 0},
    "vae": {"model_name": "toy", "downsample_ratio": 4},
    "model": {
        "hidden_size": 16,
        "depth": 2,
        "num_heads": 2,
        "patch_size": 2,
        "in_chans": 4,
        "use_swiglu": True,
        "use_rope": True,
        "use_rmsnorm": True,
    },
    "train": {
        "max_steps": 6,
        "global_batch_size": 8,
        "exp_name": "run",
        "log_every": 1,
        "ckpt_every": 3,
        "precision": "float32",
        "tensorboard": False,
    },
    "optimizer": {"lr": 1.0e-2, "ema_decay": 0.9, "max_grad_norm": 1.0},
    "transport": {"use_cosine_loss": True, "use_lognorm": True},
    "kernels": "reference",
}

VAVAE = {
    "preset": "default",
    "model": {
        "embed_dim": 4,
        "z_channels": 4,
        "ch": 32,
        "ch_mult": [1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "resolution": 16,
    },
    "loss": {"perceptual": "none", "use_vf": False, "disc_start": 2, "disc_ndf": 4, "disc_n_layers": 1},
    "data": {"image_size": 16, "num_workers": 0},
    "train": {
        "max_steps": 5,
        "global_batch_size": 4,
        "exp_name": "run",
        "log_every": 1,
        "ckpt_every": 2,
        "precision": "float32",
        "tensorboard": False,
    },
    "optimizer": {"lr": 1.0e-3},
    "kernels": "reference",
    "deepspeed": {"zero_stage": 1},
}


def write_aligned(path: Path, content: dict, folder: Path, **sections: dict) -> Path:
    """A run file as `write_run` makes it, with the VF term and the random weights of a small vision transformer, which
    are written to `folder`."""
    from vavae.config import FoundationConfig
    from vavae.foundation import FoundationModel

    shape = {"img_size": 16, "patch_size": 2, "embed_dim": 24, "depth": 1, "num_heads": 2}
    section = {"model_name": "vit_tiny_patch16_224", "model_args": shape, "normalization": "published"}
    torch.manual_seed(0)
    weights = folder / "foundation.safetensors"
    FoundationModel.from_config(FoundationConfig(**section), 8, pretrained=False).save(weights)
    sections["loss"] = {"use_vf": True, **sections.get("loss", {})}
    sections["foundation"] = section | {"weights": str(weights), **sections.get("foundation", {})}
    return write_run(path, content, **sections)


def write_latents(directory: Path, count: int = 20, classes: Sequence[str] | None = None) -> Path:
    """`count` latents [4, 4, 4] of 3 classes in two shards, with statistics and manifest."""
    generator = torch.Generator().manual_seed(0)
    writer = latents_writer.LatentsWriter(directory, shard_size=12)
    plain = 3 * torch.randn(count, 4, 4, 4, generator=generator) + 1
    writer.add(plain, plain.flip(-1), torch.arange(count) % 3)
    writer.close()
    latents_writer.finish(directory, classes=classes)
    return directory


def write_random_latents(
    directory: Path, counts=(5, 3), ranks=1, shard_size=5, shape=(4, 3, 2), identity: dict | None = None
) -> torch.Tensor:
    """Random latents, `counts` at a time, mean 2, std 3, mirrored ones 100 more. → The plain ones.

    Of several ranks, each with shards of its own, as earlier versions wrote a set by several processes.
    """
    generator = torch.Generator().manual_seed(0)
    everything, parts = [], [directory / f"rank{rank}" for rank in range(ranks)] if ranks > 1 else [directory]
    tokenizer = {"name": "test", "sha256": "00"}
    for part in parts:
        writer = latents_writer.LatentsWriter(part, shard_size=shard_size, identity=identity)
        for count in counts:
            x = torch.randn(count, *shape, generator=generator) * 3 + 2
            writer.add(x, x + 100, torch.arange(count) % 4)
            everything.append(x)
        writer.close()
        latents_writer.finish(part, tokenizer=tokenizer, expected=sum(counts))
    if ranks > 1:
        _join_ranks(directory, parts)
    return torch.cat(everything)


def _join_ranks(directory: Path, parts: Sequence[Path]) -> None:
    """One set of the shards of several; what manifests of earlier versions did not say is left out."""
    shards = []
    for rank, part in enumerate(parts):
        content = read_json(part / "manifest.json")
        for shard in content["shards"]:
            name = shard["file"].replace("rank00", f"rank{rank:02d}")
            (part / shard["file"]).rename(directory / name)
            shards.append(shard | {"file": name, "rank": rank})
        shutil.rmtree(part)
    statistics = latents_statistics.make_statistics(directory)
    facts = {key: content[key] for key in ("format", "shape", "tokenizer", "identity", "classes")}
    facts |= {"count": sum(shard["count"] for shard in shards), "statistics": statistics, "shards": shards}
    entry = file_entry(directory / "latents_stats.pt")
    write_checksummed(directory / "manifest.json", facts | {"files": {"latents_stats.pt": entry}})


def checkpoint_state(step: int, kind: str, network: str = "model", **facts) -> dict:
    """What a checkpoint of this step says of a run of 20 samples, 8 a step."""
    counters = {network: {"applied": float(step), "skipped": 0.0, "skipped_in_a_row": 0.0}}
    config = {section: {} for section in ("data", "model", "optimizer", "train")}
    empty = {"task": {}, "ops": {}, "config": config, "versions": {}}
    return {
        "step": step,
        "kind": kind,
        "global_batch_size": 8,
        "seed": 0,
        "num_samples": 20,
        "counters": counters,
        **empty,
        **facts,
    }


def rewrite_state(checkpoint: Path, state: dict) -> None:
    """Put this in the place of what a checkpoint says of its run, under a manifest that agrees with it."""
    write_json(checkpoint / "state.json", state)
    manifest = {key: value for key, value in read_json(checkpoint / "manifest.json").items() if key != "checksum"}
    manifest["files"]["state.json"] = file_entry(checkpoint / "state.json")
    write_checksummed(checkpoint / "manifest.json", manifest)


def write_images(directory: Path, count: int = 10, size: int = 18) -> Path:
    """`count` smooth colour images of 2 classes as PNG."""
    from PIL import Image  # here and below: tests for a GPU come without

    for i in range(count):
        row, column = np.mgrid[0:size, 0:size] / size
        waves = [np.sin(3 * row + i), np.cos(4 * column - i), np.sin(2 * (row + column) + 2 * i)]
        folder = directory / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((127.5 * (np.stack(waves, -1) + 1)).astype(np.uint8)).save(folder / f"{i}.png")
    return directory


def write_data(directory: Path) -> Path:
    """`latents` and `images` to train either model on."""
    write_latents(directory / "latents")
    write_images(directory / "images")
    return directory


def read_run(path: Path) -> dict:
    import yaml

    return yaml.safe_load(path.read_text())


def write_run(path: Path, content: dict, **sections: dict) -> Path:
    """A run file: `content` with keys of `sections` put into its sections."""
    import yaml

    merged = {**content, **{name: {**content.get(name, {}), **values} for name, values in sections.items()}}
    path.write_text(yaml.safe_dump(merged))
    return path


def spoil_latent(directory: Path, index: int) -> None:
    """Make a latent of `write_latents` infinite, and remove the manifest, whose checksum would tell."""
    from safetensors.torch import load_file, save_file

    (directory / "manifest.json").unlink()
    (shard,) = directory.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["latents"][index] = tensors["latents_flip"][index] = torch.inf
    save_file(tensors, shard)
