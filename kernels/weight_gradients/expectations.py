"""Expectations of `weight_gradients`: launches, limits of its kernels, wrong edits of the reference."""

from kernels.testing.expectations import Expectations, TritonLimits

EXPECTATIONS = Expectations(
    wrong_edits=(
        ("in pairs)", "in [(d[..., :-1, :], x[..., :-1, :]) for d, x in pairs])"),
        ("in pairs)", "in [*pairs][:1])"),
        ("in pairs)", "in reversed([*pairs]))"),
        ("x.flatten(0, -2))", "x.flatten(0, -2)) / x.flatten(0, -2).shape[0]"),
        ("x.flatten(0, -2))", "x.flatten(0, -2).abs())"),
        ("torch.mm(d_output.flatten(0, -2).t(), x.flatten(0, -2))", "x.flatten(0, -2).t() @ d_output.flatten(0, -2)"),
    ),
    triton_launches=(2, 0),  # the second where sums are cut in parts
    triton={
        "weight_gradients_kernel": TritonLimits(registers=168, shared_bytes=161 * 1024, wgmma=True),
        "weight_gradients_sum_kernel": TritonLimits(registers=40, shared_bytes=2 * 1024, loads_128_bits=True),
    },
    rounded_once=False,
)
