"""The Triton backend of `rope_attention`: its operators, and how their kernels are launched."""

import math
from dataclasses import dataclass

import torch

from kernels.backends.triton_launch import DTYPES, architecture, backend, launch, operator, unsupported_reasons
from kernels.rope_attention.autograd import register_autograd, too_wide
from kernels.rope_attention.triton_backward import (
    rope_attention_bwd_dkdv_kernel,
    rope_attention_bwd_dq_kernel,
    rope_attention_bwd_sums_kernel,
)
from kernels.rope_attention.triton_forward import rope_attention_fwd_kernel, rope_attention_fwd_resident_kernel

#: Most tokens, and widest heads, of which two programs fit the shared memory of a processor with sm_90 side by side.
RESIDENT_TOKENS, RESIDENT_WIDTH = 256, 80


@dataclass(frozen=True)
class LaunchConfig:
    """Launch configuration of one kernel.

    Attributes:
        queries, keys: rows of a tile; powers of two, 16 at least.
        warps: of 32 threads, for one program.
        registers: per thread at most; None leaves it to the compiler.
        resident: a program reads all keys of a head once (for dk and dv: all queries), turns them, holds them in shared
            memory and takes all tiles of the head. Else there is a program for each tile, past which they go.
    """

    queries: int
    keys: int
    warps: int
    registers: int | None = None
    resident: bool = False

    @property
    def options(self) -> dict:
        # More stages prefetch the tables too and multiply shared memory.
        limits = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": 1, **limits}


# wgmma takes 64 rows from 4 warps. A resident of 256 tokens and width 72 needs 88 to 98 KB: 2 programs for a processor,
# one computes while the other one loads. Streaming tiles need 30 KB; 168 registers let 3 programs in. Others compile
# for sm_90 without spills and are to be timed: fwd (64, 128, 4, resident=True), (128, 128, 8); dq (128, 32, 8),
# (64, 128, 4, resident=True); dkdv (32, 128, 8), (32, 64, 4, resident=True).
CONFIGS = {
    "fwd": LaunchConfig(64, 64, 4, 168),
    "fwd wide": LaunchConfig(64, 64, 4),
    "fwd resident": LaunchConfig(64, 64, 4, resident=True),
    "fwd float32": LaunchConfig(32, 32, 4),
    "fwd sm_80": LaunchConfig(64, 32, 4),
    "fwd sm_80 wide": LaunchConfig(32, 32, 4),
    "dq": LaunchConfig(64, 32, 4, 168),
    "dq normed": LaunchConfig(64, 32, 4),
    "dq wide": LaunchConfig(64, 32, 4),
    "dq resident": LaunchConfig(64, 64, 4, resident=True),
    "dq resident normed": LaunchConfig(64, 32, 4, resident=True),
    "dq float32": LaunchConfig(32, 16, 4),
    "dq sm_80": LaunchConfig(32, 16, 4),
    "dq sm_80 wide": LaunchConfig(32, 16, 4),
    "dkdv": LaunchConfig(32, 64, 4),
    "dkdv normed": LaunchConfig(32, 128, 8),
    "dkdv wide": LaunchConfig(16, 128, 8),
    "dkdv resident": LaunchConfig(64, 64, 4, resident=True),
    "dkdv float32": LaunchConfig(16, 32, 4),
    "dkdv sm_80": LaunchConfig(16, 32, 4),
    "dkdv sm_80 wide": LaunchConfig(16, 32, 4),
}


def forward_config(tokens: int, width: int, dtype: torch.dtype, normed: bool, arch: int) -> LaunchConfig:
    """Resident where that fits: four programs for a head would each read and turn all its keys again."""
    return CONFIGS["fwd" + _lane(tokens, width, dtype, arch)]


def dq_config(tokens: int, width: int, dtype: torch.dtype, normed: bool, arch: int) -> LaunchConfig:
    """As above; the way back through a norm takes registers that narrower blocks of keys leave free."""
    lane = _lane(tokens, width, dtype, arch)
    return CONFIGS["dq" + lane + (" normed" if normed and lane in ("", " resident") else "")]


def dkdv_config(tokens: int, width: int, dtype: torch.dtype, normed: bool, arch: int) -> LaunchConfig:
    """As above, with the queries and their upstream gradients as residents."""
    lane = _lane(tokens, width, dtype, arch)
    return CONFIGS["dkdv" + lane + (" normed" if normed and lane == "" else "")]


def _lane(tokens: int, width: int, dtype: torch.dtype, arch: int) -> str:
    if dtype == torch.float32:
        return " float32"  # its products run without tensor cores, from registers: small tiles
    wide = " wide" if width > RESIDENT_WIDTH else ""  # more columns for each thread to hold
    if arch < 90:
        return " sm_80" + wide  # operands of mma come from registers: small tiles
    if wide:
        return wide
    return " resident" if tokens <= RESIDENT_TOKENS else ""


def blocks(width: int) -> tuple[int, int]:
    """Widths of the two blocks of columns: a power of two, and one that covers what is left, 16 at least (or 0)."""
    main = max(16, 1 << width.bit_length() - 1)
    left = width - main
    return main, max(16, 1 << (left - 1).bit_length()) if left > 0 else 0


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def split(tokens: int, rows: int, held_rows: int, resident: bool) -> tuple[int, int, int]:
    """Programs for a head, tiles of `rows` for a program, and blocks of `held_rows` that it holds (0: they stream)."""
    tiles = cdiv(tokens, rows)
    return (1, tiles, cdiv(tokens, held_rows)) if resident else (tiles, 1, 0)


