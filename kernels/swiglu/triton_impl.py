"""SwiGLU in Triton: one pass forward; one backward, from the saved input alone, which can sum the bias gradient too.

    M, H      rows (all tokens of all samples), columns of each half
    BM, BH    rows and columns of a tile, in each half

Memory bounds both passes, so what counts is how many bytes are in flight. A program holds a tile of both halves; its
threads lie along the columns, so a sum over rows stays within each thread. H arrives as `groups` · VECTOR, which tells
the compiler how rows are aligned: accesses have 128 bits where H is a multiple of 16 bytes, and 32 bits for H = 2730 or
4778 in 16-bit dtypes, whose rows begin at any multiple of 4 bytes.
"""

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl

from kernels.backends.layout import contiguous
from kernels.backends.triton_launch import backend, launch, operator, unsupported_reasons
from kernels.swiglu.autograd import register_autograd


@dataclass(frozen=True)
class LaunchConfig:
    """Launch configuration of one pass.

    Attributes:
        rows, columns: BM and BH, powers of two.
        rows_each: rows that a program works through when it sums over them, a multiple of `rows`.
        vector: VECTOR, elements that are sure to lie in one row and one access.
        warps: of a program.
        stages: tiles in flight at once in the loop over `rows_each`; more than 1 puts the others in shared memory.
    """

    rows: int
    columns: int
    rows_each: int
    vector: int
    warps: int = 4
    stages: int = 1


