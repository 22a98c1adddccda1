"""The Triton backend of `group_norm_silu`: two passes each way, over chunks of positions, in the layout of `x`.

Memory bounds it: forward reads x twice and writes y, backward reads x and dy twice and writes dx. A program takes the
channels that lie side by side: all of them in channels-last memory, one group where positions lie side by side. Chunks
are few enough for every program of a second pass to add up their sums again, in place of a launch that would.
"""

from dataclasses import dataclass

import torch
import triton

from kernels.backends.layout import memory_format
from kernels.backends.triton_launch import backend, launch, operator, unsupported_reasons
from kernels.group_norm_silu.triton_kernels import (
    group_norm_silu_apply,
    group_norm_silu_gradients,
    group_norm_silu_statistics,
    group_norm_silu_sums,
)


@dataclass(frozen=True)
class LaunchConfig:
    """Launch configuration: how a part (a sample, or the channels of one of its groups) is divided.

    Attributes:
        block_n: positions of a tile, a power of two.
        chunk_size: positions of a program, a multiple of `block_n`.
        chunks: programs of a part.
        warps: of a program.
        stages: tiles under way, one in registers and the others in shared memory.
        forward_registers: at most so many in a thread of the forward kernels; None leaves it to the compiler.
    """

    block_n: int
    chunk_size: int
    chunks: int
    warps: int = 8
    stages: int = 3
    forward_registers: int | None = None


#: Elements of a tile: 16 for each of 256 threads, which hold two float32 sums of each.
TILE_ELEMENTS = 4096
#: Programs aimed at, where parts are fewer: four for each of 132 multiprocessors, which all run at once.
TARGET_PROGRAMS = 528
#: Most chunks of a part: each program of a second pass reads their sums.
MAX_CHUNKS = 128
#: Chunks whose sums are added up at once for dweight and dbias.
BLOCK_S = 128
#: Fewest tiles of a chunk, to be worth reading those sums.
MIN_TILES = 4


