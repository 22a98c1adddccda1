"""The Triton backend of `rope_attention`: operators, launch configurations, launches."""

import math
from dataclasses import dataclass

import torch

from kernels.backends.triton_launch import DTYPES, architecture, backend, launch, operator, unsupported_reasons
from kernels.rope_attention.autograd import register_autograd, width_reasons
from kernels.rope_attention.triton_backward import (
    rope_attention_bwd_dkdv_kernel,
    rope_attention_bwd_dq_kernel,
    rope_attention_bwd_sums_kernel,
)
from kernels.rope_attention.triton_forward import rope_attention_fwd_kernel, rope_attention_fwd_keys_in_smem_kernel

#: Most tokens, and widest heads, whose keys and values two programs hold in the shared memory of one sm_90 SM.
SMEM_TOKENS, SMEM_WIDTH = 256, 80


@dataclass(frozen=True)
class LaunchConfig:
    """Launch configuration of one kernel.

    Attributes:
        queries, keys: rows of a block, BQ and BK; powers of two, 16 at least.
        warps: of 32 threads, for one program.
        registers: per thread at most; None leaves it to the compiler.
        keys_in_smem: a program loads all keys and values of a head once (for dk and dv: all queries and their dO) into
            shared memory and goes through all blocks of the head. Else there is a program for each block, past which
            they stream.
    """

    queries: int
    keys: int
    warps: int
    registers: int | None = None
    keys_in_smem: bool = False

    @property
    def options(self) -> dict:
        # More stages prefetch the tables too and multiply shared memory.
        limits = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": 1, **limits}


# wgmma takes 64 rows from 4 warps. The keys of 256 tokens of width 72 need 88 to 98 KB with the rest: 2 programs an SM,
# one computes while the other one loads. Streaming tiles need 30 KB; 168 registers let 3 programs in. Others compile
# for sm_90 without spills and are to be timed: fwd (64, 128, 4, keys_in_smem=True), (128, 128, 8); dq (128, 32, 8),
# (64, 128, 4, keys_in_smem=True); dkdv (32, 128, 8), (32, 64, 4, keys_in_smem=True).
CONFIGS = {
    "fwd": LaunchConfig(64, 64, 4, 168),
    "fwd wide heads": LaunchConfig(64, 64, 4),
    "fwd smem": LaunchConfig(64, 64, 4, keys_in_smem=True),
    "fwd float32": LaunchConfig(32, 32, 4),
    "fwd sm_80": LaunchConfig(64, 32, 4),
    "fwd sm_80 wide heads": LaunchConfig(32, 32, 4),
    "dq": LaunchConfig(64, 32, 4, 168),
    "dq normed": LaunchConfig(64, 32, 4),
    "dq wide heads": LaunchConfig(64, 32, 4),
    "dq smem": LaunchConfig(64, 64, 4, keys_in_smem=True),
    "dq smem normed": LaunchConfig(64, 32, 4, keys_in_smem=True),
    "dq float32": LaunchConfig(32, 16, 4),
    "dq sm_80": LaunchConfig(32, 16, 4),
    "dq sm_80 wide heads": LaunchConfig(32, 16, 4),
    "dkdv": LaunchConfig(32, 64, 4),
    "dkdv normed": LaunchConfig(32, 128, 8),
    "dkdv wide heads": LaunchConfig(16, 128, 8),
    "dkdv smem": LaunchConfig(64, 64, 4, keys_in_smem=True),
    "dkdv float32": LaunchConfig(16, 32, 4),
    "dkdv sm_80": LaunchConfig(16, 32, 4),
    "dkdv sm_80 wide heads": LaunchConfig(16, 32, 4),
}


def forward_config(tokens: int, width: int, dtype: torch.dtype, normed: bool, arch: int) -> LaunchConfig:
    """Keys in shared memory where they fit: four programs for a head would each load, norm and rotate all of them.

    `normed` changes nothing here, unlike in the two configurations of the backward pass.
    """
    return CONFIGS["fwd" + _variant(tokens, width, dtype, arch)]


def dq_config(tokens: int, width: int, dtype: torch.dtype, normed: bool, arch: int) -> LaunchConfig:
    """As above; the way back through a norm takes registers that narrower blocks of keys leave free."""
    variant = _variant(tokens, width, dtype, arch)
    return CONFIGS["dq" + variant + (" normed" if normed and variant in ("", " smem") else "")]


def dkdv_config(tokens: int, width: int, dtype: torch.dtype, normed: bool, arch: int) -> LaunchConfig:
    """As above, with the queries and their dO in shared memory."""
    variant = _variant(tokens, width, dtype, arch)
    return CONFIGS["dkdv" + variant + (" normed" if normed and variant == "" else "")]


def _variant(tokens: int, width: int, dtype: torch.dtype, arch: int) -> str:
    if dtype == torch.float32:
        return " float32"  # its products run without tensor cores, from registers: small tiles
    wide = " wide heads" if width > SMEM_WIDTH else ""  # more columns for each thread to hold
    if arch < 90:
        return " sm_80" + wide  # operands of mma come from registers: small tiles
    if wide:
        return wide
    return " smem" if tokens <= SMEM_TOKENS else ""