def constants(
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor | None,
    weight: torch.Tensor | None,
    config: LaunchConfig,
) -> dict:
    """The compile-time values that the three kernels share, and the options of a launch."""
    tokens, width = qkv.shape[1], qkv.shape[-1]
    main, rest = blocks(width)
    return {
        "stride_n": qkv.stride(1), "heads": qkv.shape[3],
        "D": width, "MAIN": main, "REST": rest, "BQ": config.queries, "BK": config.keys,
        "ROPE": table is not None, "NORM": weight is not None, "BIASED": bias is not None,
        "RAGGED_Q": tokens % config.queries != 0, "RAGGED_K": tokens % config.keys != 0,
        # With 8 elements as the unit of every row, a thread reads 128 bits at a time.
        "ALIGNED": 8 if all(stride % 8 == 0 for stride in (width, *qkv.stride()[:4])) else 1,
        **config.options,
    }  # fmt: skip


def loose(qkv: torch.Tensor) -> tuple[int, int, int]:
    """The strides that kernels are not compiled for: of samples, of q, k and v, of heads."""
    return qkv.stride(0), qkv.stride(2), qkv.stride(3)


@operator("rope_attention_fwd")
def rope_attention_fwd(
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    samples, tokens, _, heads, width = qkv.shape
    out = qkv.new_empty(samples, tokens, heads * width)
    lse = qkv.new_empty(samples, heads, tokens, dtype=torch.float32)
    config = forward_config(tokens, width, qkv.dtype, q_weight is not None, architecture())
    common = constants(qkv, bias, table, q_weight, config)
    scale = width**-0.5 / math.log(2)
    parts, tiles, held = split(tokens, config.queries, config.keys, config.resident)
    arguments = qkv, table, q_weight, k_weight, bias, out, lse, eps, scale, tokens, parts
    if config.resident:
        kernel, arguments, common = rope_attention_fwd_resident_kernel, (*arguments, tiles), common | {"BLOCKS": held}
    else:
        kernel = rope_attention_fwd_kernel
    launch(kernel, (parts * heads * samples,), *arguments, *loose(qkv), **common)
    return out, lse


@operator("rope_attention_bwd")
def rope_attention_bwd(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    eps: float,
    summed: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    samples, tokens, _, heads, width = qkv.shape
    normed = q_weight is not None
    dqkv, delta = torch.empty_like(qkv, memory_format=torch.contiguous_format), torch.empty_like(lse)
    dq = dq_config(tokens, width, qkv.dtype, normed, architecture())
    dkdv = dkdv_config(tokens, width, qkv.dtype, normed, architecture())
    q_parts, q_tiles, q_blocks = split(tokens, dq.queries, dq.keys, dq.resident)
    k_parts, k_tiles, k_blocks = split(tokens, dkdv.keys, dkdv.queries, dkdv.resident)
    q_rows, k_rows = samples * q_parts * q_tiles, samples * k_parts * k_tiles
    q_of_weight = k_of_weight = q_of_bias = k_of_bias = None
    if normed:
        q_of_weight, k_of_weight = (lse.new_empty(rows * heads, width) for rows in (q_rows, k_rows))
    if summed:
        q_of_bias, k_of_bias = lse.new_empty(2, q_rows, heads * width), lse.new_empty(k_rows, heads * width)
    scale = width**-0.5 / math.log(2)
    strides = grad.stride(0), *loose(qkv)
    launch(
        rope_attention_bwd_dq_kernel, (q_parts * heads * samples,),
        grad, qkv, out, lse, table, q_weight, k_weight, bias, dqkv, delta, q_of_weight, q_of_bias, eps, scale, tokens,
        q_parts, q_tiles, *strides,
        grad_n=grad.stride(1), BLOCKS=q_blocks, SUMMED=summed, **constants(qkv, bias, table, q_weight, dq),
    )  # fmt: skip
    launch(
        rope_attention_bwd_dkdv_kernel, (k_parts * heads * samples,),
        grad, qkv, lse, delta, table, q_weight, k_weight, bias, dqkv, k_of_weight, k_of_bias, eps, scale, tokens,
        k_parts, k_tiles, *strides,
        grad_n=grad.stride(1), BLOCKS=k_blocks, SUMMED=summed, **constants(qkv, bias, table, q_weight, dkdv),
    )  # fmt: skip
    dq_weight, dk_weight, dbias = (qkv.new_empty(0) for _ in range(3))
    if normed:
        dq_weight, dk_weight = torch.empty_like(q_weight), torch.empty_like(k_weight)
        sums(2, width, q_of_weight, k_of_weight, dq_weight, dk_weight, q_rows * heads, k_rows * heads)
    if summed:
        dbias = torch.empty_like(bias)
        sums(3, heads * width, q_of_bias, k_of_bias, dbias, dbias[heads * width :], q_rows, k_rows)
    return dqkv, dq_weight, dk_weight, dbias


def sums(count: int, width: int, *arguments) -> None:
    """The second stage of `count` sums of `width` columns; the other arguments are those of the kernel."""
    launch(
        rope_attention_bwd_sums_kernel, (cdiv(width, 8), count), *arguments, WIDTH=width, COLS=8, ROWS=256, num_warps=8
    )


rope_attention = register_autograd(rope_attention_fwd, rope_attention_bwd)


def unsupported(qkv, cos, sin, q_weight=None, k_weight=None, eps=1e-6, *, bias=None) -> list[str]:
    beside = unsupported_reasons(qkv, q_weight, k_weight, bias, dtypes=DTYPES | {qkv.dtype, torch.float64})
    return unsupported_reasons(qkv) + beside + too_wide(qkv)


BACKEND = backend(
    rope_attention,
    unsupported,
    torch_ops=("ldit::rope_attention_fwd", "ldit::rope_attention_bwd"),
    configs=CONFIGS,
)
