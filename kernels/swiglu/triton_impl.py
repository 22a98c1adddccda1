"""SwiGLU in Triton: one pass forward; one backward, from the saved input alone, which can sum the bias gradient too.

Memory bounds both, so what counts is how many bytes are under way. A program holds a tile of rows × columns of both
halves; its threads lie along the columns, so a sum over rows stays within each thread. H arrives as `groups` ·
`VECTOR`, which tells the compiler how rows are aligned: accesses have 128 bits where H is a multiple of 16 bytes, and
32 bits for H = 2730 or 4778 in 16-bit dtypes, whose rows begin at any multiple of 4 bytes.
"""

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl

from kernels.backends.triton_launch import backend, launch, operator, unsupported_reasons
from kernels.swiglu.autograd import register_autograd


@dataclass(frozen=True)
class LaunchConfig:
    """Launch configuration of one pass.

    Attributes:
        rows, columns: of a program's tile, in each half; powers of two.
        rows_each: rows that a program works through when it sums over them, a multiple of `rows`.
        vector: elements that are sure to lie in one row and one access.
        warps: of a program.
        stages: tiles under way at once in the loop over `rows_each`; more than 1 puts the others in shared memory.
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
    wide = 16 // itemsize
    columns = min(triton.next_power_of_2(hidden), 128 * wide)
    high = min(vectors * 128 * wide // columns, 64)
    rows_each = max(32, high)
    while rows_each < 128 and triton.cdiv(rows, 2 * rows_each) * triton.cdiv(hidden, columns) >= 1056:
        rows_each *= 2
    return LaunchConfig(high, columns, rows_each, gcd(hidden, wide))


#: 16-byte accesses of each thread to each operand: two operands are read forward and three backward.
VECTORS = {"forward": 4, "backward": 2}
#: Tile of the second stage of the sum: narrow, because 2H columns over 32 are to keep all multiprocessors busy.
SUM_ROWS, SUM_COLUMNS = 32, 32


@triton.jit
def _place(chunks, VECTOR: tl.constexpr, COLUMNS: tl.constexpr):
    """Which band of rows is this program's, its first column, and its columns counted from there.

    The hint gives all accesses one layout; that of the gate, whose rows may be better aligned, would be another.
    """
    program = tl.program_id(0)
    return program // chunks, (program % chunks) * COLUMNS, tl.max_contiguous(tl.arange(0, COLUMNS), VECTOR)


@triton.jit
def _bias(bias, column, hidden, BIASED: tl.constexpr):
    """Both halves of the bias at these columns, `[1, COLUMNS]`; unused zeros without one."""
    if BIASED:
        gate = tl.load(bias + column, column < hidden, other=0.0).to(tl.float32)[None, :]
        up = tl.load(bias + hidden + column, column < hidden, other=0.0).to(tl.float32)[None, :]
        return gate, up
    else:
        return 0.0, 0.0


@triton.jit
def _half(pointers, inside, bias, BIASED: tl.constexpr):
    """One half of a tile in float32, the bias added; without it zero outside."""
    half = tl.load(pointers, inside, other=0.0).to(tl.float32)
    if BIASED:
        half += bias
    return half


@triton.jit
def swiglu_fwd_kernel(
    gate_up, bias, out, rows, groups, chunks,
    VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    hidden = groups * VECTOR
    band, first_column, column = _place(chunks, VECTOR, COLUMNS)
    row = tl.arange(0, ROWS)
    inside = (row < rows - band * ROWS)[:, None] & (column < hidden - first_column)[None, :]
    before = band.to(tl.int64) * ROWS * hidden
    packed = (gate_up + 2 * before + first_column + row * (2 * hidden))[:, None] + column[None, :]
    gate_bias, up_bias = _bias(bias, first_column + column, hidden, BIASED)
    gate = _half(packed, inside, gate_bias, BIASED)
    up = _half(packed + hidden, inside, up_bias, BIASED)
    result = gate / (1 + tl.exp(-gate)) * up
    place = (out + before + first_column + row * hidden)[:, None] + column[None, :]
    tl.store(place, result.to(out.dtype.element_ty), inside)


@triton.jit
def swiglu_slope(upstream, gate, up):
    """The gradients of both halves, float32, for that of the result."""
    sigmoid = 1 / (1 + tl.exp(-gate))
    return upstream * up * (sigmoid * (1 + gate * (1 - sigmoid))), upstream * (gate * sigmoid)


@triton.jit
def _gradients(
    grad, gate_up, d_gate_up, gate_bias, up_bias, first_row, first_column, row, column, rows, hidden,
    BIASED: tl.constexpr,
):  # fmt: skip
    """Store the gradients of both halves of a tile, and return them in float32, zero outside."""
    inside = (row < rows - first_row)[:, None] & (column < hidden - first_column)[None, :]
    before = first_row.to(tl.int64) * hidden
    place = (grad + before + first_column + row * hidden)[:, None] + column[None, :]
    packed = (gate_up + 2 * before + first_column + row * (2 * hidden))[:, None] + column[None, :]
    upstream = tl.load(place, inside, other=0.0).to(tl.float32)
    gate = _half(packed, inside, gate_bias, BIASED)
    up = _half(packed + hidden, inside, up_bias, BIASED)
    d_gate, d_up = swiglu_slope(upstream, gate, up)
    d_packed = (d_gate_up + 2 * before + first_column + row * (2 * hidden))[:, None] + column[None, :]
    tl.store(d_packed, d_gate.to(d_gate_up.dtype.element_ty), inside)
    tl.store(d_packed + hidden, d_up.to(d_gate_up.dtype.element_ty), inside)
    return d_gate, d_up


@triton.jit
def swiglu_bwd_kernel(
    grad, gate_up, bias, d_gate_up, partial_sums, rows, groups, chunks, rows_each,
    VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    BIASED: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    hidden = groups * VECTOR
    band, first_column, column = _place(chunks, VECTOR, COLUMNS)
    row = tl.arange(0, ROWS)
    gate_bias, up_bias = _bias(bias, first_column + column, hidden, BIASED)
    if SUMMED:
        gate_sum = tl.zeros([COLUMNS], tl.float32)
        up_sum = tl.zeros([COLUMNS], tl.float32)
        for start in tl.range(0, rows_each, ROWS, num_stages=STAGES):
            first_row = band * rows_each + start
            d_gate, d_up = _gradients(grad, gate_up, d_gate_up, gate_bias, up_bias, first_row, first_column,
                                      row, column, rows, hidden, BIASED)  # fmt: skip
            gate_sum += tl.sum(d_gate, axis=0)
            up_sum += tl.sum(d_up, axis=0)
        sums = partial_sums + band.to(tl.int64) * (2 * hidden) + first_column + column
        tl.store(sums, gate_sum, column < hidden - first_column)
        tl.store(sums + hidden, up_sum, column < hidden - first_column)
    else:
        _gradients(grad, gate_up, d_gate_up, gate_bias, up_bias, band * ROWS, first_column,
                   row, column, rows, hidden, BIASED)  # fmt: skip


@triton.jit
def swiglu_sum_kernel(partial_sums, total, parts, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """total[c] = Σ partial_sums[:, c], always in the same order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, parts, ROWS):
        inside = (start + row < parts)[:, None] & (column < width)[None, :]
        at = (start + row).to(tl.int64)[:, None] * width + column[None, :]
        sums += tl.load(partial_sums + at, inside, other=0.0)
    tl.store(total + column, tl.sum(sums, axis=0).to(total.dtype.element_ty), column < width)


