"""Expectations of `gated_residual_adaln_rms_norm`: launches, limits of its kernels, wrong edits of the reference."""

from kernels.testing.expectations import CudaLimits, Expectations, TritonLimits

EXPECTATIONS = Expectations(
    wrong_edits=(
        ("gate.to(acc_dtype)[:, None] * ", ""),
        ("gate.to(acc_dtype)", "gate.detach().to(acc_dtype)"),
        ("gate.to(acc_dtype)[:, None]", "(1 + gate.to(acc_dtype)[:, None])"),
        ("branch.to(acc_dtype)", "branch.detach().to(acc_dtype)"),
        ("(x.to(acc_dtype) +", "(x.detach().to(acc_dtype) +"),
        ("adaln_rms_norm(x_new", "adaln_rms_norm(x"),
        ("adaln_rms_norm(x_new", "adaln_rms_norm(x_new.detach()"),
        ("return x_new,", "return x_new.detach(),"),
        (").to(x.dtype)", ").to(branch.dtype)"),
        ("out_dtype=branch.dtype", "out_dtype=x.dtype"),
        ("shift, scale, eps, out", "None, scale, eps, out"),
        ("branch_bias is not None", "False"),
        ("branch_bias.to(acc_dtype)", "branch_bias.detach().to(acc_dtype)"),
        ("added + branch_bias", "added - branch_bias"),
    ),
    triton_launches=(1, 2),
    triton={
        "modulated_norm_fwd": TritonLimits(registers=128, shared_bytes=28 * 1024 + 512, loads_128_bits=True),
        "modulated_norm_bwd": TritonLimits(registers=216, shared_bytes=56 * 1024 + 512, loads_128_bits=True),
        "modulation_bwd": TritonLimits(registers=128, shared_bytes=8 * 1024, loads_128_bits=True),
    },
    cuda={
        "gated_residual_adaln_rms_norm_fwd": CudaLimits(registers=96, shared_bytes=512, instances_loading_128_bits=5),
        "gated_residual_adaln_rms_norm_bwd": CudaLimits(
            registers=128, shared_bytes=17408, instances_loading_128_bits=5
        ),
        "reduce_modulation": CudaLimits(registers=40, shared_bytes=2048),
    },
)
