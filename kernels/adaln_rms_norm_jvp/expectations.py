"""Expectations of `adaln_rms_norm_jvp`: launches, limits of its kernels, wrong edits of the reference."""

from kernels.adaln_rms_norm.expectations import EXPECTATIONS as PRIMAL
from kernels.testing.expectations import Expectations, TritonLimits

EXPECTATIONS = Expectations(
    wrong_edits=(
        (" + eps)", ")"),
        (" + eps)", " + 2 * eps)"),
        ("1 + scale.to", "scale.to"),
        ("x, gain = x.to(acc_dtype), weight.to(acc_dtype)", "x, gain = x.to(acc_dtype), weight.detach().to(acc_dtype)"),
        ("x, gain = x.to(acc_dtype), weight.to(acc_dtype)", "x, gain = x.to(acc_dtype).detach(), weight.to(acc_dtype)"),
        ("x.square()", "x.detach().square()"),
        ("x_hat_t = r * (", "x_hat_t = ("),
        (" - x_hat * (x_hat * x_t).mean(dim=-1, keepdim=True)", ""),
        ("(x_hat * x_t).mean(dim=-1,", "(x_hat * x_t).mean(dim=(-2, -1),"),
        ("(x_hat * x_t).mean(dim=-1, keepdim=True)", "x_t.mean(dim=-1, keepdim=True)"),
        (" + x_hat * scale_t", ""),
        ("x_hat * scale_t", "scale_t"),
        ("x_hat_t * factor", "x_hat_t"),
        ("x_hat * scale_t) * gain", "x_hat * scale_t)"),
        ("shift is not None", "False"),
        ("y_t = y_t + shift_tangent.to(acc_dtype)[:, None]", "pass"),
        ("out_dtype or x_tangent.dtype", "x_tangent.dtype"),
        ("accumulation_dtype(x)", "x.dtype"),
        ("y_t.detach()", "(y_t + 0 * y)"),
    ),
    triton_launches=(1, 2),
    triton={
        "modulated_norm_jvp_fwd": TritonLimits(registers=216, shared_bytes=56 * 1024 + 512, loads_128_bits=True),
        "modulated_norm_bwd": PRIMAL.triton["modulated_norm_bwd"],
        "modulation_bwd": PRIMAL.triton["modulation_bwd"],
    },
)
