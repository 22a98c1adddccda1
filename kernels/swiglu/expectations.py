"""Expectations of `swiglu`: launches, limits of its kernels, wrong edits of the reference."""

from kernels.testing.expectations import CudaLimits, Expectations, TritonLimits

EXPECTATIONS = Expectations(
    wrong_edits=(
        ("upcast + bias.to(upcast.dtype)", "upcast"),
        ("upcast + bias.to(upcast.dtype)", "upcast - bias.to(upcast.dtype)"),
        ("upcast + bias.to(upcast.dtype)", "upcast + bias.to(upcast.dtype).detach()"),
        ("upcast + bias.to(upcast.dtype)", "upcast + bias.to(upcast.dtype).roll(bias.numel() // 2)"),
        ("gate, up =", "up, gate ="),
        ("F.silu(gate)", "F.gelu(gate)"),
        ("F.silu(gate)", "F.sigmoid(gate)"),
        ("F.silu(gate)", "F.silu(gate.detach())"),
        ("* up)", "* up.detach())"),
        (".to(gate_up.dtype)", ""),
        (".chunk(2, dim=-1)", ".unflatten(-1, (-1, 2)).unbind(-1)"),
    ),
    triton_launches=(1, 2),
    triton={
        "swiglu_fwd_kernel": TritonLimits(
            registers=64, shared_bytes=0, loads_128_bits=True, unaligned_cases=("L", "L_bias")
        ),
        "swiglu_bwd_kernel": TritonLimits(
            registers=108, shared_bytes=4 * 1024, loads_128_bits=True, unaligned_cases=("L", "L_bias")
        ),
        "swiglu_sum_kernel": TritonLimits(registers=40, shared_bytes=512),
    },
    cuda={
        "swiglu_fwd": CudaLimits(registers=72, instances_loading_128_bits=6),
        "swiglu_bwd": CudaLimits(registers=112, instances_loading_128_bits=6),
        "column_sums": CudaLimits(registers=32, shared_bytes=1024),
    },
)
