"""The CUDA backend of `gated_residual_adaln_rms_norm`: operators and launch configuration."""

import torch

from kernels.adaln_rms_norm.cuda_impl import LaunchConfig, width_reasons
from kernels.backends.cuda_launch import backends, launch, unsupported_reasons
from kernels.backends.layout import contiguous, dense_rows
from kernels.backends.operators import operator
from kernels.gated_residual_adaln_rms_norm.autograd import register_autograd

#: Gate, weight, scale and shift are read once for each block: with 16 tokens of 8 bytes a column, 6 % of the traffic.
FORWARD = LaunchConfig(tokens_per_block=16)
#: Partial sums cost 24 bytes a column, written and read: with 32 tokens of 12 bytes a column, 6 % of the traffic.
BACKWARD = LaunchConfig(tokens_per_block=32)


@operator("gated_residual_adaln_rms_norm_cuda_fwd")
def gated_residual_adaln_rms_norm_fwd(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor,
    branch_bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    x_new = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty(x.shape, dtype=branch.dtype, device=x.device)
    launch(
        "gated_residual_adaln_rms_norm_fwd",
        x.contiguous(),
        branch.contiguous(),
        dense_rows(gate),
        weight.contiguous(),
        dense_rows(shift),
        dense_rows(scale),
        contiguous(branch_bias),
        x_new,
        y,
        eps,
        FORWARD.tokens_per_block,
    )
    return x_new, y


@operator("gated_residual_adaln_rms_norm_cuda_bwd")
def gated_residual_adaln_rms_norm_bwd(
    x_new: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor,
    branch_bias: torch.Tensor | None,
    d_x_new: torch.Tensor | None,
    d_y: torch.Tensor | None,
    eps: float,
    vector_grads: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, branch, gate, weight, shift, scale, bias; the last five empty unless `vector_grads`."""
    samples, tokens, width = x_new.shape
    d_x = torch.empty(x_new.shape, dtype=x_new.dtype, device=x_new.device)
    d_branch = torch.empty(branch.shape, dtype=branch.dtype, device=x_new.device)
    count, columns = (samples, width) if vector_grads else (0, 0)
    d_gate, d_scale = gate.new_empty((count, width)), scale.new_empty((count, width))
    d_shift = (scale if shift is None else shift).new_empty((count, width))
    d_weight = weight.new_empty(columns)
    d_bias = None if branch_bias is None else branch_bias.new_empty(columns)
    num_sums = 3 if branch_bias is None else 4
    shape = (count, -(-tokens // BACKWARD.tokens_per_block), num_sums, width)
    partials = x_new.new_empty(shape, dtype=torch.float32)
    asked = (partials, d_gate, d_weight, d_shift, d_scale, d_bias) if vector_grads else (None,) * 6
    launch(
        "gated_residual_adaln_rms_norm_bwd",
        x_new.contiguous(),
        branch.contiguous(),
        dense_rows(gate),
        weight.contiguous(),
        dense_rows(scale),
        contiguous(branch_bias),
        contiguous(d_x_new),
        contiguous(d_y),
        d_x,
        d_branch,
        *asked,
        eps,
        BACKWARD.tokens_per_block,
    )
    return d_x, d_branch, d_gate, d_weight, d_shift, d_scale, weight.new_empty(0) if d_bias is None else d_bias


gated_residual_adaln_rms_norm = register_autograd(gated_residual_adaln_rms_norm_fwd, gated_residual_adaln_rms_norm_bwd)


def unsupported(x, branch, gate, weight, shift, scale, eps, *, branch_bias=None):
    return width_reasons(x) + unsupported_reasons(x, branch, gate, weight, shift, scale, branch_bias)


BACKEND, EMULATED = backends(
    gated_residual_adaln_rms_norm,
    unsupported,
    torch_ops=("ldit::gated_residual_adaln_rms_norm_cuda_fwd", "ldit::gated_residual_adaln_rms_norm_cuda_bwd"),
    configs={"forward": FORWARD, "backward": BACKWARD},
)
