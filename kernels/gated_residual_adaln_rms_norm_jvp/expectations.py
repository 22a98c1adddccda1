"""Expectations of `gated_residual_adaln_rms_norm_jvp`: launches, limits, wrong edits of the reference."""

from kernels.adaln_rms_norm_jvp.expectations import EXPECTATIONS as NORM
from kernels.testing.expectations import Expectations

EXPECTATIONS = Expectations(
    wrong_edits=(
        ("x.to(acc_dtype) + factor * added", "x.to(acc_dtype) + added"),
        ("factor = gate.to(acc_dtype)[:, None]", "factor = gate.detach().to(acc_dtype)[:, None]"),
        ("(x.to(acc_dtype) + factor", "(x.detach().to(acc_dtype) + factor"),
        ("added = branch.to(acc_dtype)", "added = branch.detach().to(acc_dtype)"),
        ("branch_bias is not None", "False"),
        ("branch_bias.to(acc_dtype)", "branch_bias.detach().to(acc_dtype)"),
        ("gate_tangent.to(acc_dtype)[:, None] * added", "gate_tangent.to(acc_dtype)[:, None] * branch.to(acc_dtype)"),
        ("gate_tangent.to(acc_dtype)[:, None] * added + ", ""),
        (" + factor * branch_tangent.to(acc_dtype)", ""),
        ("factor * branch_tangent", "branch_tangent"),
        ("(x_tangent.to(acc_dtype) + product_t)", "product_t"),
        ("        x_new, x_new_t, weight", "        x_new, x_tangent, weight"),
        ("        x_new, x_new_t, weight", "        x_new.detach(), x_new_t, weight"),
        (
            "shift, shift_tangent, scale, scale_tangent, eps, out",
            "shift, shift_tangent, scale, 0 * scale_tangent, eps, out",
        ),
        ("shift, shift_tangent, scale, scale_tangent, eps, out", "None, None, scale, scale_tangent, eps, out"),
        ("out_dtype=branch.dtype", "out_dtype=x.dtype"),
    ),
    triton_launches=(1, 2),
    triton=NORM.triton,
)
