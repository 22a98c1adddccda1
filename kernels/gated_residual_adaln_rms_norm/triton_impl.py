"""The Triton backend of `gated_residual_adaln_rms_norm`: operators. The kernels are those of `adaln_rms_norm`."""

import torch

from kernels.adaln_rms_norm.triton_config import backward_config, forward_config, vector_config
from kernels.adaln_rms_norm.triton_passes import backward_pass, forward_pass
from kernels.backends.triton_launch import backend, operator, unsupported_reasons
from kernels.gated_residual_adaln_rms_norm.autograd import register_autograd


@operator("gated_residual_adaln_rms_norm_fwd")
def gated_residual_adaln_rms_norm_fwd(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor,
    branch_bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x', y, and the reciprocal root mean squares `[B, N]` that the backward pass needs."""
    x_new, y, rstd = forward_pass(
        x, branch, gate, branch_bias, weight=weight, shift=shift, scale=scale, eps=eps, y_dtype=branch.dtype
    )
    assert x_new is not None
    return x_new, y, rstd


@operator("gated_residual_adaln_rms_norm_bwd")
def gated_residual_adaln_rms_norm_bwd(
    x_new: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor,
    branch_bias: torch.Tensor | None,
    rstd: torch.Tensor,
    d_x_new: torch.Tensor | None,
    d_y: torch.Tensor | None,
    eps: float,
    vector_grads: bool,
) -> list[torch.Tensor]:
    """The gradients of x, branch, gate, weight, shift, scale and bias, empty where there is none.

    `eps` is in `rstd` already.
    """
    d_y = torch.zeros_like(branch) if d_y is None else d_y  # x' alone was used
    d_x, d_branch, d_gate, d_bias, *others = backward_pass(
        d_y,
        x_new,
        rstd,
        d_x_new,
        branch,
        gate,
        branch_bias,
        weight=weight,
        shift=shift,
        scale=scale,
        vector_grads=vector_grads,
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
