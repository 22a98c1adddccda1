"""`python -m launch extract CONFIG --output DIR [key=value …]`: images as latents to train LightningDiT on.

CONFIG is a tokenizer's run file: `ckpt_path` names the weights (without it, the newest checkpoint of the run is taken)
and `data.data_path` the images. Every image, centre-cropped as in ADM, is encoded once as it is and once mirrored. Of
the posteriors is stored, by --store,

    sample   one sample of each, whose noise depends on (train.global_seed, image index) alone (default, as published)
    mean     the means
    moments  means and standard deviations: training draws another sample in every epoch

as float32, float16 or bfloat16 (--dtype). Readers of the published format take samples in float32 alone; training here
takes all.

Processes of a launcher divide the images among themselves. Files, their names and every bit depend neither on their
number nor on interruptions: what 3 processes began, 2 may finish. (On a CPU the last bits of a convolution depend on
the number of threads, which launchers set to 1: OMP_NUM_THREADS=1 gives the same without one.) A killed process loses
what it encoded since it last completed a shard of 10,000 images, and not more than the last 5 minutes and a batch; the
same command goes on, with the same --batch-size.

Before it begins, some images are encoded and decoded; at the end the latents stored of them are decoded, plain and
mirrored, and compared with those images, and the statistics with the latents: the set is complete only where both fit.

`python -m launch extract --statistics DIR` makes the latents_stats.pt of latents that came without, as published.
"""

import argparse
import copy
import hashlib
import math
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from common.tensors import weights_file
from common.text import shortened
from launch.arguments import add_run_file, load_run, local_path
from launch.config import ConfigError, VavaeRun, select_ops
from launch.extraction.encoding import ImagesWithNoise, batch_bounds, encode, share_of
from launch.extraction.round_trip import RoundTrip, try_stored, try_tokenizer
from launch.hub import tokenizer_copy
from launch.runtime.processes import Processes
from launch.runtime.run_lock import lock_directory
from launch.training.build import require_one_decoder
from launch.training.checkpoint_search import find_checkpoint
from launch.training.loader import read_batches
from lightningdit.data import LatentDataset
from lightningdit.latents import STATISTICS_FILE, Manifest, Store, StoredDtype
from lightningdit.latents_parts import Rows, Stored, begin, complete_set, keep_intact
from lightningdit.latents_statistics import make_statistics
from lightningdit.latents_writer import SAVE_SECONDS, LatentsWriter, finish
from vavae.data import ImageDataset
from vavae.model import AutoencoderKL
from vavae.weights import build_tokenizer, fingerprint, load_tokenizer

#: Entry of a batch → what it counts.
_COUNTED = {
    "unreadable": "unreadable images; the next one stands in for each",
    "by_pillow": "images decoded by Pillow, which the decoder does not read",
}
SHARD_SIZE = 10_000
LEAST_PSNR = 12.0  # dB; a tokenizer below this on real images is untrained, or another one than was meant


