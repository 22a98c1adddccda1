"""`vf_loss` in Triton: operators, launch configurations, launches.

Forward is three launches (norms and the second term; tiles of both cosine matrices; two means), each gradient one.

No matrix of cosines, and no normalised copy of an input, ever lies in memory: forward keeps three numbers for each
position, and backward makes each tile again. float32 products are IEEE. In the backward product Σ_j G_ij ẑ_j of
float16 or bfloat16 inputs the vectors are exact and the weights G_ij / |z_j| are rounded to the dtype of `z` once.
"""

from dataclasses import dataclass

import torch
import triton

from kernels.backends.layout import memory_format
from kernels.backends.triton_launch import architecture, backend, launch, operator, unsupported_reasons
from kernels.vf_loss.autograd import register_autograd
from kernels.vf_loss.triton_kernels import vf_loss_gradient, vf_loss_means, vf_loss_positions, vf_loss_tiles


@dataclass(frozen=True)
class LaunchConfig:
    """Launch configuration of a kernel that makes tiles of both cosine matrices.

    Attributes:
        rows, columns: BI and BJ, positions along the sides of a tile.
        depth: BC, channels of one step of the products.
        out: BO, channels of one step of the gradient; 0 in the forward pass.
        warps, stages: as Triton counts them.
    """

    rows: int
    columns: int
    depth: int
    out: int
    warps: int
    stages: int


@dataclass(frozen=True)
class PositionsLaunchConfig:
    """Launch configuration of `vf_loss_positions`: BN positions of a program, BC channels of a step, warps."""

    positions: int
    depth: int
    warps: int


def positions_config(channels: int, positions: int) -> PositionsLaunchConfig:
    """Steps of 64 × 32 with 4 warps: 16-byte loads along either dimension, 256 programs for a batch of 32."""
    return PositionsLaunchConfig(block(positions, 32), block(channels, 64), 4)


def forward_config(dtype: torch.dtype, samples: int, positions: int, arch: int) -> LaunchConfig:
    """Square tiles, so that the symmetric half is left out: at 256 positions three of 128 × 128 for a sample.

    Two accumulators of 128 × 128 are half of a multiprocessor's registers; three stages of 64 KB are its shared memory.
    Such tiles read 60 % of what rows of 64 × 256 would, and it is the L2 cache that limits the tensor cores here. Where
    they would leave more than half of 132 multiprocessors idle, and on sm_80, whose `mma` operands take registers as
    well, tiles are 64 × 64. float32 products have no tensor cores: four programs of 128 registers a multiprocessor.
    """
    if dtype == torch.float32:
        return LaunchConfig(block(positions, 64), block(positions, 64), 16, 0, 4, 3)
    tiles = triton.cdiv(positions, 128)
    large = arch >= 90 and 2 * samples * tiles * (tiles + 1) // 2 >= 132
    side = block(positions, 128 if large else 64)
    return LaunchConfig(side, side, 64, 0, 8 if large else 4, 3)


def backward_config(dtype: torch.dtype, positions: int) -> LaunchConfig:
    """64 rows against 256 columns at once, so that a row's gradient at 256 positions is made without partial sums.

    Two accumulators of 64 × 256 are half of a multiprocessor's registers: one program each, with three stages of 40 KB.
    A float32 product holds its operands in registers: its tiles are 64 × 32, and partial sums are added up in memory.
    """
    if dtype == torch.float32:
        return LaunchConfig(block(positions, 64), block(positions, 32), 16, 32, 8, 2)
    return LaunchConfig(block(positions, 64), block(positions, 256), 32, 64, 8, 3)


def block(size: int, most: int) -> int:
    """The power of two that covers `size`, from 16 (the least that a product of tiles takes) to `most`."""
    return min(most, max(16, triton.next_power_of_2(size)))


def larger_dtype(z: torch.Tensor, f: torch.Tensor) -> torch.dtype:
    return max(z.dtype, f.dtype, key=lambda dtype: dtype.itemsize)


@operator("vf_loss_fwd")
def vf_loss_fwd(
    z: torch.Tensor, f: torch.Tensor, distmat_margin: float, cos_margin: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both terms, and `[3, B, N]` float32: the norms of `z` and of `f`, and the products z·f."""
    z, f = z.flatten(2), f.flatten(2)
    samples, channels, positions = z.shape
    strides = *z.stride(), *f.stride()
    saved = z.new_empty((3, samples, positions), dtype=torch.float32)
    distmat, cos = saved.new_empty(()), saved.new_empty(())

    vectors = positions_config(channels, positions)
    grid = triton.cdiv(positions, vectors.positions), samples
    cos_sums = saved.new_empty(grid)
    launch(
        vf_loss_positions,
        grid,
        *(z, f, *saved, cos_sums, cos_margin, *strides),
        C=channels,
        N=positions,
        BC=vectors.depth,
        BN=vectors.positions,
        num_warps=vectors.warps,
    )

    config = forward_config(larger_dtype(z, f), samples, positions, architecture())
    tiles_across = triton.cdiv(positions, config.rows)
    tile_sums = saved.new_empty((samples, tiles_across * tiles_across))
    launch(
        vf_loss_tiles,
        (tiles_across * tiles_across, samples),
        *(z, f, *saved[:2], tile_sums, tiles_across, distmat_margin, *strides),
        C=channels,
        N=positions,
        BI=config.rows,
        BC=config.depth,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    launch(
        vf_loss_means,
        (1,),
        *(tile_sums, cos_sums, distmat, cos, tile_sums.numel(), cos_sums.numel()),
        *(float(samples * positions**2), float(samples * positions)),
        BLOCK=1024,
    )
    return distmat, cos, saved


@operator("vf_loss_bwd")
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
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device, memory_format=memory_format(z))
    z, f, dz_flat = z.flatten(2), f.flatten(2), dz.flatten(2)
    samples, channels, positions = z.shape
    config = backward_config(larger_dtype(z, f), positions)
    one_tile = positions <= config.columns
    in_place = one_tile or z.dtype == torch.float32
    partial = dz_flat if in_place else torch.empty_like(dz_flat, dtype=torch.float32)
    z_norms, f_norms, products = (saved[k] for k in ((1, 0, 2) if swapped else (0, 1, 2)))
    launch(
        vf_loss_gradient,
        (triton.cdiv(positions, config.rows), samples),
        *(z, f, z_norms, f_norms, products, d_distmat, d_cos, partial, dz_flat, distmat_margin, cos_margin),
        *(float(samples * positions**2), float(samples * positions)),
        *(*z.stride(), *f.stride(), *dz_flat.stride()),
        C=channels,
        N=positions,
        ONE_TILE=one_tile,
        BI=config.rows,
        BJ=config.columns,
        BC=config.depth,
        BO=config.out,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return dz


vf_loss = register_autograd(vf_loss_fwd, vf_loss_bwd)


def unsupported(z, f, distmat_margin, cos_margin):
    return unsupported_reasons(z, f)


BACKEND = backend(
    vf_loss,
    unsupported,
    torch_ops=("ldit::vf_loss_fwd", "ldit::vf_loss_bwd"),
    configs={"positions": positions_config, "forward": forward_config, "backward": backward_config},
)
