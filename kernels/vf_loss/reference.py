import torch

from kernels.arguments import accumulation_dtype
from kernels.registry import Backend


def vf_loss(z, f, distmat_margin, cos_margin):
    acc_dtype = accumulation_dtype(z, f)
    z, f = (t.to(acc_dtype).flatten(2).transpose(1, 2) for t in (z, f))  # [B, N, C]
    difference = cosine_matrix(z) - cosine_matrix(f)
    distmat = (difference.abs() - distmat_margin).relu().mean()
    cosine = (unit(z, 1e-8) * unit(f, 1e-8)).sum(dim=-1)
    return distmat, (1 - cos_margin - cosine).relu().mean()


def unit(vectors: torch.Tensor, floor: float) -> torch.Tensor:
    """`vectors` `[…, C]` divided by their norms, or by `floor` where that is larger."""
    return vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(floor)


def cosine_matrix(vectors: torch.Tensor) -> torch.Tensor:
    """`[B, N, N]` cosines of each pair of the `vectors` `[B, N, C]`."""
    units = unit(vectors, 1e-12)
    return units @ units.transpose(1, 2)


BACKEND = Backend("reference", vf_loss)
