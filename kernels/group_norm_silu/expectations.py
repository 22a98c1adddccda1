"""Expectations of `group_norm_silu`: launches, limits of its kernels, wrong edits of the reference."""

from kernels.testing.expectations import Expectations, TritonLimits

EXPECTATIONS = Expectations(
    wrong_edits=(
        ("F.silu(normed)", "normed"),
        ("F.silu(normed)", "F.silu(normed.detach()) + 0 * normed"),
        (", eps)\n    return", ", 1e-5)\n    return"),
        ("bias.to(acc_dtype)", "None"),
        ("weight.to(acc_dtype)", "weight.detach().to(acc_dtype)"),
        ("groups, weight", "1, weight"),
        ("contiguous(memory_format=memory_format(x))", "contiguous()"),
        ("x.to(acc_dtype).contiguous()", "x.to(acc_dtype)"),
    ),
    triton_launches=(2, 2),
    triton={
        "group_norm_silu_statistics": TritonLimits(registers=118, shared_bytes=33 * 1024, loads_128_bits=True),
        "group_norm_silu_apply": TritonLimits(registers=64, shared_bytes=33 * 1024),
        "group_norm_silu_sums": TritonLimits(registers=128, shared_bytes=65 * 1024),
        "group_norm_silu_gradients": TritonLimits(registers=128, shared_bytes=65 * 1024),
    },
)
