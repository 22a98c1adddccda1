"""`python -m launch extract CONFIG --output DIR [key=value …]`: images as latents to train LightningDiT on.

CONFIG is a tokenizer's run file: `ckpt_path` names the weights (without it, the newest checkpoint of the run is taken)
and `data.data_path` the images. Every image, centre-cropped as in ADM, is encoded once as it is and once mirrored; what
is stored is one posterior sample of each, whose noise depends on (train.global_seed, image index) alone. An interrupted
extraction goes on where it stopped; under a launcher every process writes its own shards.

`python -m launch extract --statistics DIR` makes the latents_stats.pt of latents that came without, as published.
"""

import argparse
import hashlib
import math
import os
from collections import Counter
from contextlib import closing
from pathlib import Path

import torch
from tqdm import tqdm

from common.seeds import generator
from common.tensors import weights_file
from common.text import shortened
from launch.arguments import add_run_file, load_run, local_path
from launch.config import ConfigError, VavaeRun, select_ops
from launch.runtime.run_lock import lock_directory
from launch.training.build import require_one_decoder
from launch.training.checkpoint import find_checkpoint
from launch.training.loader import read_batches
from lightningdit.latents import STATISTICS_FILE
from lightningdit.latents_writer import LatentsWriter, finish, make_statistics
from vavae import seeds
from vavae.data import ImageDataset
from vavae.images import psnr, to_uint8
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
    extract(run, args.output, batch_size=args.batch_size, precision=args.precision, least_psnr=args.least_psnr)
    return 0


