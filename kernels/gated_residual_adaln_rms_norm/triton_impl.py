import torch

from kernels.adaln_rms_norm.triton_config import backward_tiling, forward_tiling, vector_tiling
from kernels.adaln_rms_norm.triton_passes import backward_pass, forward_pass
from kernels.triton_launch import backend, operator, refusals


def gated_residual_adaln_rms_norm(x, branch, gate, weight, shift, scale, eps, *, branch_bias=None):
    x_new, y, _ = gated_residual_adaln_rms_norm_fwd(x, branch, gate, weight, shift, scale, branch_bias, eps)
    return x_new, y


@operator("gated_residual_adaln_rms_norm_fwd")
def gated_residual_adaln_rms_norm_fwd(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x', y, and the reciprocal root mean squares `[B, N]` that the backward pass needs."""
    return forward_pass(x, branch, gate, bias, weight, shift, scale, eps, branch.dtype)


@operator("gated_residual_adaln_rms_norm_bwd")
def gated_residual_adaln_rms_norm_bwd(
    dy: torch.Tensor,
    upstream: torch.Tensor | None,
    x_new: torch.Tensor,
    rstd: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    vectors: bool,
) -> list[torch.Tensor]:
    """The gradients of x, branch and, where `vectors`, of gate, weight, shift, scale, bias: of those that are given."""
    found = backward_pass(dy, upstream, x_new, branch, rstd, gate, bias, weight, shift, scale, vectors)
    dx, dbranch, dgate, dbias, dweight, dshift, dscale = found
    wanted = (dx, dbranch, dgate, dweight, dshift, dscale, dbias)
    return [gradient for gradient in wanted if gradient is not None]


def _save(ctx, inputs, output):
    _, branch, gate, weight, shift, scale, bias, _ = inputs
    x_new, _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_new, rstd, branch, gate, weight, shift, scale, bias)


def _backward(ctx, upstream, dy, _):
    if upstream is None and dy is None:
        return (None,) * 8
    branch, shift, bias = ctx.saved_tensors[2], ctx.saved_tensors[5], ctx.saved_tensors[7]
    if dy is None:  # x' alone was used
        dy = torch.zeros_like(branch)
    vectors = any(ctx.needs_input_grad[2:7])
    found = iter(gated_residual_adaln_rms_norm_bwd(dy, upstream, *ctx.saved_tensors, vectors))
    dx, dbranch = next(found), next(found)
    given = (True, True, shift is not None, True, bias is not None)
    return dx, dbranch, *(next(found) if vectors and there else None for there in given), None


gated_residual_adaln_rms_norm_fwd.register_autograd(_backward, setup_context=_save)


def unsupported(x, branch, gate, weight, shift, scale, eps, *, branch_bias=None):
    return refusals(x, branch, gate, weight, shift, scale, branch_bias)


BACKEND = backend(
    gated_residual_adaln_rms_norm,
    unsupported,
    torch_ops=("ldit::gated_residual_adaln_rms_norm_fwd", "ldit::gated_residual_adaln_rms_norm_bwd"),
    configs={"forward": forward_tiling, "backward": backward_tiling, "vectors": vector_tiling},
)
