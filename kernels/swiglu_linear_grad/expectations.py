"""Expectations of `swiglu_linear_grad`: launches, limits of its kernels, wrong edits of the reference."""

from kernels.testing.expectations import Expectations, TritonLimits

EXPECTATIONS = Expectations(
    wrong_edits=(
        ("upcast + bias.to(dtype)", "upcast"),
        ("1 + gate * (1 - sigmoid)", "1 + gate"),
        ("sigmoid * (1 + gate * (1 - sigmoid))", "1 + gate * (1 - sigmoid)"),
        ("d_activated * (gate * sigmoid)", "d_activated * gate"),
        ("[d_gate, d_activated * (gate * sigmoid)]", "[d_activated * (gate * sigmoid), d_gate]"),
        ("torch.matmul(d_output, weight)", "torch.matmul(d_output[..., 1:], weight[1:])"),
        (".sum(0)", ".mean(0)"),
        ("d_gate_up.flatten(0, -2).sum(0)", "d_gate_up.flatten(0, -2)[1:].sum(0)"),
        (".sum(0).to(bias.dtype)", ".sum(0)"),
    ),
    triton_launches=(2, 0),  # the second for the bias
    triton={
        "swiglu_linear_grad_kernel": TritonLimits(registers=255, shared_bytes=225 * 1024, wgmma=True),
        "swiglu_sum_kernel": TritonLimits(registers=40, shared_bytes=512),
    },
    rounded_once=False,
)
