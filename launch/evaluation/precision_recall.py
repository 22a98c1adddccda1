"""Precision and recall of samples by k-nearest-neighbour balls (arXiv 1904.06991), in blocks of bounded memory."""

import torch
from torch import Tensor

from launch.evaluation.moments import require_finite

_SLACK = 1e-11  # of squared norms: more than the rounding of a squared distance that comes of a product of matrices
_PAIRS = 4096  # pairs of which the distance is taken exactly at a time


def precision_recall(
    real: Tensor, fake: Tensor, k: int = 3, block: int = 2048, device: torch.device | str | None = None
) -> tuple[float, float]:
    """Precision and recall of `fake [M, D]` against `real [N, D]`.

    Precision is the share of fakes that lie within the ball of some real (its radius: the distance to the k-th nearest
    other real), recall the same with the roles exchanged. float64: blocks of distances come of products of matrices;
    where such a distance and a radius differ by no more than rounding, and for the radii, it is taken of the
    difference of the two vectors. So neither the blocks nor the device decide, and equal images are equal.

    Args:
        block: rows and columns of distances in memory at once.
        device: where to compute (default: where `real` is).

    Raises ValueError for features that are not finite, or no more than k of a set.
    """
    for name, x in (("real", real), ("fake", fake)):
        require_finite(name, x)
        if len(x) <= k:
            raise ValueError(f"precision and recall with k={k} need more than {k} samples, {name} has {len(x)}")
    centre = real.double().mean(0)  # the rounding of a product is that of its size
    real, fake = ((x.double() - centre).to(device or x.device) for x in (real, fake))
    return _coverage(real, fake, k, block), _coverage(fake, real, k, block)


def _coverage(centres: Tensor, points: Tensor, k: int, block: int) -> float:
    """The share of the points that lie in the ball of some centre."""
    radii = torch.cat([_squared_radii(rows, centres, k, block) for rows in centres.split(block)])
    inside = [_inside(rows, centres, radii, block) for rows in points.split(block)]
    return float(torch.cat(inside).double().mean())


def _squared_radii(rows: Tensor, centres: Tensor, k: int, block: int) -> Tensor:
    """Squared distances `[B]` of rows of the centres to their k-th nearest other centre."""
    # k + 1 because the nearest of a centre's neighbours among the centres is the centre itself
    values = rows.new_empty(len(rows), 0)
    places = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
    for first in range(0, len(centres), block):
        found = _squared_distances(rows, centres[first : first + block])
        values = torch.cat([values, found], 1)
        here = torch.arange(first, first + found.shape[1], device=rows.device).expand(len(rows), -1)
        places = torch.cat([places, here], 1)
        nearest = values.topk(min(k + 1, values.shape[1]), dim=1, largest=False).indices
        values, places = values.gather(1, nearest), places.gather(1, nearest)
    exact = [(rows - centres[place]).square().sum(1) for place in places.unbind(1)]
    return torch.stack(exact, 1).amax(1)


def _inside(points: Tensor, centres: Tensor, radii: Tensor, block: int) -> Tensor:
    """Whether each point `[B, D]` lies in the ball of some centre, bool `[B]`."""
    inside = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for some, limits in zip(centres.split(block), radii.split(block), strict=True):
        beyond = _squared_distances(points, some) - limits
        slack = _SLACK * (points.square().sum(1)[:, None] + some.square().sum(1))
        inside |= (beyond < -slack).any(1)
        for pairs in ((beyond.abs() <= slack) & ~inside[:, None]).nonzero().split(_PAIRS):
            row, column = pairs[~inside[pairs[:, 0]]].unbind(1)
            within = (points[row] - some[column]).square().sum(1) <= limits[column]
            inside[row[within]] = True
    return inside


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * (a @ b.T)).clamp_min(0)
