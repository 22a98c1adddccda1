"""Figures with known answers, by the very code, and on the very device, that other figures then come from.

The points are ±cᵢ along each axis i: their mean is 0, their covariance diagonal, and every figure of them a short
formula. They go through the same pass as images do, of which they are the pixels.
"""

import math
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from launch.evaluation.frechet import frechet_distance
from launch.evaluation.inception_score import inception_score
from launch.evaluation.kid import kernel_distance
from launch.evaluation.one_pass import ImageFeatures, measure
from launch.evaluation.precision_recall import precision_recall

_AXES = 12
_BATCH = 5  # of 24 points: neither batches nor parts are all full
_TOLERANCE = 1e-9


class _Points:
    """Points [N, D] as images: each is the number of itself, in three channels of one pixel."""

    description = "the self-test"

    def __init__(self, order: Tensor):
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        numbers = self.order[start:stop].to(torch.uint8)[:, None, None, None]
        yield from numbers.expand(-1, 1, 1, 3).split(size)


@cache
def self_test(device: str = "cpu") -> dict[str, float]:
    """Figure → by how much it missed its known answer; raises ValueError where one is wrong.

    Known are the distance of two Gaussians, the figures of a set against itself, and that the order of a set changes
    none; and that a batch has the same features alone.
    """
    scale = 1 + torch.arange(_AXES, dtype=torch.float64) / 4  # which float32 holds exactly
    points, others = _along_axes(scale), _along_axes(scale.flip(0) / 2) + 0.5
    straight = torch.arange(2 * _AXES)
    shuffled = straight.roll(7).flip(0)
    one, same, other = (
        _measured(x, order, device) for x, order in ((points, straight), (points, shuffled), (others, straight))
    )
    variance = 2 * scale**2 / (2 * _AXES - 1)
    spread = (variance.sqrt() - (variance.flip(0) / 4).sqrt()).square().sum()
    want = {"fid": float(spread) + _AXES * 0.25, "fid_of_itself": 0.0, "kid_of_itself": _own_kernel_distance(scale)}
    want |= {"precision": 1.0, "recall": 1.0, "inception_score": float(_AXES)}
    wrong: dict[str, float] = {}
    for real in (one, same):
        got = _figures(one, real, other, device)
        wrong |= {name: max(wrong.get(name, 0.0), abs(got[name] - known)) for name, known in want.items()}
    if bad := [f"{name} misses its known answer {want[name]:g} by {miss:.3g}" for name, miss in wrong.items()
               if not miss <= _TOLERANCE * max(1.0, abs(want[name]))]:  # fmt: skip
        raise ValueError(f"the self-test failed on {device}, so no figure is taken there: {'; '.join(bad)}")
    return wrong


def _along_axes(scale: Tensor) -> Tensor:
    """±cᵢ along each axis, [2·D, D]."""
    return torch.cat([torch.diag(scale), -torch.diag(scale)])


def _measured(points: Tensor, order: Tensor, device: str) -> ImageFeatures:
    points = points.to(device)

    def extractor(images: Tensor) -> dict[str, Tensor]:
        numbers = images[:, 0, 0, 0].long().to(device)
        return {"features": points[numbers], "logits": 100 * points[numbers].abs().sign()}

    return measure(_Points(order), extractor, _BATCH)


def _figures(one: ImageFeatures, same: ImageFeatures, other: ImageFeatures, device: str) -> dict[str, float]:
    assert one.kept is not None and same.kept is not None and same.logits is not None
    precision, recall = precision_recall(one.kept, same.kept, device=device)
    return {
        "fid": frechet_distance(*same.features.moments, *other.features.moments),
        "fid_of_itself": frechet_distance(*one.features.moments, *same.features.moments),
        "kid_of_itself": kernel_distance(same.kept, one.kept, device=device).mean,
        "precision": precision,
        "recall": recall,
        "inception_score": inception_score(same.logits),
    }


def _own_kernel_distance(scale: Tensor) -> float:
    """KID of the points with themselves: products of two are cᵢ² with itself, −cᵢ² with its opposite, else 0."""
    count, square = 2 * len(scale), scale**2 / len(scale)
    itself, opposite = 2 * ((square + 1) ** 3).sum(), 2 * ((1 - square) ** 3).sum()
    others = float(opposite) + count * (count - 2)
    return 2 * others / (count * (count - 1)) - 2 * (others + float(itself)) / count**2


def check_extractor(extractor, images: Tensor) -> None:
    """Raise ValueError where the features of an image depend on the batch that it is in, as in training mode.

    images: uint8 `[B, H, W, 3]`, two or more to be told.
    """
    if len(images) < 2:
        return
    together, alone = extractor(images), extractor(images[1:2])
    for name, value in alone.items():
        there = together[name][1:2]
        if not torch.isfinite(value).all():
            continue  # the pass names the image
        if not math.isfinite(miss := float((there - value).abs().max())) or miss > 1e-2 * float(value.abs().max()):
            raise ValueError(f"the self-test failed: {name} of an image differ by {miss:.3g} with the batch it is in")