def extract(
    run: VavaeRun,
    output: Path,
    *,
    batch_size: int = 32,
    precision: str = "float32",
    least_psnr: float = LEAST_PSNR,
    shard_size: int = SHARD_SIZE,
) -> dict:
    """Write the latents of a run's images into `output` → the manifest.

    Raises ValueError where weights or images are missing or do not fit, the tokenizer reconstructs worse than
    `least_psnr` (dB), or `output` holds the latents of another extraction or is in use by one.
    """
    # Imports DeepSpeed: seconds that a mistake in the config need not wait.
    from launch.training.engine import start_processes

    tokenizer, source = find_tokenizer(run, select_ops(run.kernels))
    processes = start_processes(timeout_minutes=24 * 60)  # processes wait for the slowest at the end
    data = run.images().for_evaluation()
    images = ImageDataset(data, run.train.global_seed, device=processes.device)
    require_one_decoder(images, processes)
    with lock_directory(output, processes):
        identity = {
            "tokenizer": fingerprint(tokenizer),
            "images": _names_hash(images),
            "image_size": data.image_size,
            "decoder": images.decoder,
            "exif_rotation": data.exif_rotation,
            "seed": run.train.global_seed,
            "precision": precision,
            "processes": processes.world_size,
        }
        tokenizer.to(processes.device)
        check_round_trip(tokenizer, images, least_psnr, source)
        tokenizer.to(getattr(torch, precision))
        first, last = (len(images) * r // processes.world_size for r in (processes.rank, processes.rank + 1))
        if not processes.is_main:
            processes.barrier()  # the main process marks the directory as begun, alone
        writer = LatentsWriter(output, rank=processes.rank, shard_size=shard_size, identity=identity)
        if processes.is_main:
            processes.barrier()
        grid = data.image_size // tokenizer.config.downsample_ratio
        batches = _ImagesWithNoise(
            images,
            (2, tokenizer.config.embed_dim, grid, grid),
            run.train.global_seed,
            batch_bounds(first + writer.position, last, shard_size, batch_size),
        )
        stream = read_batches(
            images,
            batches.load,
            range(len(batches)),
            num_workers=data.num_workers,
            pin_memory=processes.device.type == "cuda",
        )
        counts: Counter[str] = Counter()
        with closing(stream):
            for batch in tqdm(stream, desc="batches", total=len(batches), disable=None if processes.is_main else True):
                writer.add(*encode(tokenizer, batch["image"], batch["noise"]), batch["y"])
                counts.update({name: int(batch[name].sum()) for name in _COUNTED if name in batch})
        writer.close()
        for name, number in counts.items():
            if number:
                print(f"process {processes.rank}: {number:,} {_COUNTED[name]}")
        processes.barrier()
        manifest = None
        if processes.is_main:
            facts = {"source": source, "sha256": identity["tokenizer"]}
            manifest = finish(
                output, world_size=processes.world_size, tokenizer=facts, expected=len(images), classes=images.classes
            )
        manifest = processes.broadcast(manifest)
        if processes.is_main:
            of = (
                ""
                if images.classes is None
                else f" of {len(images.classes):,} classes ({shortened(images.classes, 3)})"
            )
            print(f"{manifest.count:,} images{of} as latents {list(manifest.shape)} in {output}")
        return manifest


def find_tokenizer(run: VavaeRun, ops) -> tuple[AutoencoderKL, str]:
    """The tokenizer of a run in evaluation mode, and where it was found.

    `ckpt_path` is a weights file, a folder of diffusers, a checkpoint or a run's directory; without it, the run's own
    directory is meant.
    """
    path = Path(run.ckpt_path) if run.ckpt_path else Path(run.train.output_dir) / (run.train.exp_name or "")
    if not weights_file(path).is_dir():
        return load_tokenizer(path, ops, run.model), str(path)
    checkpoint = find_checkpoint(path)
    if checkpoint.state["kind"] != "vavae":
        raise ConfigError(f"{checkpoint.path} is a checkpoint of kind {checkpoint.state['kind']!r}, not 'vavae'")
    tensors = checkpoint.weights("autoencoder", "ema")
    return build_tokenizer(tensors, run.model, ops, checkpoint.path), str(checkpoint.path)


@torch.no_grad()
def check_round_trip(
    tokenizer: AutoencoderKL, images: ImageDataset, least: float, source: str, count: int = 8
) -> float:
    """PSNR (dB, mean over the first images) of encoding and decoding; raises ConfigError where it is below `least`."""
    indices = torch.arange(min(count, len(images)))
    batch = images.batch(torch.zeros_like(indices), indices)["image"].to(tokenizer.quant_conv.weight.device)
    reconstruction, _ = tokenizer(batch)
    found = psnr(to_uint8(batch), to_uint8(reconstruction.float())).mean().item()
    if not found >= least:
        raise ConfigError(
            f"{source} reconstructs these images at {found:.1f} dB, below {least:g} (--least-psnr): "
            "it is untrained, or not the tokenizer for such images"
        )
    return found


@torch.no_grad()
def encode(tokenizer: AutoencoderKL, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior samples of images [b, 3, H, W] and of their mirror images, float32 [b, C, h, w] on the CPU.

    noise: standard normal [b, 2, C, h, w], for the plain and the mirrored.
    """
    device = tokenizer.quant_conv.weight.device
    images, noise = images.to(device, non_blocking=True), noise.to(device, non_blocking=True)
    posterior = tokenizer.encode(torch.cat([images, images.flip(-1)]))
    plain, mirrored = posterior.sample(noise=torch.cat(noise.unbind(1))).float().cpu().chunk(2)
    return plain, mirrored


def batch_bounds(first: int, last: int, shard_size: int, batch_size: int) -> list[tuple[int, int]]:
    """Start and end of each batch of images `first` to `last`; shards begin at `first`, and no batch spans two.

    An image is then encoded with the same others wherever an extraction goes on: sums in another order of another batch
    would give other bits.
    """
    return [
        (start, min(start + batch_size, shard + shard_size, last))
        for shard in range(first, last, shard_size)
        for start in range(shard, min(shard + shard_size, last), batch_size)
    ]


class _ImagesWithNoise:
    """The images of each of `bounds`, every one with noise of its own."""

    def __init__(self, images: ImageDataset, noise_shape: tuple[int, ...], seed: int, bounds: list[tuple[int, int]]):
        self.images, self.noise_shape, self.seed, self.bounds = images, noise_shape, seed, bounds

    def __len__(self) -> int:
        return len(self.bounds)

    def load(self, number: int, **options: bool) -> dict[str, torch.Tensor]:
        indices = torch.arange(*self.bounds[number])
        noise = torch.stack([self._noise(index) for index in indices.tolist()])
        return self.images.batch(torch.zeros_like(indices), indices, **options) | {"noise": noise}

    def _noise(self, index: int) -> torch.Tensor:
        return torch.randn(self.noise_shape, generator=generator(self.seed, seeds.EXTRACTION_NOISE, index))


def _names_hash(images: ImageDataset) -> str:
    """SHA-256 of the image paths in their order with the files' sizes, and of the labels: what an index means."""
    digest = hashlib.sha256("\n".join(images.classes or ()).encode())
    for index in range(len(images)):
        digest.update(os.fsencode(images.source.entry(index)) + b"\n")
    digest.update(images.labels.numpy().tobytes())
    return digest.hexdigest()
