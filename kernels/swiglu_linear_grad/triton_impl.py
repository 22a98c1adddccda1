"""The gradient through a linear layer and SwiGLU in Triton, by the tensor memory accelerator and `wgmma`.

A program takes tiles by turns; each is two products side by side, so that one left operand serves both. A product is
turned into both gradients half by half, as more would not fit into registers beside it, while the operands of the next
tile are under way. Sums over a tile's rows, for the bias, are partial sums that the second kernel of `swiglu` adds up.
"""

import torch
import triton
import triton.language as tl

from kernels.backends.descriptors import DTYPES, backend, described, misaligned, table
from kernels.backends.triton_launch import launch, num_sms, operator, unsupported_reasons
from kernels.linear_swiglu.triton_impl import LaunchConfig, with_bias
from kernels.swiglu.triton_impl import sum_of_parts, swiglu_slope

#: Its two products lie side by side. Compiles for sm_90 without spills, as does stages=3, for a GPU to
#: judge.
CONFIG = LaunchConfig()


@triton.jit
def _store_gradients(
    d_activated, gate_in, up_in, gate_out, up_out, bias, partial_sums, row, column, hidden,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Both gradients of a block, and their sums over its rows."""
    gate, up = gate_in.load([row, column]).to(tl.float32), up_in.load([row, column]).to(tl.float32)
    if BIASED:
        gate = with_bias(gate, bias, column, hidden, COLUMNS)
        up = with_bias(up, bias + hidden, column, hidden, COLUMNS)
    d_gate, d_up = swiglu_slope(d_activated, gate, up)
    gate_out.store([row, column], d_gate.to(gate_out.dtype))
    up_out.store([row, column], d_up.to(up_out.dtype))
    if BIASED:
        columns = column + tl.arange(0, COLUMNS)
        sums = partial_sums + (row // ROWS).to(tl.int64) * (2 * hidden) + columns
        tl.store(sums, tl.sum(d_gate, axis=0), columns < hidden)
        tl.store(sums + hidden, tl.sum(d_up, axis=0), columns < hidden)


@triton.jit
def _store_product(
    d_activated, gate_in, up_in, gate_out, up_out, bias, partial_sums, row, column, hidden,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """As above, one half of the columns after the other; each thread holds numbers of both, so none move."""
    HALF: tl.constexpr = COLUMNS // 2
    left, right = tl.split(tl.permute(tl.reshape(d_activated, (ROWS, 2, HALF)), (0, 2, 1)))
    _store_gradients(left, gate_in, up_in, gate_out, up_out, bias, partial_sums, row, column, hidden,
                     ROWS, HALF, BIASED)  # fmt: skip
    _store_gradients(right, gate_in, up_in, gate_out, up_out, bias, partial_sums, row, column + HALF, hidden,
                     ROWS, HALF, BIASED)  # fmt: skip


@triton.jit
def swiglu_linear_grad_kernel(
    d_output, weight, gate_in, up_in, gate_out, up_out, bias, partial_sums, rows, hidden, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, FLATTEN: tl.constexpr,
    BIASED: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(hidden, 2 * COLUMNS)
    tiles = tl.cdiv(rows, ROWS) * across
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        row, column = (tile // across) * ROWS, (tile % across) * (2 * COLUMNS)
        first = tl.zeros((ROWS, COLUMNS), tl.float32)
        second = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in tl.range(0, width, DEPTH, num_stages=STAGES):
            left = d_output.load([row, step])
            first = tl.dot(left, weight.load([step, column]), first)
            second = tl.dot(left, weight.load([step, column + COLUMNS]), second)
        _store_product(first, gate_in, up_in, gate_out, up_out, bias, partial_sums, row, column, hidden,
                       ROWS, COLUMNS, BIASED)  # fmt: skip
        _store_product(second, gate_in, up_in, gate_out, up_out, bias, partial_sums, row, column + COLUMNS, hidden,
                       ROWS, COLUMNS, BIASED)  # fmt: skip


@operator("swiglu_linear_grad")
def swiglu_linear_grad_2d(
    d_output: torch.Tensor, weight: torch.Tensor, gate_up: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """On `[rows, D]` and `[rows, 2H]`; the gradient of the bias is empty without one."""
    (rows, width), hidden = d_output.shape, weight.shape[1]
    d_gate_up, down = torch.empty_like(gate_up, memory_format=torch.contiguous_format), triton.cdiv(rows, CONFIG.rows)
    partial_sums = None if bias is None else torch.empty(down, 2 * hidden, device=d_output.device)
    halves = (*table(gate_up).chunk(2, dim=1), *d_gate_up.chunk(2, dim=1))
    launch(
        swiglu_linear_grad_kernel,
        (min(down * triton.cdiv(hidden, 2 * CONFIG.columns), num_sms()),),
        described(table(d_output), CONFIG.rows, CONFIG.depth), described(table(weight), CONFIG.depth, CONFIG.columns),
        *(described(half, CONFIG.rows, CONFIG.columns // 2) for half in halves),
        None if bias is None else bias.contiguous(), partial_sums, rows, hidden, width,
        ROWS=CONFIG.rows, COLUMNS=CONFIG.columns, DEPTH=CONFIG.depth, STAGES=CONFIG.stages, FLATTEN=CONFIG.flatten,
        BIASED=bias is not None, num_warps=CONFIG.warps,
    )  # fmt: skip
    if bias is None:
        return d_gate_up, d_gate_up.new_empty(0)
    return d_gate_up, sum_of_parts(partial_sums, bias.dtype)


def swiglu_linear_grad(d_output, weight, gate_up, *, bias=None):
    found, d_bias = swiglu_linear_grad_2d(d_output.flatten(0, -2), weight, gate_up.flatten(0, -2), bias)
    return found.unflatten(0, gate_up.shape[:-1]), None if bias is None else d_bias


def unsupported(d_output, weight, gate_up, *, bias=None):
    reasons = unsupported_reasons(d_output, weight, gate_up, dtypes=DTYPES) + unsupported_reasons(d_output, bias)
    return reasons + misaligned(d_output.element_size(), d_output.shape[-1], weight.shape[1])


BACKEND = backend(swiglu_linear_grad, unsupported, torch_op="ldit::swiglu_linear_grad", config=CONFIG)