def launch_config(parts: int, channels: int, positions: int) -> LaunchConfig:
    """Tiles of 4096 elements; chunks of four tiles or more, for 528 programs at most, and 128 at most of a part.

    With 64 registers four programs of 256 threads share a multiprocessor. The compiler's own choice is 57 to 80 and as
    fast alone; wide layers, which it gives more for their sums over groups, have too few positions to fill a device.
    """
    block_n = max(1, min(TILE_ELEMENTS // triton.next_power_of_2(channels), triton.next_power_of_2(positions)))
    chunks = max(1, min(MAX_CHUNKS, TARGET_PROGRAMS // parts))
    chunk_size = max(MIN_TILES, triton.cdiv(positions, chunks * block_n)) * block_n
    return LaunchConfig(
        block_n, chunk_size, triton.cdiv(positions, chunk_size), forward_registers=64 if channels <= 256 else None
    )


def split_count(flat: torch.Tensor, groups: int) -> int:
    """Parts of a sample of `flat` `[B, C, N]`: one, or as many as groups where positions lie closer than channels."""
    return groups if flat.stride(2) < flat.stride(1) else 1


def tile_options(channels: int, groups: int, splits: int, config: LaunchConfig) -> dict[str, int | None]:
    """Compile-time values and options that all four kernels share."""
    return {
        "C": channels // splits,
        "GROUPS": groups // splits,
        "SPLITS": splits,
        "BLOCK_C": triton.next_power_of_2(channels // splits),
        "BLOCK_G": triton.next_power_of_2(groups // splits),
        "BLOCK_N": config.block_n,
        "NUM_STAGES": config.stages,
        "num_warps": config.warps,
    }


@operator("group_norm_silu_fwd")
def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in the memory format of `x`, and float32 `[3, B, groups]`: mean, rstd, mean_lo (see the kernels)."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    statistics = x.new_empty((3, x.shape[0], groups), dtype=torch.float32)
    if not symbolic(x):
        launch_forward(x.flatten(2), weight.contiguous(), bias.contiguous(), groups, eps, y.flatten(2), statistics)
    return y, statistics


def launch_forward(x, weight, bias, groups, eps, y, statistics) -> None:
    (samples, channels, positions), splits = x.shape, split_count(x, groups)
    parts = samples * splits
    config = launch_config(parts, channels // splits, positions)
    grid, options = (config.chunks, parts), tile_options(channels, groups, splits, config)
    options["maxnreg"] = config.forward_registers
    sums = statistics.new_empty((parts, config.chunks, 3, groups // splits))
    launch(group_norm_silu_statistics, grid, x, sums, positions, config.chunk_size, *x.stride(), **options)
    launch(
        group_norm_silu_apply,
        grid,
        *(x, weight, bias, sums, statistics, y, positions, config.chunk_size, config.chunks, eps),
        *x.stride(),
        *y.stride(),
        BLOCK_K=triton.next_power_of_2(config.chunks),
        **options,
    )


@operator("group_norm_silu_bwd")
def backward_operator(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    statistics: torch.Tensor,
    groups: int,
    needs_dx: bool,
    needs_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx in the memory format of `x`, dweight and dbias; those not asked for are empty."""
    shape = x.shape if needs_dx else (0, *x.shape[1:])
    dx = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    dweight, dbias = (t.new_empty(t.shape if needs_dweight else 0) for t in (weight, bias))
    if not symbolic(x):
        inputs = dy.flatten(2), x.flatten(2), weight.contiguous(), bias.contiguous(), statistics
        launch_backward(*inputs, groups, dx.flatten(2), dweight, dbias)
    return dx, dweight, dbias


def launch_backward(dy, x, weight, bias, statistics, groups, dx, dweight, dbias) -> None:
    """Gradients that are empty are left out."""
    (samples, channels, positions), splits = x.shape, split_count(x, groups)
    parts, needs_dx, needs_dweight = samples * splits, dx.numel() > 0, dweight.numel() > 0
    config = launch_config(parts, channels // splits, positions)
    options = tile_options(channels, groups, splits, config)
    channel_sums = statistics.new_empty((parts, config.chunks, 2, channels // splits))
    group_sums = statistics.new_empty((parts, config.chunks, 2, groups // splits))
    launch(
        group_norm_silu_sums,
        (config.chunks, parts),
        *(dy, x, weight, bias, statistics, channel_sums, group_sums, positions, config.chunk_size),
        *dy.stride(),
        *x.stride(),
        **options,
    )
    # Of the rows of programs that add up channels each takes `width`; 8 float32 are what memory moves at least.
    width = max(8, triton.next_power_of_2(triton.cdiv(channels // splits, config.chunks)))
    grid = config.chunks, (parts if needs_dx else 0) + (splits if needs_dweight else 0)
    launch(
        group_norm_silu_gradients,
        grid,
        *(dy, x, weight, bias, statistics, channel_sums, group_sums, dx, dweight, dbias),
        *(samples, positions, config.chunk_size, config.chunks),
        *dy.stride(),
        *x.stride(),
        *dx.stride(),
        BLOCK_K=triton.next_power_of_2(config.chunks),
        BLOCK_W=width,
        BLOCK_S=BLOCK_S,
        NEEDS_DWEIGHT=needs_dweight,
        **options,
    )


def symbolic(x: torch.Tensor) -> bool:
    """Whether sizes are unknown: nothing runs then, and to work out its configuration in symbols takes minutes."""
    return any(isinstance(size, torch.SymInt) for size in x.shape)


def setup(ctx, inputs, output):
    x, weight, bias, ctx.groups, _ = inputs
    ctx.save_for_backward(x, weight, bias, output[1])


def backward(ctx, dy, _):
    needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad[:3]
    dx, dweight, dbias = backward_operator(dy, *ctx.saved_tensors, ctx.groups, needs_dx, needs_dweight or needs_dbias)
    return dx if needs_dx else None, dweight if needs_dweight else None, dbias if needs_dbias else None, None, None


forward.register_autograd(backward, setup_context=setup)


def group_norm_silu(x, weight, bias, groups, eps):
    return forward(x, weight, bias, groups, float(eps))[0]


def unsupported(x, weight, bias, groups, eps):
    return unsupported_reasons(x, weight, bias)


BACKEND = backend(
    group_norm_silu,
    unsupported,
    torch_ops=("ldit::group_norm_silu_fwd", "ldit::group_norm_silu_bwd"),
    configs={"chunks": launch_config},
)
