"""Sets of random latents on disk, in the project's format."""

from pathlib import Path

import torch

from lightningdit.latents_writer import LatentsWriter, finish


def write_latents(
    directory: Path, shape: tuple[int, int, int], count: int, classes: int, shard_size: int = 10_000
) -> None:
    """Normal latents [C, S, S] of that shape; labels go round the classes."""
    writer, generator = LatentsWriter(directory, shard_size=shard_size), torch.Generator().manual_seed(0)
    for start in range(0, count, 512):
        x = torch.randn(min(512, count - start), *shape, generator=generator)
        writer.add(x, x.flip(-1), torch.arange(start, start + len(x)) % classes)
    writer.close()
    finish(directory, expected=count)
