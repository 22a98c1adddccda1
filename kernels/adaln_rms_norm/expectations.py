"""Expectations of `adaln_rms_norm`: launches, limits of its kernels, wrong edits of the reference."""

from kernels.testing.expectations import CudaLimits, Expectations, TritonLimits

EXPECTATIONS = Expectations(
    wrong_edits=(
        (" + eps)", ")"),
        (" + eps)", " + 2 * eps)"),
        ("(1 + scale", "(scale"),
        ("shift is not None", "False"),
        ("x_hat * weight.to(acc_dtype)", "x_hat"),
        (".mean(dim=-1,", ".mean(dim=(-2, -1),"),
        ("x.square()", "x.detach().square()"),
        ("weight.to(acc_dtype)", "weight.detach().to(acc_dtype)"),
        ("scale.to(acc_dtype)", "scale.detach().to(acc_dtype)"),
        ("shift.to(acc_dtype)", "shift.detach().to(acc_dtype)"),
        ("accumulation_dtype(x)", "x.dtype"),
        ("out_dtype or x.dtype", "x.dtype"),
        ("rms_normalize(x.to(acc_dtype), eps)", "rms_normalize(x.to(acc_dtype) - x.to(acc_dtype).mean(-1, True), eps)"),
        ("return y.to", "y[..., -1] = float('nan')\n    return y.to"),
    ),
    triton_launches=(1, 2),
    triton={
        "modulated_norm_fwd": TritonLimits(registers=128, shared_bytes=28 * 1024 + 512, loads_128_bits=True),
        "modulated_norm_bwd": TritonLimits(registers=216, shared_bytes=56 * 1024 + 512, loads_128_bits=True),
        "modulation_bwd": TritonLimits(registers=128, shared_bytes=8 * 1024, loads_128_bits=True),
    },
    cuda={
        "adaln_rms_norm_fwd": CudaLimits(registers=96, shared_bytes=1024, instances_loading_128_bits=9),
        "adaln_rms_norm_bwd": CudaLimits(registers=96, shared_bytes=1024, instances_loading_128_bits=9),
        "reduce_modulation": CudaLimits(registers=40, shared_bytes=2048),
    },
)
