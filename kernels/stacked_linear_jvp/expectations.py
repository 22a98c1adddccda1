"""Expectations of `stacked_linear_jvp`: wrong edits of the reference."""

from kernels.testing.expectations import Expectations

EXPECTATIONS = Expectations(
    wrong_edits=(
        ("torch.stack(biases)", "0 * torch.stack(biases)"),
        ("torch.stack(biases)", "torch.stack(biases).detach()"),
        ("torch.stack(weights)", "torch.stack(weights).detach()"),
        ("torch.stack(weights)", "torch.stack(weights[::-1])"),
        ("layers, stacked.mT", "layers[..., 1:], stacked.mT[:, 1:]"),
        ("x_tangent.expand_as(layers)", "layers.detach()"),
        ("x_tangent.expand_as(layers)", "x_tangent.flip(0).expand_as(layers)"),
        ("x_tangent.expand_as(layers), stacked.detach()", "x_tangent.expand_as(layers), stacked.detach().flip(0)"),
    ),
    rounded_once=False,
)