def column_tiles(width: int) -> tuple[int, int]:
    """MAIN and REST: a power of two, and one that covers the columns beyond it, 16 at least (0 if there are none)."""
    main = max(16, 1 << width.bit_length() - 1)
    remaining = width - main
    return main, max(16, 1 << (remaining - 1).bit_length()) if remaining > 0 else 0


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def split(tokens: int, rows: int, held_rows: int, held: bool) -> tuple[int, int, int]:
    """Programs for a head, blocks of `rows` for each, and blocks of `held_rows` in shared memory (0: they stream)."""
    tiles = cdiv(tokens, rows)
    return (1, tiles, cdiv(tokens, held_rows)) if held else (tiles, 1, 0)


def constants(qkv: torch.Tensor, config: LaunchConfig) -> dict:
    """The compile-time values that the three kernels share, and the options of a launch."""
    tokens, heads, width = qkv.shape[1], *qkv.shape[3:]
    main, rest = column_tiles(width)
    return {
        "stride_n": qkv.stride(1),
        "H": heads,
        "D": width,
        "MAIN": main,
        "REST": rest,
        "BQ": config.queries,
        "BK": config.keys,
        "RAGGED_Q": tokens % config.queries != 0,
        "RAGGED_K": tokens % config.keys != 0,
        # With 8 elements as the unit of every row, a thread reads 128 bits at a time.
        "ALIGNED": 8 if all(stride % 8 == 0 for stride in (width, *qkv.stride()[:4])) else 1,
        **config.options,
    }


def runtime_strides(qkv: torch.Tensor) -> tuple[int, int, int]:
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
    common = constants(qkv, config)
    scale_log2 = width**-0.5 / math.log(2)
    programs, tiles, blocks = split(tokens, config.queries, config.keys, config.keys_in_smem)
    grid = (programs * heads * samples,)
    arguments = qkv, table, q_weight, k_weight, bias, out, lse, eps, scale_log2, tokens, programs
    strides = runtime_strides(qkv)
    if config.keys_in_smem:
        launch(rope_attention_fwd_keys_in_smem_kernel, grid, *arguments, tiles, *strides, **common, BLOCKS=blocks)
    else:
        launch(rope_attention_fwd_kernel, grid, *arguments, *strides, **common)
    return out, lse


@operator("rope_attention_bwd")
def rope_attention_bwd(
    d_out: torch.Tensor,
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
    q_programs, q_tiles, q_blocks = split(tokens, dq.queries, dq.keys, dq.keys_in_smem)
    k_programs, k_tiles, k_blocks = split(tokens, dkdv.keys, dkdv.queries, dkdv.keys_in_smem)
    q_rows, k_rows = samples * q_programs * q_tiles, samples * k_programs * k_tiles
    dqw_partial = dkw_partial = dqb_partial = dkb_partial = None
    if normed:
        dqw_partial, dkw_partial = (lse.new_empty(rows * heads, width) for rows in (q_rows, k_rows))
    if summed:
        dqb_partial, dkb_partial = lse.new_empty(2, q_rows, heads * width), lse.new_empty(k_rows, heads * width)
    scale_log2 = width**-0.5 / math.log(2)
    strides = d_out.stride(0), *runtime_strides(qkv)
    launch(
        rope_attention_bwd_dq_kernel,
        (q_programs * heads * samples,),
        *(d_out, qkv, out, lse, table, q_weight, k_weight, bias, dqkv, delta, dqw_partial, dqb_partial),
        *(eps, scale_log2, tokens, q_programs, q_tiles, *strides),
        do_stride_n=d_out.stride(1),
        BLOCKS=q_blocks,
        **constants(qkv, dq),
    )
    launch(
        rope_attention_bwd_dkdv_kernel,
        (k_programs * heads * samples,),
        *(d_out, qkv, lse, delta, table, q_weight, k_weight, bias, dqkv, dkw_partial, dkb_partial),
        *(eps, scale_log2, tokens, k_programs, k_tiles, *strides),
        do_stride_n=d_out.stride(1),
        BLOCKS=k_blocks,
        **constants(qkv, dkdv),
    )
    dq_weight, dk_weight, dbias = (qkv.new_empty(0) for _ in range(3))
    if q_weight is not None and k_weight is not None:
        dq_weight, dk_weight = torch.empty_like(q_weight), torch.empty_like(k_weight)
        sums(2, width, dqw_partial, dkw_partial, dq_weight, dk_weight, q_rows * heads, k_rows * heads)
    if summed and bias is not None:
        dbias = torch.empty_like(bias)
        sums(3, heads * width, dqb_partial, dkb_partial, dbias, dbias[heads * width :], q_rows, k_rows)
    return dqkv, dq_weight, dk_weight, dbias


def sums(count: int, width: int, *arguments) -> None:
    """The second stage of `count` sums of `width` columns; the other arguments are those of the kernel."""
    launch(rope_attention_bwd_sums_kernel, (cdiv(width, 8), count), *arguments, W=width, BW=8, BP=256, num_warps=8)


rope_attention = register_autograd(rope_attention_fwd, rope_attention_bwd)


def unsupported(qkv, cos, sin, q_weight=None, k_weight=None, eps=1e-6, *, bias=None) -> list[str]:
    beside = unsupported_reasons(qkv, q_weight, k_weight, bias, dtypes=DTYPES | {qkv.dtype, torch.float64})
    return unsupported_reasons(qkv) + beside + width_reasons(qkv)


BACKEND = backend(
    rope_attention,
    unsupported,
    torch_ops=("ldit::rope_attention_fwd", "ldit::rope_attention_bwd"),
    configs=CONFIGS,
)