def main(argv: list[str]) -> int:
    """Extract and say what is there; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch extract", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_file(parser, "tokenizer run file", "data.data_path=/data/train", required=False)
    parser.add_argument("--output", type=local_path, help="directory of the latents")
    parser.add_argument("--statistics", type=local_path, metavar="DIR", help="latents to make the statistics of")
    parser.add_argument("--batch-size", type=int, default=32, help="images per process and pass (default: 32)")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of the tokenizer")
    parser.add_argument(
        "--store", choices=get_args(Store), default="sample", help="of each posterior (default: sample)"
    )
    parser.add_argument(
        "--dtype", choices=get_args(StoredDtype), default="float32", help="of what is stored (default: float32)"
    )
    parser.add_argument(
        "--least-psnr",
        type=float,
        default=LEAST_PSNR,
        metavar="DB",
        help=f"refuse a tokenizer that reconstructs worse than this (default: {LEAST_PSNR:g})",
    )
    args = parser.parse_intermixed_args(argv)
    if args.statistics is not None:
        if args.config or args.output:
            raise ConfigError("extract --statistics takes no config and no --output: it writes where the latents are")
        print(f"{make_statistics(args.statistics)['count']:,} values a channel: {args.statistics / STATISTICS_FILE}")
        return 0
    if args.config is None or args.output is None:
        raise ConfigError("extract needs a config and --output, or --statistics")
    run = load_run(args.config, args.overrides, "vavae")
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size {args.batch_size}: at least 1")
    if math.isnan(args.least_psnr):
        raise ConfigError("--least-psnr nan: a number is wanted; -inf takes every tokenizer")
    extract(
        run,
        args.output,
        batch_size=args.batch_size,
        precision=args.precision,
        store=args.store,
        dtype=args.dtype,
        least_psnr=args.least_psnr,
    )
    return 0


def extract(
    run: VavaeRun,
    output: Path,
    *,
    batch_size: int = 32,
    precision: str = "float32",
    store: Store = "sample",
    dtype: StoredDtype = "float32",
    least_psnr: float = LEAST_PSNR,
    shard_size: int = SHARD_SIZE,
    save_seconds: float = SAVE_SECONDS,
) -> Manifest:
    """Write the latents of a run's images into `output` → the manifest.

    Raises ValueError where weights or images are missing or do not fit, the tokenizer reconstructs worse than
    `least_psnr` (dB), latents do not fit `dtype`, `output` holds the latents of another extraction or is in use by one,
    or what was stored does not decode to the images (see `try_stored`).
    """
    # Imports DeepSpeed: seconds that a mistake in the config need not wait.
    from launch.training.engine import start_processes

    tokenizer, source = find_tokenizer(run, select_ops(run.kernels))
    processes = start_processes(timeout_minutes=24 * 60)  # processes wait for the slowest at the end
    data = run.images().for_evaluation()
    images = ImageDataset(data, run.train.global_seed, device=processes.device)
    require_one_decoder(images, processes)
    chosen = {
        "precision": precision,
        "store": store,
        "dtype": dtype,
        "batch_size": batch_size,
        "shard_size": shard_size,
    }
    identity = _identity(tokenizer, images, run) | chosen
    grid = data.image_size // tokenizer.config.downsample_ratio
    noisy = ImagesWithNoise(images, (2, tokenizer.config.embed_dim, grid, grid), run.train.global_seed)
    facts = {"source": source, "sha256": identity["tokenizer"]}
    complete = partial(finish, output, tokenizer=facts, expected=len(images), classes=images.classes)
    with lock_directory(output, processes):
        if processes.on_main(lambda: complete_set(output, identity, _is_same)) is None:
            tokenizer.to(processes.device)
            trip = try_tokenizer(tokenizer, noisy, store, least_psnr, source)
            found = _begin(output, identity, processes)
            writer = LatentsWriter(
                output,
                shard_size=shard_size,
                identity=identity,
                store=store,
                dtype=dtype,
                total=len(images),
                found=found,
                save_seconds=save_seconds,
            )
            bounds = batch_bounds(len(images), shard_size, batch_size)
            share = share_of(bounds, [record.rows for record in found], processes.rank, processes.world_size)
            encoder = tokenizer if precision == "float32" else copy.deepcopy(tokenizer).to(getattr(torch, precision))
            _encode(encoder, noisy, share, data.num_workers, writer, processes)
            records = _merge(writer, found, processes)
            check = partial(_check_stored, tokenizer, output, trip, run.train.global_seed, least_psnr)
            complete = partial(complete, records, check=check)
        manifest = processes.on_main(complete)
    if processes.is_main:
        names = images.classes
        of = "" if names is None else f" of {len(names):,} classes ({shortened(names, 3)})"
        print(f"{manifest.count:,} images{of} as latents {list(manifest.shape)} in {output}")
    return manifest


def _identity(tokenizer: AutoencoderKL, images: ImageDataset, run: VavaeRun) -> dict[str, Any]:
    """What latents depend on beside how they are made: an extraction goes on only where this is the same."""
    data = run.images()
    return {
        "tokenizer": fingerprint(tokenizer),
        "images": _names_hash(images),
        "image_size": data.image_size,
        "decoder": images.decoder,
        "exif_rotation": data.exif_rotation,
        "seed": run.train.global_seed,
    }


def _begin(output: Path, identity: dict, processes: Processes) -> list[Stored]:
    """Records of what the directory has already and is intact; every process looks at some of the files."""
    records = processes.on_main(lambda: begin(output, identity))
    return _together(processes, keep_intact(output, records[processes.rank :: processes.world_size]))


def _encode(
    encoder: AutoencoderKL,
    images: ImagesWithNoise,
    share: Sequence[Rows],
    num_workers: int,
    writer: LatentsWriter,
    processes: Processes,
) -> None:
    """Write the latents of this process's share of the batches."""
    stream = read_batches(
        images.images,
        images.load,
        share,
        num_workers=num_workers,
        pin_memory=processes.device.type == "cuda",
    )
    counts: Counter[str] = Counter()
    shown = tqdm(stream, desc="batches", total=len(share), disable=None if processes.is_main else True)
    with closing(stream):
        for (first, _), batch in zip(share, shown, strict=True):
            stored = encode(encoder, batch["image"], batch["noise"], writer.store)
            writer.add(*stored, batch["y"], at=first)
            counts.update({name: int(batch[name].sum()) for name in _COUNTED if name in batch})
    writer.close()
    for name, number in counts.items():
        if number:
            print(f"process {processes.rank}: {number:,} {_COUNTED[name]}")


