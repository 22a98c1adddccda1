import torch

from kernels.adaln_rms_norm_jvp.reference import adaln_rms_norm_jvp
from kernels.arguments import accumulation_dtype
from kernels.registry import Backend


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
    acc_dtype = accumulation_dtype(x, branch)
    added = branch.to(acc_dtype)
    if branch_bias is not None:
        added = added + branch_bias.to(acc_dtype)
    factor = gate.to(acc_dtype)[:, None]
    x_new = (x.to(acc_dtype) + factor * added).to(x.dtype)
    with torch.no_grad():
        product_t = gate_tangent.to(acc_dtype)[:, None] * added + factor * branch_tangent.to(acc_dtype)
        x_new_t = (x_tangent.to(acc_dtype) + product_t).to(x.dtype)
    y, y_t = adaln_rms_norm_jvp(
        x_new, x_new_t, weight, shift, shift_tangent, scale, scale_tangent, eps, out_dtype=branch.dtype
    )
    return x_new, x_new_t, y, y_t


BACKEND = Backend("reference", gated_residual_adaln_rms_norm_jvp)
