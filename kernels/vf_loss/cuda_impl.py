"""`vf_loss` on the kernels of csrc/vf_loss.cu: three launches forward, one for each gradient; operators.

The kernels read vectors as convolutions leave them, positions side by side; other layouts are copied first. Neither a
matrix of cosines nor a normalised copy of an input is ever made. In the backward product of float16 or bfloat16
inputs the vectors are exact and the weights are rounded to their dtype once. Inputs of two dtypes are widened to
float32 first, which changes no number: their products need float32 anyway, and beside those a copy is little.
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
    """What the kernels are compiled for: positions along a side of a forward tile, and of a backward panel."""

    tile: int
    panel: int


#: Tiles of 64 × 64 with 4 warps: ten for a sample of 256 positions, four at a time on a multiprocessor. A panel is what
#: 256 positions need, so that their gradient takes no partial sums: 87 KB in 16 bits, with the stages of the products.
SHAPE = LaunchConfig(tile=64, panel=256)


@operator("vf_loss_cuda_fwd")
def forward(
    z: torch.Tensor, f: torch.Tensor, distmat_margin: float, cos_margin: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both terms, and `[3, B, N]` float32: the norms of `z` and of `f`, and the products z·f."""
    z, f = flat(z, f)
    samples, _, positions = z.shape
    tiles = -(-positions // SHAPE.tile)
    kept = z.new_empty((3, samples, positions), dtype=torch.float32)
    distmat, cos = kept.new_empty(()), kept.new_empty(())
    cos_sums = kept.new_empty(samples * -(-positions // 8))
    tile_sums = kept.new_empty(samples * (tiles * (tiles + 1) // 2))
    launch("vf_loss_fwd", z, f, kept, cos_sums, tile_sums, distmat, cos, distmat_margin, cos_margin)
    return distmat, cos, kept


@operator("vf_loss_cuda_bwd")
def backward_of_first(
    z: torch.Tensor, f: torch.Tensor, kept: torch.Tensor, d_distmat: torch.Tensor, d_cos: torch.Tensor,
    distmat_margin: float, cos_margin: float, swapped: bool,
) -> torch.Tensor:  # fmt: skip
    """The gradient of `z`; with `swapped`, `z` and `f` are the other way round than in the forward pass."""
    flat_z, flat_f = flat(z, f)
    d_z, partial = torch.empty_like(flat_z), None
    if flat_z.shape[2] > SHAPE.panel:
        partial = d_z if d_z.dtype == torch.float32 else torch.empty_like(d_z, dtype=torch.float32)
    norms = (kept[1], kept[0]) if swapped else (kept[0], kept[1])
    launch("vf_loss_bwd", flat_z, flat_f, *norms, kept[2], d_distmat, d_cos, partial, d_z, distmat_margin, cos_margin)
    return d_z.to(z.dtype).view(z.shape).contiguous(memory_format=memory_format(z))


def flat(*inputs: torch.Tensor) -> Iterator[torch.Tensor]:
    """Each `[B, C, N]`, positions side by side; float32 where their dtypes differ."""
    dtypes = {vectors.dtype for vectors in inputs}
    dtype = torch.float32 if len(dtypes) > 1 else dtypes.pop()
    return (vectors.flatten(2).contiguous().to(dtype) for vectors in inputs)


vf_loss = register_autograd(forward, backward_of_first)


def unsupported(z, f, distmat_margin, cos_margin):
    return unsupported_reasons(z, f)


BACKEND, EMULATED = backends(
    vf_loss,
    unsupported,
    torch_ops=("ldit::vf_loss_cuda_fwd", "ldit::vf_loss_cuda_bwd"),
    configs={"shape": SHAPE},
)
