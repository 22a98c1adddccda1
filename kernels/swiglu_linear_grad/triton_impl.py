"""The gradient through a linear layer and SwiGLU in Triton, by the tensor memory accelerator and `wgmma`.

    M, D, H      rows of d_output, columns of d_output, columns of each half of gate_up
    BM, BH, BD   rows and columns of a product, columns of d_output that one step of the products takes

A program takes one tile after another; each is two products side by side, [BM, 2·BH], which share their left operand. A
product becomes both gradients half by half, as more would not fit into registers beside it, while the operands of the
next tile are in flight. Sums over a tile's rows, for the bias, are partial; the second kernel of `swiglu` adds them up.
"""

import torch
import triton
import triton.language as tl

from kernels.backends.descriptors import DTYPES, aligned_rows, alignment_reasons, backend, tensor_descriptor
from kernels.backends.layout import contiguous
from kernels.backends.triton_launch import launch, num_sms, operator, unsupported_reasons
from kernels.linear_swiglu.triton_impl import LaunchConfig, add_bias
from kernels.swiglu.triton_impl import sum_of_parts, swiglu_d_gate_up

#: Its two products lie side by side. Compiles for sm_90 without spills, as does stages=3, to be timed on a GPU.
CONFIG = LaunchConfig()


@triton.jit
def _store_gradients(
    d_activated, gate_desc, up_desc, d_gate_desc, d_up_desc, bias_ptr, db_partial_ptr, row, col, H,
    BM: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Store both gradients of d_activated [BM, C] at (row, col), and their sums over these rows."""
    gate = gate_desc.load([row, col]).to(tl.float32)  # [BM, C]
    up = up_desc.load([row, col]).to(tl.float32)  # [BM, C]
    if bias_ptr is not None:
        gate = add_bias(gate, bias_ptr, col, H, C)  # [BM, C]
        up = add_bias(up, bias_ptr + H, col, H, C)  # [BM, C]
    d_gate, d_up = swiglu_d_gate_up(d_activated, gate, up)  # [BM, C] each
    d_gate_desc.store([row, col], d_gate.to(d_gate_desc.dtype))
    d_up_desc.store([row, col], d_up.to(d_up_desc.dtype))
    if bias_ptr is not None:
        cols = col + tl.arange(0, C)  # [C]
        sum_ptrs = db_partial_ptr + (row // BM).to(tl.int64) * (2 * H) + cols  # [C]
        tl.store(sum_ptrs, tl.sum(d_gate, axis=0), cols < H)
        tl.store(sum_ptrs + H, tl.sum(d_up, axis=0), cols < H)


@triton.jit
def _store_gradients_by_halves(
    d_activated, gate_desc, up_desc, d_gate_desc, d_up_desc, bias_ptr, db_partial_ptr, row, col, H,
    BM: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """As above for d_activated [BM, BH], one half of the columns after the other.

    Each thread holds elements of both halves, so none move between threads.
    """
    HALF: tl.constexpr = BH // 2
    left, right = tl.split(tl.permute(tl.reshape(d_activated, (BM, 2, HALF)), (0, 2, 1)))  # [BM, BH / 2] each
    _store_gradients(
        left, gate_desc, up_desc, d_gate_desc, d_up_desc,
        bias_ptr=bias_ptr, db_partial_ptr=db_partial_ptr, row=row, col=col, H=H, BM=BM, C=HALF,
    )  # fmt: skip
    _store_gradients(
        right, gate_desc, up_desc, d_gate_desc, d_up_desc,
        bias_ptr=bias_ptr, db_partial_ptr=db_partial_ptr, row=row, col=col + HALF, H=H, BM=BM, C=HALF,
    )  # fmt: skip


@triton.jit
def swiglu_linear_grad_kernel(
    d_output_desc, weight_desc, gate_desc, up_desc, d_gate_desc, d_up_desc, bias_ptr, db_partial_ptr, M, H, D,
    BM: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """d_activated = d_output · weight, and the gradients of gate and up from it (`swiglu_d_gate_up`).

    Args:
        d_output_desc [M, D]; weight_desc [D, H]; gate_desc, up_desc [M, H], without their bias; bias_ptr [2H] or None.
        d_gate_desc, d_up_desc [M, H], results; db_partial_ptr [ceil(M / BM), 2H] float32, sums over BM rows, or None.
    """
    tiles_across = tl.cdiv(H, 2 * BH)
    tiles = tl.cdiv(M, BM) * tiles_across
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        row, col = (tile // tiles_across) * BM, (tile % tiles_across) * (2 * BH)
        left = tl.zeros((BM, BH), tl.float32)  # [BM, BH]
        right = tl.zeros((BM, BH), tl.float32)  # [BM, BH]
        for d in tl.range(0, D, BD, num_stages=STAGES):
            d_output = d_output_desc.load([row, d])  # [BM, BD]
            left = tl.dot(d_output, weight_desc.load([d, col]), left)  # [BM, BH]
            right = tl.dot(d_output, weight_desc.load([d, col + BH]), right)  # [BM, BH]
        _store_gradients_by_halves(
            left, gate_desc, up_desc, d_gate_desc, d_up_desc,
            bias_ptr=bias_ptr, db_partial_ptr=db_partial_ptr, row=row, col=col, H=H, BM=BM, BH=BH,
        )  # fmt: skip
        _store_gradients_by_halves(
            right, gate_desc, up_desc, d_gate_desc, d_up_desc,
            bias_ptr=bias_ptr, db_partial_ptr=db_partial_ptr, row=row, col=col + BH, H=H, BM=BM, BH=BH,
        )  # fmt: skip


@operator("swiglu_linear_grad")
def swiglu_linear_grad_2d(
    d_output: torch.Tensor, weight: torch.Tensor, gate_up: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """On `[rows, D]` and `[rows, 2H]`; the gradient of the bias is empty without one."""
    (rows, width), hidden = d_output.shape, weight.shape[1]
    d_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    tiles_down = triton.cdiv(rows, CONFIG.rows)
    db_partial = None if bias is None else torch.empty(tiles_down, 2 * hidden, device=d_output.device)
    halves = (*aligned_rows(gate_up).chunk(2, dim=1), *d_gate_up.chunk(2, dim=1))
    launch(
        swiglu_linear_grad_kernel,
        (min(tiles_down * triton.cdiv(hidden, 2 * CONFIG.columns), num_sms()),),
        tensor_descriptor(aligned_rows(d_output), CONFIG.rows, CONFIG.depth),
        tensor_descriptor(aligned_rows(weight), CONFIG.depth, CONFIG.columns),
        *(tensor_descriptor(half, CONFIG.rows, CONFIG.columns // 2) for half in halves),
        *(contiguous(bias), db_partial, rows, hidden, width),
        BM=CONFIG.rows,
        BH=CONFIG.columns,
        BD=CONFIG.depth,
        STAGES=CONFIG.stages,
        FLATTEN=CONFIG.flatten,
        num_warps=CONFIG.warps,
    )
    if bias is None or db_partial is None:
        return d_gate_up, d_gate_up.new_empty(0)
    return d_gate_up, sum_of_parts(db_partial, bias.dtype)


def swiglu_linear_grad(d_output, weight, gate_up, *, bias=None):
    d_gate_up, d_bias = swiglu_linear_grad_2d(d_output.flatten(0, -2), weight, gate_up.flatten(0, -2), bias)
    return d_gate_up.unflatten(0, gate_up.shape[:-1]), None if bias is None else d_bias


def unsupported(d_output, weight, gate_up, *, bias=None):
    reasons = unsupported_reasons(d_output, weight, gate_up, dtypes=DTYPES) + unsupported_reasons(d_output, bias)
    return reasons + alignment_reasons(d_output.element_size(), d_output.shape[-1], weight.shape[1])


BACKEND = backend(swiglu_linear_grad, unsupported, torch_op="ldit::swiglu_linear_grad", config=CONFIG)
