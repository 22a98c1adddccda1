"""Expectations of `stacked_linear`: wrong edits of the reference."""

from kernels.testing.expectations import Expectations

EXPECTATIONS = Expectations(
    wrong_edits=(
        ("torch.stack(biases)", "0 * torch.stack(biases)"),
        ("torch.stack(biases)", "torch.stack(biases).detach()"),
        ("torch.stack(biases)", "torch.stack(biases[::-1])"),
        ("torch.stack(weights)", "torch.stack(weights).detach()"),
        ("torch.stack(weights)", "torch.stack(weights[::-1])"),
        ("layers, torch.stack(weights)", "layers[..., 1:], torch.stack(weights)[..., 1:]"),
        ("x.expand(", "x.flip(0).expand("),
    ),
    rounded_once=False,
)
