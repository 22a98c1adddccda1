"""Expectations of `linear_swiglu`: launches, limits of its kernels, wrong edits of the reference."""

from kernels.testing.expectations import Expectations, TritonLimits

EXPECTATIONS = Expectations(
    wrong_edits=(
        ("F.linear(x, weight)", "F.linear(x, weight, bias)"),
        ("F.linear(x, weight)", "F.linear(x, weight.roll(len(weight) // 2, 0))"),
        ("F.linear(x, weight)", "F.linear(x[..., :-1], weight[:, :-1])"),
        ("bias=bias)", "bias=None)"),
        ("return gate_up,", "return gate_up + 0.01 * gate_up.abs(),"),
    ),
    triton_launches=(1, 0),
    triton={
        "linear_swiglu_kernel": TritonLimits(registers=224, shared_bytes=225 * 1024, wgmma=True),
    },
    rounded_once=False,
)
