"""KID, the kernel distance of two sets of features (arXiv 1801.01401)."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from launch.evaluation.moments import require_finite

SUBSETS, SUBSET_SIZE = 100, 1000  # of arXiv 1801.01401's implementation and torch-fidelity
SEED = 2020  # torch-fidelity's, so that its subsets are these


class KernelDistance(NamedTuple):
    """Mean and standard deviation (over the subsets, divided by their number) of the squared MMD."""

    mean: float
    std: float


def kernel_distance(
    fake: Tensor,
    real: Tensor,
    *,
    subsets: int = SUBSETS,
    size: int = SUBSET_SIZE,
    seed: int = SEED,
    device: torch.device | str | None = None,
) -> KernelDistance:
    """The squared maximum mean discrepancy of `fake [M, D]` to `real [N, D]` under the kernel (x·y / D + 1)³.

    The unbiased estimate (Gretton et al., JMLR 13, 2012, eq. 3: all pairs of the two sets in its last term), over
    random subsets without repetition: of `size`, or of as many as the smaller set has. They are drawn as torch-fidelity
    draws them (NumPy's RandomState, first of the fakes). It may be a little below 0. float64, one subset at a time.

    Raises ValueError for features that are not finite or of two widths, and fewer than 2 of a set.
    """
    for name, x in (("fake", fake), ("real", real)):
        require_finite(name, x)
        if len(x) < 2:
            raise ValueError(f"a kernel distance needs at least 2 samples, {name} has {len(x)}")
    if fake.shape[1] != real.shape[1]:
        raise ValueError(f"features of two widths cannot be compared: {fake.shape[1]} and {real.shape[1]}")
    size, rng = min(size, len(fake), len(real)), np.random.RandomState(seed)
    if size == len(fake) == len(real):
        subsets = 1  # each of them is all there is
    found = []
    for _ in range(subsets):
        x, y = (s[rng.choice(len(s), size, replace=False)].to(device or s.device).double() for s in (fake, real))
        found.append(float(_squared_mmd(x, y)))
    return KernelDistance(float(np.mean(found)), float(np.std(found)))


def _squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased estimate for `x` and `y`, both `[m, D]`."""
    m = len(x)
    within = [_kernel(s, s) for s in (x, y)]
    others = [k.sum() - k.diagonal().sum() for k in within]  # an x is not compared with itself
    return (others[0] + others[1]) / (m * (m - 1)) - 2 * _kernel(x, y).sum() / m**2


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