def _merge(writer: LatentsWriter, found: Sequence[Stored], processes: Processes) -> list[Stored]:
    """Join parts to shards, when all processes have written theirs → records of all that there is then."""
    records = [*found, *_together(processes, writer.records)]
    writer.merge(records, rank=processes.rank, world_size=processes.world_size)
    return [*found, *_together(processes, writer.records)]


def _together(processes: Processes, records: Sequence[Stored]) -> list[Stored]:
    return [record for some in processes.all_gather(records) for record in some]


def _check_stored(tokenizer: AutoencoderKL, output: Path, trip: RoundTrip, seed: int, least: float) -> None:
    latents = LatentDataset(output, seed=seed, unfinished=True)
    plain, mirrored = try_stored(tokenizer, latents, trip, least).mean(0).tolist()
    print(f"{len(trip.names)} images decode from what is stored at {plain:.1f} dB, mirrored at {mirrored:.1f} dB")


def _is_same(theirs: Any, ours: dict) -> bool:
    """Whether a complete set is of this extraction.

    Earlier versions stored samples in float32, and noted the number of processes, not the sizes of batches and shards.
    """
    if isinstance(theirs, dict) and "processes" in theirs:
        former = {key: value for key, value in theirs.items() if key != "processes"}
        theirs = ours | {"store": "sample", "dtype": "float32"} | former
    return theirs == ours


def find_tokenizer(run: VavaeRun, ops) -> tuple[AutoencoderKL, str]:
    """The tokenizer of a run in evaluation mode, and where it was found.

    `ckpt_path` is a weights file, a folder of diffusers, a reference to the hub (`launch.hub`), a checkpoint or a run's
    directory; without it, the run's own directory is meant.
    """
    path = tokenizer_copy(run.ckpt_path) if run.ckpt_path else run.train.directory
    if not weights_file(path).is_dir():
        return load_tokenizer(path, ops, run.model), str(path)
    checkpoint = find_checkpoint(path)
    if checkpoint.state["kind"] != "vavae":
        raise ConfigError(f"{checkpoint.path} is a checkpoint of kind {checkpoint.state['kind']!r}, not 'vavae'")
    tensors = checkpoint.weights("autoencoder", "ema")
    return build_tokenizer(tensors, run.model, ops, checkpoint.path), str(checkpoint.path)


def _names_hash(images: ImageDataset) -> str:
    """SHA-256 of the image paths in their order with the files' sizes, and of the labels: what an index means."""
    digest = hashlib.sha256("\n".join(images.classes or ()).encode())
    for index in range(len(images)):
        digest.update(os.fsencode(images.source.entry(index)) + b"\n")
    digest.update(images.labels.numpy().tobytes())
    return digest.hexdigest()
