"""`python -m launch decode [CONFIG] --latents DIR --output DIR [--tokenizer FILE] [--format png|webp|npz]`

Images of a set of latents, as `extract` or `sample --format latents` writes them, or a published one: image i is latent
i, decoded. What is written is what `sample` writes in that format, samples.json included; facts of the samples that the
latents are of are taken over. Of `moments` the means are decoded; --mirrored decodes the mirrored latents.

The tokenizer is --tokenizer (a weights file, or a folder of diffusers), or that of CONFIG: a LightningDiT's file
(vae.ckpt_path) or, with --kind vavae, a tokenizer's (its ckpt_path, else the newest checkpoint of its run). One that is
not the latents' own, by the hash in their manifest, is refused; so are statistics that do not fit the latents, and a
set that is not whole.

Processes of a launcher divide the latents; an interrupted run goes on with what it lacks. On a CPU in float32, files
are the same bytes however that was.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from common.files import FileError, file_entry, path_exists, read_json
from launch.arguments import add_run_file, load_run, local_path
from launch.config import KINDS, ConfigError, LightningDiTRun, VavaeRun, select_ops
from launch.extract import find_tokenizer
from launch.sampling.generator import ImageDecoder
from launch.sampling.image_folder import ImageFolder, ImageFormat
from launch.sampling.outputs import FolderOutput, NpzOutput, Output
from launch.sampling.picture import draw_picture, picked_for_picture
from launch.sampling.pipeline import Arrays, Pipeline
from launch.sampling.produce import DESCRIPTION, Job, Making, produce
from launch.sampling.units import DECODED, UNIT
from launch.trained import build_tokenizer, statistics_for
from lightningdit.data import LatentDataset
from lightningdit.latents import MANIFEST_FILE, LatentsError
from lightningdit.latents_statistics import check_statistics
from vavae.model import AutoencoderKL
from vavae.weights import fingerprint, load_tokenizer

#: Facts of `samples.json` that are of the images, not of the latents.
_OF_IMAGES = {"format", "by_class", "npz", "images", "latents_manifest"}


def main(argv: list[str]) -> int:
    """Decode and say where the images are; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_file(
        parser,
        "LightningDiT's file, or with --kind vavae a tokenizer's",
        "vae.ckpt_path=vae.safetensors",
        required=False,
    )
    parser.add_argument("--kind", choices=list(KINDS), default="lightningdit", help="of CONFIG (default: %(default)s)")
    parser.add_argument("--latents", type=local_path, required=True, metavar="DIR", help="set of latents")
    parser.add_argument("--output", type=local_path, required=True, metavar="DIR", help="directory of the images")
    parser.add_argument("--tokenizer", type=local_path, help="weights file or folder, instead of CONFIG")
    formats = ["npz", *get_args(ImageFormat)]
    parser.add_argument("--format", choices=formats, default="png", help="what to write (default: png)")
    parser.add_argument("--by-class", action="store_true", help="of png and webp: a folder for each class")
    parser.add_argument("--mirrored", action="store_true", help="decode the latents of the mirrored images")
    parser.add_argument("--batch-size", type=int, help="latents per process and batch (default: by device)")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of the tokenizer")
    args = parser.parse_intermixed_args(argv)
    if (args.config is None) == (args.tokenizer is None):
        raise ConfigError("decode needs a tokenizer: give either CONFIG or --tokenizer FILE")
    if args.batch_size is not None and args.batch_size < 1:
        raise ConfigError(f"--batch-size {args.batch_size}: at least 1")
    if args.by_class and args.format == "npz":
        raise ConfigError("--by-class is of images in files, png or webp, not of npz")
    tokenizer, source = _tokenizer(args)
    decode(
        args.latents,
        args.output,
        tokenizer,
        source,
        format=args.format,
        by_class=args.by_class,
        mirrored=args.mirrored,
        batch_size=args.batch_size,
        precision=args.precision,
    )
    return 0


def _tokenizer(args: argparse.Namespace) -> tuple[AutoencoderKL, str]:
    if args.tokenizer is not None:
        return load_tokenizer(args.tokenizer, select_ops("auto")), str(args.tokenizer)
    run = load_run(args.config, args.overrides, args.kind)
    if isinstance(run, LightningDiTRun):
        return build_tokenizer(run, select_ops(run.kernels)), str(run.vae.ckpt_path)
    assert isinstance(run, VavaeRun)
    return find_tokenizer(run, select_ops(run.kernels))


