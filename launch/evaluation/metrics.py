"""Metrics of images and latents as pure functions of tensors in float64: FID, PSNR, SSIM, IS, precision, recall.

Images are uint8 `[N, H, W, 3]`; features are floating `[N, D]`. What cannot be measured (non-finite values, too few
samples, shapes that do not belong together) raises `ValueError`; nothing is patched up on the way.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vavae import images

NOT_STATED = "not stated"  # value of a fact that the metadata lack
MAX_MOMENT = 1e100  # of a mean or covariance; far beyond features, and a distance of it would overflow


Moments = tuple[Tensor, Tensor]  # mean [D], covariance [D, D]


class FeatureStatistics:
    """Mean and unbiased covariance of features that arrive in batches, kept in float64.

    Each batch is centred on its own mean before it is merged (the pairwise update of Chan, Golub and LeVeque, 1979), so
    a large common offset costs no digits and the batch size does not matter beyond rounding.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None  # sum of outer products of deviations from the mean

    def update(self, features: Tensor) -> "FeatureStatistics":
        """Add `features [B, D]`; raises ValueError where they are not finite or change their width."""
        x = torch.as_tensor(features).detach()
        if x.ndim != 2:
            raise ValueError(f"features must be [N, D], got shape {tuple(x.shape)}")
        x = x.to("cpu", torch.float64)
        _require_finite("features", x)
        if self._mean is not None and x.shape[1] != len(self._mean):
            raise ValueError(f"features have width {x.shape[1]}, earlier ones had {len(self._mean)}")
        if len(x) == 0:
            return self
        mean = x.mean(0)
        scatter = (x - mean).T @ (x - mean)
        if self._mean is None:
            self.count, self._mean, self._scatter = len(x), mean, scatter
            return self
        total, shift = self.count + len(x), mean - self._mean
        self._scatter += scatter + torch.outer(shift, shift) * (self.count * len(x) / total)
        self._mean += shift * (len(x) / total)
        self.count = total
        return self

    @property
    def mean(self) -> Tensor:
        """`[D]` float64."""
        self._require_two()
        return self._mean.clone()

    @property
    def covariance(self) -> Tensor:
        """`[D, D]` float64, divided by N - 1; symmetric to the last bit."""
        self._require_two()
        covariance = self._scatter / (self.count - 1)
        return (covariance + covariance.T) / 2

    @property
    def moments(self) -> Moments:
        """Mean and covariance."""
        return self.mean, self.covariance

    def _require_two(self) -> None:
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians, `|mu1 - mu2|² + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^½)`.

    The trace of the root is that of the symmetric `(sigma1^½ sigma2 sigma1^½)^½`, hence the sum of the square roots of
    its eigenvalues: no general matrix root, no complex numbers, no jitter on the diagonal, and a rank-deficient
    covariance is as good as any other. Means `[D]`, covariances `[D, D]`, computed in float64 (Dowson and Landau,
    1982; as an image metric arXiv 1706.08500). Raises ValueError on non-finite values, shapes that do not fit, and
    matrices that are not covariances.
    """
    mu1, mu2 = (torch.as_tensor(mu).detach().to("cpu", torch.float64) for mu in (mu1, mu2))
    sigma1, sigma2 = (torch.as_tensor(s).detach().to("cpu", torch.float64) for s in (sigma1, sigma2))
    require_moments(mu1, sigma1, ("mu1", "sigma1"))
    if mu1.shape != mu2.shape:
        raise ValueError(f"mu2 has shape {tuple(mu2.shape)}, expected {tuple(mu1.shape)}")
    require_moments(mu2, sigma2, ("mu2", "sigma2"))
    values, vectors = torch.linalg.eigh(_symmetric("sigma1", sigma1))
    root = (vectors * _nonnegative("sigma1", values).sqrt()) @ vectors.T
    product = root @ _symmetric("sigma2", sigma2) @ root
    values = torch.linalg.eigvalsh((product + product.T) / 2)
    # The product can be indefinite only where sigma2 is: its own spectrum need not be computed.
    cross = _nonnegative("sigma2", values).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross
    return max(float(distance), 0.0)  # equal Gaussians may come out at minus some rounding


def require_moments(mean: Tensor, covariance: Tensor, names: tuple[str, str]) -> None:
    """Raise ValueError, by these names, where a distance cannot be computed from a mean and a covariance: shapes other
    than `[D]` and `[D, D]`, values that are not finite or above 1e100, no symmetry. The spectrum is not looked at."""
    dim = mean.numel()
    for name, value, shape in ((names[0], mean, (dim,)), (names[1], covariance, (dim, dim))):
        if tuple(value.shape) != shape or not dim:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape if dim else 'some values'}")
        _require_finite(name, value)
        if (largest := float(value.abs().max())) > MAX_MOMENT:
            raise ValueError(f"{name} holds {largest:.3g}: no statistics of features are that large")
    _symmetric(names[1], covariance)


def _require_finite(name: str, x: Tensor) -> None:
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {x.numel()} values are not finite; no distance can be computed from them")


def _symmetric(name: str, x: Tensor) -> Tensor:
    off, size = float((x - x.T).abs().max()), float(x.abs().max())
    if off > 1e-5 * size:
        raise ValueError(f"{name} is not symmetric (off by {off:.3g}, largest value {size:.3g}), so no covariance")
    return (x + x.T) / 2


def _nonnegative(name: str, eigenvalues: Tensor) -> Tensor:
    """Round-off below zero becomes zero; anything worse is no covariance."""
    low, high = float(eigenvalues.min()), float(eigenvalues.abs().max())
    if low < -1e-5 * high:
        raise ValueError(f"{name} has a negative eigenvalue ({low:.3g}, largest {high:.3g}), so it is no covariance")
    return eigenvalues.clamp_min(0)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair of uint8 images `[N, H, W, 3]`: `20·log10(255/√mse)`.

    Returns `[N]` float64; a pair without any difference is `inf`.
    """
    _require_images(a, b)
    return images.psnr(a, b)  # a mean over all but the first dimension: the layout does not matter to it


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair of uint8 images `[N, H, W, 3]`, `[N]` float64; see `vavae.images.ssim`.

    Raises ValueError for images of fewer than 11 pixels a side.
    """
    _require_images(a, b)
    return images.ssim(*(x.permute(0, 3, 1, 2) for x in (a, b)))


def _require_images(a: Tensor, b: Tensor) -> None:
    for name, x in (("first", a), ("second", b)):
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[-1] != 3:
            raise ValueError(f"the {name} images must be uint8 [N, H, W, 3], got {x.dtype} {tuple(x.shape)}")
    if a.shape != b.shape:
        raise ValueError(f"images of different shapes cannot be compared: {tuple(a.shape)} and {tuple(b.shape)}")


def inception_score(logits: Tensor, split_size: int = 5000) -> float:
    """`exp(mean KL(p(y|x) || p(y)))` averaged over consecutive splits (arXiv 1606.03498) of `logits [N, classes]`."""
    _require_finite("logits", logits)
    if len(logits) == 0:
        raise ValueError("an inception score needs at least one sample")
    scores = []
    for part in logits.double().split(split_size):
        log_p = part.log_softmax(1)
        log_marginal = log_p.logsumexp(0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, block: int = 1024) -> tuple[float, float]:
    """Precision and recall of `fake [M, D]` against `real [N, D]` by k-nearest-neighbour balls (arXiv 1904.06991).

    Precision is the share of fakes that lie within the ball of some real (its radius: the distance to the k-th nearest
    other real), recall the same with the roles exchanged. float64, in blocks of rows.
    """
    for name, x in (("real", real), ("fake", fake)):
        _require_finite(name, x)
        if len(x) <= k:
            raise ValueError(f"precision and recall with k={k} need more than {k} samples, {name} has {len(x)}")
    return _coverage(real.double(), fake.double(), k, block), _coverage(fake.double(), real.double(), k, block)


def _coverage(centres: Tensor, points: Tensor, k: int, block: int) -> float:
    # k + 1 because the nearest of a centre's neighbours among the centres is the centre itself
    radii = torch.cat([torch.cdist(rows, centres).kthvalue(k + 1, dim=1).values for rows in centres.split(block)])
    inside = [(torch.cdist(rows, centres) <= radii).any(1) for rows in points.split(block)]
    return float(torch.cat(inside).double().mean())


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
    _require_finite("vectors", vectors)
    embedding = TSNE(n_components=2, perplexity=perplexity, random_state=seed).fit_transform(vectors.cpu().numpy())
    return uniformity(torch.from_numpy(embedding))
