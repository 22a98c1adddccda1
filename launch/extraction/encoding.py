"""Images as what is stored of them: division into batches, the noise of samples, the encoder's pass."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from common.seeds import generator
from lightningdit.latents import Store
from lightningdit.latents_parts import Rows
from vavae import seeds
from vavae.data import ImageDataset
from vavae.model import AutoencoderKL


@torch.no_grad()
def encode(
    tokenizer: AutoencoderKL, images: torch.Tensor, noise: torch.Tensor, store: Store = "sample"
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is stored of images [b, 3, H, W] and of their mirror images, float32 [b, C, h, w] each, on the CPU.

    Of the posterior: a sample, its mean, or for `moments` mean and standard deviation, [b, 2·C, h, w].
    noise: of the samples, standard normal [b, 2, C, h, w], for the plain and the mirrored; else it is not looked at.
    """
    device = tokenizer.quant_conv.weight.device
    images, noise = images.to(device, non_blocking=True), noise.to(device, non_blocking=True)
    posterior = tokenizer.encode(torch.cat([images, images.flip(-1)]))
    if store == "moments":
        stored = torch.cat([posterior.mean, posterior.std], 1)
    else:
        stored = posterior.mode() if store == "mean" else posterior.sample(noise=torch.cat(noise.unbind(1)))
    plain, mirrored = stored.float().cpu().chunk(2)
    return plain, mirrored


def batch_bounds(total: int, shard_size: int, batch_size: int) -> list[Rows]:
    """Start and end of each batch of images; no batch spans two shards.

    An image is then encoded with the same others whoever encodes it, and wherever an extraction goes on: sums in
    another order of another batch would give other bits.
    """
    return [
        (start, min(start + batch_size, shard + shard_size, total))
        for shard in range(0, total, shard_size)
        for start in range(shard, min(shard + shard_size, total), batch_size)
    ]


def share_of(bounds: Sequence[Rows], there: Iterable[Rows], rank: int, world_size: int) -> list[Rows]:
    """The batches that a process encodes: of those that are not there, one stretch, as long as every other's."""
    done = np.zeros(bounds[-1][1] if bounds else 0, dtype=bool)
    for start, stop in there:
        done[start:stop] = True
    missing = [(start, stop) for start, stop in bounds if not done[start:stop].all()]
    first, last = (len(missing) * r // world_size for r in (rank, rank + 1))
    return missing[first:last]


class ImagesWithNoise:
    """Images, every one with noise [2, C, h, w] of its own, by (seed, index)."""

    def __init__(self, images: ImageDataset, noise_shape: tuple[int, ...], seed: int):
        self.images, self.noise_shape, self.seed = images, noise_shape, seed

    def load(self, bounds: Rows, **options: bool) -> dict[str, torch.Tensor]:
        """The images of a batch; see `of`."""
        return self.of(torch.arange(*bounds), **options)

    def of(self, indices: torch.Tensor, **options: bool) -> dict[str, torch.Tensor]:
        """Images `indices` [b], as `ImageDataset.batch` gives them, and their `noise` [b, 2, C, h, w]."""
        noise = torch.stack([self._noise(index) for index in indices.tolist()])
        return self.images.batch(torch.zeros_like(indices), indices, **options) | {"noise": noise}

    def _noise(self, index: int) -> torch.Tensor:
        return torch.randn(self.noise_shape, generator=generator(self.seed, seeds.EXTRACTION_NOISE, index))
