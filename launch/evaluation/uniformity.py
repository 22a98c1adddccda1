"""How evenly points fill their space: density, its spread, Gini coefficient and entropy (arXiv 2501.01423)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from launch.evaluation.moments import FeatureStatistics, require_finite


@dataclass(frozen=True)
class Uniformity:
    """Evenness of points, from the density at each of them; equal densities give 0, 0, 1."""

    density_cv: float  # standard deviation over mean
    gini: float
    normalized_entropy: float  # of the densities as a distribution over the points, over log N


def uniformity(points: Tensor) -> Uniformity:
    """Evenness of `points [N, d]` under a Gaussian kernel density estimate at the points themselves.

    The measure by which arXiv 2501.01423 compares latent spaces, there on 2-D t-SNE embeddings; the 1e-10 inside the
    logarithm is the published definition's.
    """
    density, _ = gaussian_kde(points).sort()
    n, total = len(density), density.sum()
    rank = torch.arange(1, n + 1, dtype=torch.float64)
    share = density / total
    return Uniformity(
        density_cv=float(density.std(correction=0) / density.mean()),
        gini=float(((2 * rank - n - 1) * density).sum() / (n * total)),
        normalized_entropy=float(-(share * (share + 1e-10).log()).sum() / math.log(n)),
    )


def gaussian_kde(points: Tensor, block: int = 1024) -> Tensor:
    """Density `[N]` float64 at each of `points [N, d]`: Gaussian kernels with the points' unbiased covariance scaled by
    Scott's factor, `N^(-2/(d+4))`."""
    statistics = FeatureStatistics().update(points)
    x = torch.as_tensor(points).detach().to("cpu", torch.float64)
    n, d = x.shape
    covariance = statistics.covariance * n ** (-2 / (d + 4))
    lower, info = torch.linalg.cholesky_ex(covariance)
    if info:
        raise ValueError(f"{n} points of {d} coordinates lie in a lower-dimensional subspace and have no density")
    white = torch.linalg.solve_triangular(lower, (x - statistics.mean).T, upper=False).T
    log_norm = math.log(n) + d / 2 * math.log(2 * math.pi) + lower.diagonal().log().sum()
    exponents = (torch.cdist(rows, white, compute_mode="donot_use_mm_for_euclid_dist") for rows in white.split(block))
    return torch.cat([(-0.5 * e.square()).exp().sum(1) for e in exponents]) * (-log_norm).exp()


def latent_uniformity(vectors: Tensor, perplexity: float = 30.0, seed: int = 42) -> Uniformity:
    """Uniformity of latent `vectors [N, C]` in a 2-D t-SNE embedding (about a minute for 10,000 of them on a CPU)."""
    from sklearn.manifold import TSNE

    if len(vectors) <= perplexity:
        raise ValueError(f"t-SNE with perplexity {perplexity} needs more vectors than that, got {len(vectors)}")
    require_finite("vectors", vectors)
    embedding = TSNE(n_components=2, perplexity=perplexity, random_state=seed).fit_transform(vectors.cpu().numpy())
    return uniformity(torch.from_numpy(embedding))
