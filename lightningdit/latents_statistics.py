"""Statistics of sets of latents: measured shard by shard, merged, written; and whether those of a set fit its data."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
import torch
from pydantic import Field

from common.files import path_exists
from common.records import Record
from common.seeds import mix
from common.tensors import save_pickled
from lightningdit.latents import (
    MANIFEST_FILE,
    STATISTICS_FILE,
    LatentsError,
    LatentStatistics,
    Manifest,
    Positive,
    Store,
    read_manifest,
    shards_of,
)
from lightningdit.latents_shards import Shard

CHECKED = 4096  # latents that `check_statistics` reads: at 32 × 16 × 16 in float32 128 MiB
TOLERANCE = 0.05  # of the standard deviation
STANDARD_ERRORS = 5.0
_BLOCK = 256  # latents in memory at once

NotNegative = Annotated[float, Field(ge=0)]


class Moments(Record):
    """Moments of a shard's latents, per channel: count, mean and sum of squared deviations m2.

    Where means and standard deviations are stored, those are the moments of the means, and `variance` is the mean of
    the squared standard deviations.
    """

    count: Positive
    mean: tuple[float, ...]
    m2: tuple[NotNegative, ...]
    variance: tuple[NotNegative, ...] | None = None


def moments_of(stored: torch.Tensor, store: Store) -> Moments:
    """Moments of what is stored in a shard [N, S, H, W] of any float dtype, in float64.

    NumPy adds up in one order, however many threads there are: a set's statistics are the same bits whoever made it.
    """
    values, deviations = stored.chunk(2, dim=1) if store == "moments" else (stored, None)
    means, m2 = [], []
    for channel in values.unbind(1):  # one at a time: all in float64 would take twice the memory of the shard
        x = channel.double().flatten().numpy()
        means.append(float(x.mean()))
        m2.append(float(np.square(x - x.mean()).sum()))
    variance = None
    if deviations is not None:
        squares = (np.square(channel.double().flatten().numpy()) for channel in deviations.unbind(1))
        variance = tuple(float(x.mean()) for x in squares)
    return Moments(count=values[:, 0].numel(), mean=tuple(means), m2=tuple(m2), variance=variance)


def merge_moments(parts: Iterable[Moments]) -> dict:
    """Mean and unbiased std of the union, by the pairwise update of Chan, Golub and LeVeque (1979).

    Of moments, those of the samples to be drawn: with n means μ and standard deviations σ, the mean is that of μ, and
    the variance Σ (μ − mean(μ))² / (n − 1) + mean(σ²), which is what the unbiased variance of n samples, one of each
    posterior, is expected to be.
    """
    count, mean, m2, variance = 0, np.zeros(()), np.zeros(()), np.zeros(())
    for part in parts:
        n, delta = part.count, np.array(part.mean) - mean
        m2 = m2 + np.array(part.m2) + delta**2 * count * n / (count + n)
        mean = mean + delta * n / (count + n)
        variance = variance + (np.array(part.variance or 0.0) - variance) * n / (count + n)
        count += n
    return {"mean": mean.tolist(), "std": np.sqrt(m2 / max(count - 1, 1) + variance).tolist(), "count": count}


def write_statistics(directory: Path, statistics: dict) -> None:
    """Write `latents_stats.pt` of {"mean", "std"} per channel."""
    tensors = {key: torch.tensor(statistics[key]).view(1, -1, 1, 1) for key in ("mean", "std")}
    save_pickled(directory / STATISTICS_FILE, tensors)


def make_statistics(directory: Path) -> dict:
    """Write the statistics of a set that has none, such as the published ones → {"mean", "std", "count"}.

    Raises LatentsError where there is no set, it is unfinished, its latents are not finite, or it has statistics.
    """
    path = directory / STATISTICS_FILE
    if path_exists(path):
        raise LatentsError(f"{path} is already there: remove it first to make it anew")
    if not directory.is_dir():
        raise LatentsError(f"{directory} is not a directory")
    shards = [Shard.read(shard) for shard in shards_of(directory, read_manifest(directory))]
    if len(kinds := {(shard.shape, shard.store) for shard in shards}) > 1:
        raise LatentsError(f"{directory} holds latents of shapes and stores {sorted(kinds)}; all of one are wanted")
    statistics = merge_moments(moments_of(_finite(shard), shard.store) for shard in shards)
    write_statistics(directory, statistics)
    return statistics


def _finite(shard: Shard) -> torch.Tensor:
    """What is stored in a shard without the mirrored latents; raises LatentsError where something is not finite."""
    stored = shard.stored()
    if not torch.isfinite(stored).all():
        raise LatentsError(f"{shard.path} has latents that are not finite")
    return stored


class Latents(Protocol):
    """What is asked of a `LatentDataset` here."""

    path: Path
    manifest: Manifest | None
    shape: tuple[int, int, int]
    latent_norm: bool
    statistics: LatentStatistics

    def __len__(self) -> int: ...

    def stored(self, indices: np.ndarray, flips: np.ndarray) -> np.ndarray: ...


def check_statistics(latents: Latents, count: int = CHECKED) -> None:
    """Raise LatentsError where the statistics that a set is normalised with are not those of its latents.

    Of `count` latents without mirroring, one drawn from each of as many stretches of the set (of all where there are
    fewer), the mean and standard deviation of every channel are compared with the stated ones. They do not fit where
    either is off by more than 5 % of the standard deviation and by more than 5 standard errors. Positions of one latent
    are correlated, so errors are those of means over images: of an image's mean, and of its mean squared deviation v
    from the channel's mean (for the standard deviation s, by the delta method, `std(v) / (2·s·√n)`). Latents without
    the rare large values of a set have too small a deviation and too small an error of it: where the stated deviation
    is the larger one, errors are enlarged as it is, up to twice.

    The drawing follows from the size of the set alone, so that every process comes to the same. A set without
    normalisation (`latent_norm: false`) has nothing to fit.
    """
    if not latents.latent_norm:
        return
    indices = _spread(len(latents), count)
    found, stated = _measure(latents, indices), latents.statistics
    scales = {"mean": found["std"].maximum(stated.std.double()), "std": stated.std.double()}
    enlarged = STANDARD_ERRORS * (stated.std / found["std"]).clamp(1, 2)
    off = torch.zeros(latents.shape[0], dtype=torch.float64)  # per channel, where it is wrong
    for name, scale in scales.items():
        difference = (found[name] - getattr(stated, name)).abs()
        wrong = (difference > TOLERANCE * scale) & (difference > enlarged * found[f"{name}_error"])
        off = off.maximum((difference / scale).where(wrong, 0.0))
    if off.any():
        raise LatentsError(_misfit(latents, found, off, len(indices)))


def _spread(total: int, count: int) -> np.ndarray:
    """Indices that cover a set evenly without a period, which might be that of its labels."""
    count = min(count, total)
    edges = np.arange(count + 1) * total // count
    return edges[:-1] + (mix(total, np.arange(count)) % np.diff(edges).astype(np.uint64)).astype(np.int64)


def _measure(latents: Latents, indices: np.ndarray) -> dict[str, torch.Tensor]:
    """`mean` and `std` of these latents and their standard errors, `mean_error` and `std_error`, float64 [C]."""
    first, second, within = [], [], []  # of each image and channel, the means of x, of x² and of a posterior's variance
    for start in range(0, len(indices), _BLOCK):
        block = indices[start : start + _BLOCK]
        stored = torch.from_numpy(latents.stored(block, np.zeros(len(block), bool)))  # [B, 1 or 2, C·H·W]
        x = stored.double().unflatten(2, (latents.shape[0], -1))  # [B, 1 or 2, C, H·W]
        first.append(x[:, 0].mean(-1))
        second.append(x[:, 0].square().mean(-1))
        within.append(x[:, 1:].square().mean(-1).sum(1))
    means, squares, variances = torch.cat(first), torch.cat(second), torch.cat(within)  # [n, C] each
    mean, count = means.mean(0), len(indices)
    values = count * math.prod(latents.shape[1:])
    unbiased = values / max(values - 1, 1)
    deviations = unbiased * (squares - 2 * mean * means + mean**2) + variances  # [n, C]
    std = deviations.mean(0).clamp_min(0).sqrt()
    spread_of_mean, spread_of_square = means.std(0, correction=0), deviations.std(0, correction=0)
    return {
        "mean": mean,
        "std": std,
        "mean_error": spread_of_mean / math.sqrt(count),
        "std_error": spread_of_square / (2 * std.clamp_min(1e-30) * math.sqrt(count)),
    }


def _misfit(latents: Latents, found: dict[str, torch.Tensor], off: torch.Tensor, count: int) -> str:
    path, stated = latents.path / STATISTICS_FILE, latents.statistics
    channel, others = int(off.argmax()), int(off.count_nonzero()) - 1
    more = f" and {others} more" if others else ""
    stale = f"{path.name} and {MANIFEST_FILE}" if latents.manifest else path.name
    return (
        f"{path} does not fit the latents beside it: for channel {channel}{more} it says mean "
        f"{stated.mean[channel]:.4g} and std {stated.std[channel]:.4g}; {count:,} of {len(latents):,} latents have "
        f"{found['mean'][channel]:.4g} ± {found['mean_error'][channel]:.1g} and {found['std'][channel]:.4g} ± "
        f"{found['std_error'][channel]:.1g}. Remove {stale} and run `python -m launch extract --statistics "
        f"{latents.path}`. Where the statistics of other latents are meant, as in fine-tuning a model that was trained "
        "with them, say data.check_statistics=false"
    )
