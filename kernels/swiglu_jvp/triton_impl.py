"""SwiGLU and its tangent in Triton, in one pass: the tiles are those of `kernels.swiglu`, as is the backward pass."""

import torch
import triton
import triton.language as tl

from kernels.backends.layout import contiguous
from kernels.backends.triton_launch import backend, launch, operator, unsupported_reasons
from kernels.swiglu.triton_impl import launch_config, load_bias, load_half, swiglu_bwd, tile_of_program

#: 16-byte accesses of each thread to each of the four operands.
VECTORS = 2


@triton.jit
def swiglu_jvp_fwd_kernel(
    gate_up_ptr, gate_up_t_ptr, bias_ptr, out_ptr, out_t_ptr, M, groups, tiles_across,
    VECTOR: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """out = silu(gate) · up and out_t = silu'(gate) · gate_t · up + silu(gate) · up_t for one tile [BM, BH].

    Args:
        gate_up_ptr, gate_up_t_ptr [M, 2H]; bias_ptr [2H] or None; out_ptr, out_t_ptr [M, H].
    """
    H = groups * VECTOR
    band, first_col, col = tile_of_program(tiles_across, VECTOR, BH)
    row = tl.arange(0, BM)  # [BM]
    mask = (row < M - band * BM)[:, None] & (col < H - first_col)[None, :]  # [BM, BH]
    start = band.to(tl.int64) * BM * H
    packed = (2 * start + first_col + row * (2 * H))[:, None] + col[None, :]  # [BM, BH]
    gate_bias, up_bias = load_bias(bias_ptr, first_col + col, H)  # [1, BH] each
    gate = load_half(gate_up_ptr + packed, mask, gate_bias, bias_ptr is not None)  # [BM, BH]
    up = load_half(gate_up_ptr + packed + H, mask, up_bias, bias_ptr is not None)  # [BM, BH]
    gate_t = load_half(gate_up_t_ptr + packed, mask, 0.0, False)  # [BM, BH]
    up_t = load_half(gate_up_t_ptr + packed + H, mask, 0.0, False)  # [BM, BH]
    sigmoid = 1 / (1 + tl.exp(-gate))  # [BM, BH]
    silu = gate * sigmoid  # [BM, BH]
    slope = sigmoid * (1 + gate * (1 - sigmoid))  # [BM, BH]
    offsets = (start + first_col + row * H)[:, None] + col[None, :]  # [BM, BH]
    tl.store(out_ptr + offsets, (silu * up).to(out_ptr.dtype.element_ty), mask)
    out_t = slope * gate_t * up + silu * up_t  # [BM, BH]
    tl.store(out_t_ptr + offsets, out_t.to(out_t_ptr.dtype.element_ty), mask)


@operator("swiglu_jvp_fwd")
def swiglu_jvp_fwd(
    gate_up: torch.Tensor, gate_up_tangent: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], hidden), dtype=gate_up.dtype, device=gate_up.device)
    out_tangent = torch.empty_like(out)
    rows = out.numel() // hidden
    config = launch_config(rows, hidden, gate_up.element_size(), VECTORS)
    tiles_across = triton.cdiv(hidden, config.columns)
    launch(
        swiglu_jvp_fwd_kernel,
        (triton.cdiv(rows, config.rows) * tiles_across,),
        *(gate_up.contiguous(), gate_up_tangent.contiguous(), contiguous(bias), out, out_tangent),
        *(rows, hidden // config.vector, tiles_across),
        VECTOR=config.vector,
        BM=config.rows,
        BH=config.columns,
        num_warps=config.warps,
    )
    return out, out_tangent


def save(ctx, inputs, output) -> None:
    gate_up, _, bias = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gate_up, bias)


def gradients(ctx, d_out, _):
    if d_out is None:
        return None, None, None
    gate_up, bias = ctx.saved_tensors
    summed = bias is not None and ctx.needs_input_grad[2]
    d_gate_up, d_bias = swiglu_bwd(d_out, gate_up, bias, summed)
    return d_gate_up, None, d_bias if summed else None


swiglu_jvp_fwd.register_autograd(gradients, setup_context=save)


def swiglu_jvp(gate_up, gate_up_tangent, *, bias=None):
    return swiglu_jvp_fwd(gate_up, gate_up_tangent, bias)


def unsupported(gate_up, gate_up_tangent, *, bias=None):
    return unsupported_reasons(gate_up, bias)


BACKEND = backend(
    swiglu_jvp,
    unsupported,
    torch_ops=("ldit::swiglu_jvp_fwd", "ldit::swiglu_bwd"),
    configs={"forward": launch_config(32_768, 3072, 2, VECTORS)},
)
