"""The CUDA backend of `vf_loss`, on csrc/vf_loss.cu: operators and launch configuration.

Forward is three launches, each gradient one. The kernels read `[B, C, N]` with positions side by side, as convolutions
leave them; other layouts are copied first. Neither a matrix of cosines nor a normalised copy of an input is ever made.
In the backward product of float16 or bfloat16 inputs the vectors are exact and the weights are rounded to their dtype
once. Inputs of two dtypes are cast to float32 first, which changes no number: their products need float32 anyway, and
next to those a copy costs little.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kernels.backends.cuda_launch import backends, launch, unsupported_reasons
from kernels.backends.layout import memory_format
from kernels.backends.operators import operator
from kernels.vf_loss.autograd import register_autograd


@dataclass(frozen=True)
class LaunchConfig:
    """Compile-time sizes of the kernels: positions along a side of a forward tile, and of a backward panel."""

    tile: int
    panel: int


#: Tiles of 64 × 64 with 4 warps: ten for a sample of 256 positions, four at a time on a multiprocessor. A panel is what
#: 256 positions need, so that their gradient takes no partial sums: 87 KB in 16 bits, with the stages of the products.
CONFIG = LaunchConfig(tile=64, panel=256)


@operator("vf_loss_cuda_fwd")
def vf_loss_fwd(
    z: torch.Tensor, f: torch.Tensor, distmat_margin: float, cos_margin: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both terms, and `[3, B, N]` float32: the norms of `z` and of `f`, and the products z·f."""
    z, f = flat(z, f)
    samples, _, positions = z.shape
    tiles = -(-positions // CONFIG.tile)
    saved = z.new_empty((3, samples, positions), dtype=torch.float32)
    distmat, cos = saved.new_empty(()), saved.new_empty(())
    cos_sums = saved.new_empty(samples * -(-positions // 8))
    tile_sums = saved.new_empty(samples * (tiles * (tiles + 1) // 2))
    launch("vf_loss_fwd", z, f, saved, cos_sums, tile_sums, distmat, cos, distmat_margin, cos_margin)
    return distmat, cos, saved


@operator("vf_loss_cuda_bwd")
def vf_loss_bwd(
    z: torch.Tensor,
    f: torch.Tensor,
    saved: torch.Tensor,
    d_distmat: torch.Tensor,
    d_cos: torch.Tensor,
    distmat_margin: float,
    cos_margin: float,
    swapped: bool,
) -> torch.Tensor:
    """The gradient of `z`; with `swapped`, `z` and `f` are exchanged with respect to the forward pass."""
    flat_z, flat_f = flat(z, f)
    d_z, partial = torch.empty_like(flat_z), None
    if flat_z.shape[2] > CONFIG.panel:
        partial = d_z if d_z.dtype == torch.float32 else torch.empty_like(d_z, dtype=torch.float32)
    norms = (saved[1], saved[0]) if swapped else (saved[0], saved[1])
    launch("vf_loss_bwd", flat_z, flat_f, *norms, saved[2], d_distmat, d_cos, partial, d_z, distmat_margin, cos_margin)
    return d_z.to(z.dtype).view(z.shape).contiguous(memory_format=memory_format(z))


def flat(*inputs: torch.Tensor) -> Iterator[torch.Tensor]:
    """Each `[B, C, N]`, positions side by side; float32 where their dtypes differ."""
    dtypes = {vectors.dtype for vectors in inputs}
    dtype = torch.float32 if len(dtypes) > 1 else dtypes.pop()
    return (vectors.flatten(2).contiguous().to(dtype) for vectors in inputs)


vf_loss = register_autograd(vf_loss_fwd, vf_loss_bwd)


def unsupported(z, f, distmat_margin, cos_margin):
    return unsupported_reasons(z, f)


BACKEND, EMULATED = backends(
    vf_loss,
    unsupported,
    torch_ops=("ldit::vf_loss_cuda_fwd", "ldit::vf_loss_cuda_bwd"),
    configs={"shape": CONFIG},
)