def decode(
    latents: Path,
    output: Path,
    tokenizer: AutoencoderKL,
    source: str,
    *,
    format: ImageFormat | Literal["npz"] = "png",
    by_class: bool = False,
    mirrored: bool = False,
    batch_size: int | None = None,
    precision: str = "float32",
) -> Path:
    """Write the images of a set of latents into `output` → the path of the result.

    source: where the tokenizer is from, for messages. Raises ValueError where the set is damaged, unfinished, of
    another tokenizer or not what its statistics say, or `output` holds other images.
    """
    # Imports DeepSpeed: seconds that a mistake in the latents need not wait.
    from launch.training.engine import start_processes

    data = _open(latents, tokenizer)
    facts = _facts(data, tokenizer, format, by_class, mirrored, precision)
    processes = start_processes(timeout_minutes=24 * 60)  # processes wait for the slowest at the end
    labels = data.labels.numpy()
    num_classes = len(data.classes or ()) or int(labels.max()) + 1
    picked = picked_for_picture(labels, None)
    names = data.classes
    draw = partial(draw_picture, labels=labels[picked], columns=None, names=names, num_classes=num_classes)
    written: Output = NpzOutput(output, labels)
    if format != "npz":
        written = FolderOutput(ImageFolder(output, format, labels, num_classes, by_class))

    def prepare() -> Making:
        tokenizer.to(processes.device, getattr(torch, precision))
        decoder, reader = ImageDecoder(tokenizer, source), partial(read, data, mirrored, tokenizer.quant_conv.weight)
        pipeline = Pipeline(reader, decoder.decode, processes.device)
        size = batch_size or (UNIT * pipeline.workers if processes.device.type == "cpu" else 4 * DECODED)
        return pipeline, -(-size // pipeline.unit) * pipeline.unit, decoder.checked

    return produce(Job(output, len(data), written, facts, (), picked, draw), processes, prepare)


def read(data: LatentDataset, mirrored: bool, weight: torch.Tensor, indices: Sequence[int]) -> Arrays:
    """`z` [b, C, h, w] of these indices, where and of the dtype that the tokenizer's `weight` is.

    Past the last latent a unit is filled up with the last.
    """
    within = np.minimum(np.asarray(indices), len(data) - 1)
    stored = data.stored(within, np.full(len(within), mirrored))[:, 0]  # [b, C·h·w]
    z = torch.from_numpy(stored).view(-1, *data.shape)
    if weight.is_cuda:
        z = z.pin_memory().to(weight.device, non_blocking=True)
    return {"z": z.to(weight.dtype)}


def _open(latents: Path, tokenizer: AutoencoderKL) -> LatentDataset:
    """A whole set that this tokenizer decodes; raises LatentsError and ConfigError."""
    data = LatentDataset(latents)
    if data.shape[0] != (channels := tokenizer.config.embed_dim):
        raise LatentsError(f"{latents} has latents of {data.shape[0]} channels, the tokenizer decodes {channels}")
    statistics_for(tokenizer, latents)  # raises where they are another tokenizer's
    if (description := _description(latents)) and description.get("num_samples") != len(data):
        raise LatentsError(
            f"{latents} holds {len(data):,} latents where {DESCRIPTION} promises {description.get('num_samples')}"
        )
    check_statistics(data)
    return data


def _description(latents: Path) -> dict:
    path = latents / DESCRIPTION
    found = read_json(path) if path_exists(path) else {}
    if not isinstance(found, dict):
        raise FileError(f"{path} is damaged: it describes no samples")
    return found


def _facts(
    data: LatentDataset, tokenizer: AutoencoderKL, format: str, by_class: bool, mirrored: bool, precision: str
) -> dict:
    """What the images depend on; of latents that are samples, what those depend on, too."""
    manifest = data.path / MANIFEST_FILE
    described = {key: value for key, value in _description(data.path).items() if key not in _OF_IMAGES}
    hashes = described.pop("hashes", {}) | {"tokenizer": fingerprint(tokenizer)}
    counts = torch.bincount(data.labels).tolist()
    facts = {"num_samples": len(data), "labels": "those of the latents", "label_counts": counts} | described
    facts |= {"hashes": hashes, "format": format, "decoded": {"precision": precision, "mirrored": mirrored}}
    facts["decoded_latents"] = file_entry(manifest) if manifest.is_file() else {"path": str(data.path)}
    if by_class:
        facts["by_class"] = True
    if data.classes is not None:
        facts["classes"] = list(data.classes)
    return facts