def launch_config(rows: int, hidden: int, itemsize: int, vectors: int) -> LaunchConfig:
    """For `rows` rows of H = `hidden`, with `vectors` 16-byte accesses of each thread to each operand.

    A tile is as wide as one 16-byte vector of each of 128 threads (1024 columns in bfloat16: three tiles for H = 3072,
    two for 2048, with nothing left over), and `vectors` rows high. Programs so small leave room for 10 and more of them
    on a multiprocessor: while some compute, the others load.

    A sum over rows costs 8 bytes of partial sums in each column for every `rows_each` rows, which move 10 bytes each:
    less than 3 % from 32 rows on. Up to 128 are taken together as long as 1056 programs remain, 8 for each of 132
    multiprocessors.
    """
    per_vector = 16 // itemsize
    columns = min(triton.next_power_of_2(hidden), 128 * per_vector)
    tile_rows = min(vectors * 128 * per_vector // columns, 64)
    rows_each = max(32, tile_rows)
    while rows_each < 128 and triton.cdiv(rows, 2 * rows_each) * triton.cdiv(hidden, columns) >= 1056:
        rows_each *= 2
    return LaunchConfig(tile_rows, columns, rows_each, gcd(hidden, per_vector))


#: 16-byte accesses of each thread to each operand: two operands are read forward and three backward.
VECTORS = {"forward": 4, "backward": 2}
#: Tile of the second stage of the sum: narrow, because 2H columns over 32 are to keep all multiprocessors busy.
SUM_PARTS, SUM_COLUMNS = 32, 32


@triton.jit
def tile_of_program(tiles_across, VECTOR: tl.constexpr, BH: tl.constexpr):
    """Which band of rows is this program's, its first column, and its columns [BH] counted from there.

    The hint gives all accesses one layout; that of the gate, whose rows may be better aligned, would be another.
    """
    pid = tl.program_id(0)
    return pid // tiles_across, (pid % tiles_across) * BH, tl.max_contiguous(tl.arange(0, BH), VECTOR)


@triton.jit
def load_bias(bias_ptr, cols, H):
    """Both halves of the bias at these columns, [1, BH] float32; unused zeros where `bias_ptr` is None."""
    if bias_ptr is not None:
        gate = tl.load(bias_ptr + cols, cols < H, other=0.0).to(tl.float32)[None, :]  # [1, BH]
        up = tl.load(bias_ptr + H + cols, cols < H, other=0.0).to(tl.float32)[None, :]  # [1, BH]
        return gate, up
    else:
        return 0.0, 0.0


@triton.jit
def load_half(ptrs, mask, bias, BIASED: tl.constexpr):
    """One half of a tile, [BM, BH] float32, with its bias; where there is none, 0 outside."""
    half = tl.load(ptrs, mask, other=0.0).to(tl.float32)  # [BM, BH]
    if BIASED:
        half += bias  # [BM, BH]
    return half


@triton.jit
def swiglu_fwd_kernel(
    gate_up_ptr, bias_ptr, out_ptr, M, groups, tiles_across, VECTOR: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr
):
    """out = silu(gate) · up for one tile [BM, BH]; silu(x) = x / (1 + e^−x).

    Args:
        gate_up_ptr [M, 2H]; bias_ptr [2H] or None; out_ptr [M, H].
    """
    H = groups * VECTOR
    band, first_col, col = tile_of_program(tiles_across, VECTOR, BH)
    row = tl.arange(0, BM)  # [BM]
    mask = (row < M - band * BM)[:, None] & (col < H - first_col)[None, :]  # [BM, BH]
    start = band.to(tl.int64) * BM * H
    gate_ptrs = (gate_up_ptr + 2 * start + first_col + row * (2 * H))[:, None] + col[None, :]  # [BM, BH]
    gate_bias, up_bias = load_bias(bias_ptr, first_col + col, H)  # [1, BH] each
    gate = load_half(gate_ptrs, mask, gate_bias, bias_ptr is not None)  # [BM, BH]
    up = load_half(gate_ptrs + H, mask, up_bias, bias_ptr is not None)  # [BM, BH]
    out = gate / (1 + tl.exp(-gate)) * up  # [BM, BH]
    out_ptrs = (out_ptr + start + first_col + row * H)[:, None] + col[None, :]  # [BM, BH]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def swiglu_d_gate_up(d_out, gate, up):
    """The gradients of gate and up, float32, from that of the result; all of one shape.

    d_gate = d_out · up · σ · (1 + gate · (1 − σ)) and d_up = d_out · gate · σ, with σ = sigmoid(gate).
    """
    sigmoid = 1 / (1 + tl.exp(-gate))  # shape of gate
    return d_out * up * (sigmoid * (1 + gate * (1 - sigmoid))), d_out * (gate * sigmoid)  # shape of gate each


@triton.jit
def _backward_tile(
    d_out_ptr, gate_up_ptr, d_gate_up_ptr, gate_bias, up_bias, first_row, first_col, row, col, M, H,
    BIASED: tl.constexpr,
):  # fmt: skip
    """Store the gradients of both halves of a tile, and return them, [BM, BH] float32 each, 0 outside."""
    mask = (row < M - first_row)[:, None] & (col < H - first_col)[None, :]  # [BM, BH]
    start = first_row.to(tl.int64) * H
    d_out_ptrs = (d_out_ptr + start + first_col + row * H)[:, None] + col[None, :]  # [BM, BH]
    gate_ptrs = (gate_up_ptr + 2 * start + first_col + row * (2 * H))[:, None] + col[None, :]  # [BM, BH]
    d_out = tl.load(d_out_ptrs, mask, other=0.0).to(tl.float32)  # [BM, BH]
    gate = load_half(gate_ptrs, mask, gate_bias, BIASED)  # [BM, BH]
    up = load_half(gate_ptrs + H, mask, up_bias, BIASED)  # [BM, BH]
    d_gate, d_up = swiglu_d_gate_up(d_out, gate, up)  # [BM, BH] each
    d_gate_ptrs = (d_gate_up_ptr + 2 * start + first_col + row * (2 * H))[:, None] + col[None, :]  # [BM, BH]
    tl.store(d_gate_ptrs, d_gate.to(d_gate_up_ptr.dtype.element_ty), mask)
    tl.store(d_gate_ptrs + H, d_up.to(d_gate_up_ptr.dtype.element_ty), mask)
    return d_gate, d_up


@triton.jit
def swiglu_bwd_kernel(
    d_out_ptr, gate_up_ptr, bias_ptr, d_gate_up_ptr, db_partial_ptr, M, groups, tiles_across, rows_each,
    VECTOR: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of gate_up for one tile [BM, BH]; with sums for the bias gradient, for those of `rows_each` rows.

    Args:
        d_out_ptr [M, H]; gate_up_ptr, d_gate_up_ptr [M, 2H]; bias_ptr [2H] or None.
        db_partial_ptr [parts, 2H] float32: sums over `rows_each` rows; None if they are not asked for.
    """
    H = groups * VECTOR
    band, first_col, col = tile_of_program(tiles_across, VECTOR, BH)
    row = tl.arange(0, BM)  # [BM]
    gate_bias, up_bias = load_bias(bias_ptr, first_col + col, H)  # [1, BH] each
    if db_partial_ptr is not None:
        gate_sum = tl.zeros([BH], tl.float32)  # [BH]
        up_sum = tl.zeros([BH], tl.float32)  # [BH]
        for start in tl.range(0, rows_each, BM, num_stages=STAGES):
            first_row = band * rows_each + start
            d_gate, d_up = _backward_tile(  # [BM, BH] each
                d_out_ptr, gate_up_ptr, d_gate_up_ptr, gate_bias, up_bias,
                first_row=first_row, first_col=first_col, row=row, col=col, M=M, H=H, BIASED=bias_ptr is not None,
            )  # fmt: skip
            gate_sum += tl.sum(d_gate, axis=0)  # [BH]
            up_sum += tl.sum(d_up, axis=0)  # [BH]
        sum_ptrs = db_partial_ptr + band.to(tl.int64) * (2 * H) + first_col + col  # [BH]
        tl.store(sum_ptrs, gate_sum, col < H - first_col)
        tl.store(sum_ptrs + H, up_sum, col < H - first_col)
    else:
        _backward_tile(
            d_out_ptr, gate_up_ptr, d_gate_up_ptr, gate_bias, up_bias,
            first_row=band * BM, first_col=first_col, row=row, col=col, M=M, H=H, BIASED=bias_ptr is not None,
        )  # fmt: skip


@triton.jit
def swiglu_sum_kernel(partial_ptr, sum_ptr, parts, width, BP: tl.constexpr, BW: tl.constexpr):
    """sum[c] = Σ partial[:, c] for BW columns c, BP parts at a time, always in the same order.

    Args:
        partial_ptr [parts, width] float32; sum_ptr [width].
    """
    col = tl.program_id(0) * BW + tl.arange(0, BW)  # [BW]
    part = tl.arange(0, BP)  # [BP]
    acc = tl.zeros([BP, BW], tl.float32)  # [BP, BW]
    for start in range(0, parts, BP):
        mask = (start + part < parts)[:, None] & (col < width)[None, :]  # [BP, BW]
        offsets = (start + part).to(tl.int64)[:, None] * width + col[None, :]  # [BP, BW]
        acc += tl.load(partial_ptr + offsets, mask, other=0.0)  # [BP, BW]
    tl.store(sum_ptr + col, tl.sum(acc, axis=0).to(sum_ptr.dtype.element_ty), col < width)


@operator("swiglu_fwd")
def swiglu_fwd(gate_up: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    hidden = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], hidden), dtype=gate_up.dtype, device=gate_up.device)
    rows = out.numel() // hidden
    config = launch_config(rows, hidden, gate_up.element_size(), VECTORS["forward"])
    tiles_across = triton.cdiv(hidden, config.columns)
    launch(
        swiglu_fwd_kernel,
        (triton.cdiv(rows, config.rows) * tiles_across,),
        *(gate_up.contiguous(), contiguous(bias), out, rows, hidden // config.vector, tiles_across),
        VECTOR=config.vector,
        BM=config.rows,
        BH=config.columns,
        num_warps=config.warps,
    )
    return out


@operator("swiglu_bwd")
def swiglu_bwd(
    d_out: torch.Tensor, gate_up: torch.Tensor, bias: torch.Tensor | None, summed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `gate_up` and of `bias`; the latter empty unless `summed`."""
    hidden = gate_up.shape[-1] // 2
    rows = d_out.numel() // hidden
    config = launch_config(rows, hidden, gate_up.element_size(), VECTORS["backward"])
    tiles_across = triton.cdiv(hidden, config.columns)
    parts = triton.cdiv(rows, config.rows_each if summed else config.rows)
    d_gate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    db_partial = torch.empty((parts, 2 * hidden), device=d_out.device) if summed else None
    launch(
        swiglu_bwd_kernel,
        (parts * tiles_across,),
        *(d_out.contiguous(), gate_up.contiguous(), contiguous(bias), d_gate_up, db_partial),
        *(rows, hidden // config.vector, tiles_across, config.rows_each),
        VECTOR=config.vector,
        BM=config.rows,
        BH=config.columns,
        STAGES=config.stages,
        num_warps=config.warps,
    )
    if bias is None or db_partial is None:
        return d_gate_up, d_gate_up.new_empty(0)
    return d_gate_up, sum_of_parts(db_partial, bias.dtype)


def sum_of_parts(partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The gradient of a bias, `[2H]`, from the float32 sums of the parts of the rows, `[parts, 2H]`."""
    parts, width = partial.shape
    total = torch.empty(width, dtype=dtype, device=partial.device)
    launch(
        swiglu_sum_kernel,
        (triton.cdiv(width, SUM_COLUMNS),),
        *(partial, total, parts, width),
        BP=SUM_PARTS,
        BW=SUM_COLUMNS,
        num_warps=4,
    )
    return total


swiglu = register_autograd(swiglu_fwd, swiglu_bwd)


def unsupported(gate_up, *, bias=None):
    return unsupported_reasons(gate_up, bias)


BACKEND = backend(
    swiglu,
    unsupported,
    torch_ops=("ldit::swiglu_fwd", "ldit::swiglu_bwd"),
    configs={direction: launch_config(32_768, 3072, 2, vectors) for direction, vectors in VECTORS.items()},
)
