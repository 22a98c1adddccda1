"""The training images that are nearest to samples: has a model learnt its data by heart?"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from launch.evaluation.image_source import ImageSource

Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Neighbours:
    """Of S samples the k nearest images uint8 [S, k, H, W, 3], their indices and, ascending, distances [S, k]."""

    images: Tensor
    indices: Tensor
    distances: Tensor


def pixel_features(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] → float32 [B, H·W·3] scaled so that distances are root mean squares of differences in
    [0, 1]."""
    pixels = images.flatten(1).float() / 255
    return pixels / pixels.shape[1] ** 0.5


def nearest_images(
    samples: Tensor, images: ImageSource, count: int, features: Features = pixel_features, batch_size: int = 64
) -> Neighbours:
    """The `count` images nearest to each of `samples` uint8 [S, H, W, 3], by the Euclidean distance of `features`.

    The images are gone through once; only the nearest so far are in memory. Equally near ones are in their order.
    Raises ValueError where there are fewer images than that, or of another size than the samples where pixels compare.
    """
    if len(images) < count:
        raise ValueError(f"{images.description} holds {len(images)} images; {count} neighbours are wanted")
    wanted = features(samples).cpu()  # [S, D]
    distances = torch.full((len(samples), 0), 0.0)
    indices, found, position = torch.zeros(len(samples), 0, dtype=torch.int64), None, 0
    for batch in images.batches(batch_size):
        if features is pixel_features and batch.shape[1:] != samples.shape[1:]:
            sizes = [f"{side[2]}×{side[1]}" for side in (samples.shape, batch.shape)]
            raise ValueError(f"samples are {sizes[0]}, {images.description} holds {sizes[1]}: give --image-size")
        # Not by matrix products, which lose the small distances of near copies.
        near = torch.cdist(wanted, features(batch).cpu(), compute_mode="donot_use_mm_for_euclid_dist")  # [S, b]
        candidates = torch.cat([distances, near], 1)
        numbers = torch.arange(position, position + len(batch)).expand(len(samples), -1)
        order = candidates.sort(dim=1, stable=True).indices[:, :count]
        distances, indices = candidates.gather(1, order), torch.cat([indices, numbers], 1).gather(1, order)
        found = _chosen(found, batch, order)
        position += len(batch)
    assert found is not None, "there are images"
    return Neighbours(found, indices, distances)


def _chosen(found: Tensor | None, batch: Tensor, order: Tensor) -> Tensor:
    """The images [S, k, H, W, 3] at places `order` [S, k] of those found so far and, behind them, of a batch."""
    held, rows = 0 if found is None else found.shape[1], []
    for sample, places in enumerate(order.tolist()):
        earlier = batch[:0] if found is None else found[sample]
        rows.append(torch.stack([earlier[p] if p < held else batch[p - held] for p in places]))
    return torch.stack(rows)
