"""Mean and covariance of features, in float64: of batches, of parts of a set, of several processes' shares.

Features are floating `[N, D]`. What cannot be measured (non-finite values, too few samples, widths that do not belong
together) raises `ValueError`; nothing is patched up on the way.
"""

import torch
from torch import Tensor

NOT_STATED = "not stated"  # value of a fact that the metadata lack
MAX_MOMENT = 1e100  # of a mean or covariance; far beyond features, and a distance of it would overflow

Moments = tuple[Tensor, Tensor]  # mean [D], covariance [D, D]


class FeatureStatistics:
    """Mean and unbiased covariance of features that arrive in batches, kept in float64 where the features are.

    Each batch is centred on its own mean before it is merged (the pairwise update of Chan, Golub and LeVeque, 1979), so
    a large common offset costs no digits and the batch size does not matter beyond rounding.

    Args:
        count, mean, scatter: of features that were seen elsewhere; the scatter is the sum of the outer products of
            their deviations from the mean.
    """

    def __init__(self, count: int = 0, mean: Tensor | None = None, scatter: Tensor | None = None) -> None:
        self.count = count
        self._mean = mean
        self._scatter = scatter

    @classmethod
    def of(cls, features: Tensor) -> "FeatureStatistics":
        """The statistics of `features [B, D]`; raises ValueError where they are not finite or of another shape."""
        x = torch.as_tensor(features).detach()
        if x.ndim != 2:
            raise ValueError(f"features must be [N, D], got shape {tuple(x.shape)}")
        x = x.double()
        require_finite("features", x)
        if len(x) == 0:
            return cls()
        mean = x.mean(0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def update(self, features: Tensor) -> "FeatureStatistics":
        """Add `features [B, D]`; raises ValueError where they are not finite or change their width."""
        return self.merge(FeatureStatistics.of(features))

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Add what `other` has seen, and keep hold of none of its tensors; raises ValueError for another width."""
        if other._mean is None or other._scatter is None:
            return self
        if self._mean is None or self._scatter is None:
            self.count, self._mean, self._scatter = other.count, other._mean.clone(), other._scatter.clone()
            return self
        if len(other._mean) != len(self._mean):
            raise ValueError(f"features have width {len(other._mean)}, earlier ones had {len(self._mean)}")
        total, shift = self.count + other.count, other._mean.to(self._mean.device) - self._mean
        self._scatter += other._scatter.to(shift.device) + torch.outer(shift, shift) * (
            self.count * other.count / total
        )
        self._mean += shift * (other.count / total)
        self.count = total
        return self

    @property
    def state(self) -> tuple[Tensor, Tensor]:
        """Mean `[D]` and scatter `[D, D]`, as the constructor takes them; raises ValueError where nothing was seen."""
        if self._mean is None or self._scatter is None:
            raise ValueError("a covariance needs at least 2 samples, got 0")
        return self._mean, self._scatter

    @property
    def mean(self) -> Tensor:
        """`[D]` float64."""
        self._require_two()
        return self.state[0].clone()

    @property
    def covariance(self) -> Tensor:
        """`[D, D]` float64, divided by N - 1; symmetric to the last bit."""
        self._require_two()
        covariance = self.state[1] / (self.count - 1)
        return (covariance + covariance.T) / 2

    @property
    def moments(self) -> Moments:
        """Mean and covariance, on the CPU."""
        return self.mean.cpu(), self.covariance.cpu()

    def _require_two(self) -> None:
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")


Node = tuple[int, int]  # level, number: the parts from number · 2^level on, 2^level of them


class MomentsOfParts:
    """Moments of numbered parts of a set, joined in an order that the numbers alone decide.

    Two neighbours of one size are joined as soon as both are there, as digits carry in a binary counter. Whoever adds
    which parts, and when, the whole has the same bits: with one process or with many. As many statistics are held as
    the logarithm of the number of parts.
    """

    def __init__(self) -> None:
        self.nodes: dict[Node, FeatureStatistics] = {}

    def add(self, number: int, part: FeatureStatistics, level: int = 0) -> None:
        """Add part `number` (from 0), or a node of another process; `part` is then this object's."""
        while (neighbour := self.nodes.pop((level, number ^ 1), None)) is not None:
            left, right = (neighbour, part) if number & 1 else (part, neighbour)
            part, level, number = left.merge(right), level + 1, number >> 1
        self.nodes[level, number] = part

    def whole(self) -> FeatureStatistics:
        """The statistics of all parts."""
        total = FeatureStatistics()
        for _, node in sorted(self.nodes.items(), key=lambda item: item[0][1] << item[0][0]):
            total.merge(node)
        return total


def require_moments(mean: Tensor, covariance: Tensor, names: tuple[str, str]) -> None:
    """Raise ValueError, by these names, where a distance cannot be computed from a mean and a covariance: shapes other
    than `[D]` and `[D, D]`, values that are not finite or above 1e100, no symmetry. The spectrum is not looked at."""
    dim = mean.numel()
    for name, value, shape in ((names[0], mean, (dim,)), (names[1], covariance, (dim, dim))):
        if tuple(value.shape) != shape or not dim:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape if dim else 'some values'}")
        require_finite(name, value)
        if (largest := float(value.abs().max())) > MAX_MOMENT:
            raise ValueError(f"{name} holds {largest:.3g}: no statistics of features are that large")
    symmetric(names[1], covariance)


def require_finite(name: str, x: Tensor) -> None:
    """Raise ValueError where a value is not finite."""
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {x.numel()} values are not finite; no distance can be computed from them")


def symmetric(name: str, x: Tensor) -> Tensor:
    """The mean of a matrix and its transpose; raises ValueError where they differ by more than rounding."""
    off, size = float((x - x.T).abs().max()), float(x.abs().max())
    if off > 1e-5 * size:
        raise ValueError(f"{name} is not symmetric (off by {off:.3g}, largest value {size:.3g}), so no covariance")
    return (x + x.T) / 2
