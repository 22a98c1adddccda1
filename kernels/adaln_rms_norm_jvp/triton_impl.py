"""The Triton backend of `adaln_rms_norm_jvp`: operators. The backward pass is that of `kernels.adaln_rms_norm`."""

import torch

from kernels.adaln_rms_norm.autograd import out_dtype_reasons, where_wanted
from kernels.adaln_rms_norm.triton_impl import adaln_rms_norm_bwd
from kernels.adaln_rms_norm_jvp.triton_passes import Pair, jvp_config, jvp_pass
from kernels.backends.triton_launch import DTYPES, backend, operator, unsupported_reasons


@operator("adaln_rms_norm_jvp_fwd")
def adaln_rms_norm_jvp_fwd(
    x: torch.Tensor,
    x_tangent: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor | None,
    shift_tangent: torch.Tensor | None,
    scale: torch.Tensor,
    scale_tangent: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, its tangent, and the reciprocal root mean squares `[B, N]` that the backward pass needs."""
    shifts, scales = Pair(shift, shift_tangent), Pair(scale, scale_tangent)
    _, y, rstd = jvp_pass(Pair(x, x_tangent), weight=weight, shift=shifts, scale=scales, eps=eps, y_dtype=out_dtype)
    assert y.value is not None and y.tangent is not None
    return y.value, y.tangent, rstd


def save(ctx, inputs, output) -> None:
    x, _, weight, shift, _, scale, _, ctx.eps, _ = inputs
    _, tangent, rstd = output
    ctx.mark_non_differentiable(tangent, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, shift, scale, rstd)


def gradients(ctx, d_y, *_):
    if d_y is None:
        return (None,) * 9
    wanted = [ctx.needs_input_grad[place] for place in (0, 2, 3, 5)]
    found = adaln_rms_norm_bwd(*ctx.saved_tensors, d_y, ctx.eps, any(wanted[1:]))
    d_x, d_weight, d_shift, d_scale = where_wanted(found, wanted)
    return d_x, None, d_weight, d_shift, None, d_scale, None, None, None


adaln_rms_norm_jvp_fwd.register_autograd(gradients, setup_context=save)


def adaln_rms_norm_jvp(x, x_tangent, weight, shift, shift_tangent, scale, scale_tangent, eps, *, out_dtype=None):
    tensors = x, x_tangent, weight, shift, shift_tangent, scale, scale_tangent
    return adaln_rms_norm_jvp_fwd(*tensors, eps, out_dtype or x.dtype)[:2]


def unsupported(x, x_tangent, weight, shift, shift_tangent, scale, scale_tangent, eps, *, out_dtype=None):
    return unsupported_reasons(x, weight, shift, scale) + out_dtype_reasons(out_dtype, DTYPES)


BACKEND = backend(
    adaln_rms_norm_jvp,
    unsupported,
    torch_ops=("ldit::adaln_rms_norm_jvp_fwd", "ldit::adaln_rms_norm_bwd"),
    configs={"forward": jvp_config},
)
