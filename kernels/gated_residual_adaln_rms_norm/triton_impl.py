"""The gated residual and its norm in Triton; see kernels/adaln_rms_norm/triton_passes.py for the launches."""

import torch

from kernels.adaln_rms_norm.triton_config import backward_config, forward_config, vector_config
from kernels.adaln_rms_norm.triton_passes import backward_pass, forward_pass
from kernels.backends.triton_launch import backend, operator, unsupported_reasons
from kernels.gated_residual_adaln_rms_norm.autograd import register_autograd


@operator("gated_residual_adaln_rms_norm_fwd")
def gated_residual_adaln_rms_norm_fwd(
    x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor | None,
    scale: torch.Tensor, branch_bias: torch.Tensor | None, eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """x', y, and the reciprocal root mean squares `[B, N]` that the backward pass needs."""
    return forward_pass(x, branch, gate, branch_bias, weight, shift, scale, eps, branch.dtype)


@operator("gated_residual_adaln_rms_norm_bwd")
def gated_residual_adaln_rms_norm_bwd(
    x_new: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor | None,
    scale: torch.Tensor, branch_bias: torch.Tensor | None, rstd: torch.Tensor, d_x_new: torch.Tensor | None,
    d_y: torch.Tensor | None, eps: float, vectors: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """The gradients of x, branch, gate, weight, shift, scale and bias, empty where there is none.

    `eps` is in `rstd` already.
    """
    d_y = torch.zeros_like(branch) if d_y is None else d_y  # x' alone was used
    d_x, d_branch, d_gate, d_bias, *others = backward_pass(
        d_y, d_x_new, x_new, branch, rstd, gate, branch_bias, weight, shift, scale, vectors
    )
    return [d_x, d_branch, d_gate, *others, d_bias]


gated_residual_adaln_rms_norm = register_autograd(gated_residual_adaln_rms_norm_fwd, gated_residual_adaln_rms_norm_bwd)


def unsupported(x, branch, gate, weight, shift, scale, eps, *, branch_bias=None):
    return unsupported_reasons(x, branch, gate, weight, shift, scale, branch_bias)


BACKEND = backend(
    gated_residual_adaln_rms_norm,
    unsupported,
    torch_ops=("ldit::gated_residual_adaln_rms_norm_fwd", "ldit::gated_residual_adaln_rms_norm_bwd"),
    configs={"forward": forward_config, "backward": backward_config, "vectors": vector_config},
)
