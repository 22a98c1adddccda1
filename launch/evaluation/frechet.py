"""The Fréchet distance of two Gaussians: FID, sFID and FDD are this distance in three kinds of features."""

import torch
from torch import Tensor

from launch.evaluation.moments import require_moments, symmetric


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
    values, vectors = torch.linalg.eigh(symmetric("sigma1", sigma1))
    root = (vectors * _nonnegative("sigma1", values).sqrt()) @ vectors.T
    product = root @ symmetric("sigma2", sigma2) @ root
    values = torch.linalg.eigvalsh((product + product.T) / 2)
    # The product can be indefinite only where sigma2 is: its own spectrum need not be computed.
    cross = _nonnegative("sigma2", values).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross
    return max(float(distance), 0.0)  # equal Gaussians may come out at minus some rounding


def _nonnegative(name: str, eigenvalues: Tensor) -> Tensor:
    """Round-off below zero becomes zero; anything worse is no covariance."""
    low, high = float(eigenvalues.min()), float(eigenvalues.abs().max())
    if low < -1e-5 * high:
        raise ValueError(f"{name} has a negative eigenvalue ({low:.3g}, largest {high:.3g}), so it is no covariance")
    return eigenvalues.clamp_min(0)
