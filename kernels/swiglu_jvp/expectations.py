"""Expectations of `swiglu_jvp`: launches, limits of its kernels, wrong edits of the reference."""

from kernels.swiglu.expectations import EXPECTATIONS as PRIMAL
from kernels.testing.expectations import Expectations, TritonLimits

EXPECTATIONS = Expectations(
    wrong_edits=(
        ("upcast + bias.to(upcast.dtype)", "upcast"),
        ("upcast + bias.to(upcast.dtype)", "upcast + bias.to(upcast.dtype).detach()"),
        ("gate, up =", "up, gate ="),
        ("gate_t, up_t =", "up_t, gate_t ="),
        ("activated = F.silu(gate)", "activated = F.silu(gate.detach())"),
        ("activated = F.silu(gate) * up", "activated = F.silu(gate) * up.detach()"),
        ("(1 - sigmoid)", "sigmoid"),
        ("slope * gate_t * up", "slope * gate_t"),
        ("slope * gate_t * up", "sigmoid * gate_t * up"),
        (" + F.silu(gate) * up_t", ""),
        ("F.silu(gate) * up_t", "sigmoid * up_t"),
        ("tangent.to(gate_up.dtype)", "tangent"),
    ),
    triton_launches=(1, 2),
    triton={
        "swiglu_jvp_fwd_kernel": TritonLimits(
            registers=64, shared_bytes=0, loads_128_bits=True, unaligned_cases=("L_bias",)
        ),
        "swiglu_bwd_kernel": PRIMAL.triton["swiglu_bwd_kernel"],
        "swiglu_sum_kernel": PRIMAL.triton["swiglu_sum_kernel"],
    },
)
