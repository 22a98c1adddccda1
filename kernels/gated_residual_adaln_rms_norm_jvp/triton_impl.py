"""The Triton backend of `gated_residual_adaln_rms_norm_jvp`: operators.

The kernel is that of `kernels.adaln_rms_norm_jvp`, the backward pass that of `kernels.gated_residual_adaln_rms_norm`.
"""

import torch

from kernels.adaln_rms_norm.autograd import where_wanted
from kernels.adaln_rms_norm_jvp.triton_passes import Pair, jvp_config, jvp_pass
from kernels.backends.triton_launch import backend, operator, unsupported_reasons
from kernels.gated_residual_adaln_rms_norm.triton_impl import gated_residual_adaln_rms_norm_bwd

#: Places of the tensors without tangents among the operator's arguments: x, branch, gate, weight, shift, scale, bias.
PRIMAL = (0, 2, 4, 6, 7, 9, 11)


@operator("gated_residual_adaln_rms_norm_jvp_fwd")
def gated_residual_adaln_rms_norm_jvp_fwd(
    x: torch.Tensor,
    x_tangent: torch.Tensor,
    branch: torch.Tensor,
    branch_tangent: torch.Tensor,
    gate: torch.Tensor,
    gate_tangent: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor | None,
    shift_tangent: torch.Tensor | None,
    scale: torch.Tensor,
    scale_tangent: torch.Tensor,
    branch_bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x' and y, each with its tangent, and the reciprocal root mean squares `[B, N]` that the backward pass needs."""
    x_new, y, rstd = jvp_pass(
        Pair(x, x_tangent),
        Pair(branch, branch_tangent),
        Pair(gate, gate_tangent),
        branch_bias,
        weight=weight,
        shift=Pair(shift, shift_tangent),
        scale=Pair(scale, scale_tangent),
        eps=eps,
        y_dtype=branch.dtype,
    )
    assert x_new.value is not None and x_new.tangent is not None
    assert y.value is not None and y.tangent is not None
    return x_new.value, x_new.tangent, y.value, y.tangent, rstd


def save(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    x_new, x_new_tangent, _, y_tangent, rstd = output
    _, *others = (tensors[place] for place in PRIMAL)
    ctx.mark_non_differentiable(x_new_tangent, y_tangent, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_new, *others, rstd)


def gradients(ctx, d_x_new, _, d_y, *__):
    found: list[torch.Tensor | None] = [None] * 13
    if d_x_new is None and d_y is None:
        return tuple(found)
    wanted = [ctx.needs_input_grad[place] for place in PRIMAL]
    parts = gated_residual_adaln_rms_norm_bwd(*ctx.saved_tensors, d_x_new, d_y, ctx.eps, any(wanted[2:]))
    for place, gradient in zip(PRIMAL, where_wanted(parts, wanted), strict=True):
        found[place] = gradient
    return tuple(found)


gated_residual_adaln_rms_norm_jvp_fwd.register_autograd(gradients, setup_context=save)


def gated_residual_adaln_rms_norm_jvp(
    x,
    x_tangent,
    branch,
    branch_tangent,
    gate,
    gate_tangent,
    weight,
    shift,
    shift_tangent,
    scale,
    scale_tangent,
    eps,
    *,
    branch_bias=None,
):
    streams = x, x_tangent, branch, branch_tangent, gate, gate_tangent
    modulation = weight, shift, shift_tangent, scale, scale_tangent
    return gated_residual_adaln_rms_norm_jvp_fwd(*streams, *modulation, branch_bias, eps)[:4]


def unsupported(
    x,
    x_tangent,
    branch,
    branch_tangent,
    gate,
    gate_tangent,
    weight,
    shift,
    shift_tangent,
    scale,
    scale_tangent,
    eps,
    *,
    branch_bias=None,
):
    return unsupported_reasons(x, branch, gate, weight, shift, scale, branch_bias)


BACKEND = backend(
    gated_residual_adaln_rms_norm_jvp,
    unsupported,
    torch_ops=("ldit::gated_residual_adaln_rms_norm_jvp_fwd", "ldit::gated_residual_adaln_rms_norm_bwd"),
    configs={"forward": jvp_config},
)