@operator("swiglu_fwd")
def swiglu_fwd(gate_up: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    hidden = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], hidden), dtype=gate_up.dtype, device=gate_up.device)
    rows = out.numel() // hidden
    config = launch_config(rows, hidden, gate_up.element_size(), VECTORS["forward"])
    chunks = triton.cdiv(hidden, config.columns)
    launch(
        swiglu_fwd_kernel, (triton.cdiv(rows, config.rows) * chunks,),
        gate_up.contiguous(), None if bias is None else bias.contiguous(), out, rows, hidden // config.vector, chunks,
        VECTOR=config.vector, ROWS=config.rows, COLUMNS=config.columns, BIASED=bias is not None, num_warps=config.warps,
    )  # fmt: skip
    return out


@operator("swiglu_bwd")
def swiglu_bwd(
    grad: torch.Tensor, gate_up: torch.Tensor, bias: torch.Tensor | None, summed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `gate_up` and of `bias`; the latter empty unless `summed`."""
    hidden = gate_up.shape[-1] // 2
    rows = grad.numel() // hidden
    config = launch_config(rows, hidden, gate_up.element_size(), VECTORS["backward"])
    chunks = triton.cdiv(hidden, config.columns)
    parts = triton.cdiv(rows, config.rows_each if summed else config.rows)
    d_gate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    partial_sums = torch.empty((parts, 2 * hidden), device=grad.device) if summed else None
    launch(
        swiglu_bwd_kernel, (parts * chunks,),
        grad.contiguous(), gate_up.contiguous(), None if bias is None else bias.contiguous(), d_gate_up, partial_sums,
        rows, hidden // config.vector, chunks, config.rows_each,
        VECTOR=config.vector, ROWS=config.rows, COLUMNS=config.columns, STAGES=config.stages,
        BIASED=bias is not None, SUMMED=summed, num_warps=config.warps,
    )  # fmt: skip
    if not summed:
        return d_gate_up, d_gate_up.new_empty(0)
    return d_gate_up, sum_of_parts(partial_sums, bias.dtype)


def sum_of_parts(partial_sums: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The gradient of a bias, `[2H]`, from the float32 sums of the parts of the rows, `[parts, 2H]`."""
    parts, width = partial_sums.shape
    total = torch.empty(width, dtype=dtype, device=partial_sums.device)
    launch(
        swiglu_sum_kernel, (triton.cdiv(width, SUM_COLUMNS),), partial_sums, total, parts, width,
        ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, num_warps=4,
    )  # fmt: skip
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
