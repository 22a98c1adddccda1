import torch

from kernels.adaln_rms_norm.triton_config import backward_tiling, forward_tiling, vector_tiling
from kernels.adaln_rms_norm.triton_passes import backward_pass, forward_pass
from kernels.arguments import dtype_names
from kernels.triton_launch import DTYPES, backend, operator, refusals


def adaln_rms_norm(x, weight, shift, scale, eps, *, out_dtype=None):
    return adaln_rms_norm_fwd(x, weight, shift, scale, eps, out_dtype or x.dtype)[0]


@operator("adaln_rms_norm_fwd")
def adaln_rms_norm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y, and the reciprocal root mean squares `[B, N]` that the backward pass needs."""
    _, y, rstd = forward_pass(x, None, None, None, weight, shift, scale, eps, out_dtype)
    return y, rstd


@operator("adaln_rms_norm_bwd")
def adaln_rms_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor,
    vectors: bool,
) -> list[torch.Tensor]:
    """The gradients of x and, where `vectors`, of weight, shift if there is one, and scale."""
    found = backward_pass(dy, None, x, None, rstd, None, None, weight, shift, scale, vectors)
    return [gradient for gradient in found if gradient is not None]


def _save(ctx, inputs, output):
    x, weight, shift, scale, _, _ = inputs
    rstd = output[1]
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, rstd, weight, shift, scale)


def _backward(ctx, dy, _):
    if dy is None:
        return (None,) * 6
    shift, vectors = ctx.saved_tensors[3], any(ctx.needs_input_grad[1:4])
    found = iter(adaln_rms_norm_bwd(dy, *ctx.saved_tensors, vectors))
    dx = next(found)
    dweight, dshift, dscale = (next(found) if vectors and there else None for there in (True, shift is not None, True))
    return dx, dweight, dshift, dscale, None, None


adaln_rms_norm_fwd.register_autograd(_backward, setup_context=_save)


def unsupported(x, weight, shift, scale, eps, *, out_dtype=None):
    reasons = refusals(x, weight, shift, scale)
    if out_dtype is not None and out_dtype not in DTYPES:
        reasons.append(f"out_dtype {out_dtype} is none of {dtype_names(DTYPES)}")
    return reasons


BACKEND = backend(
    adaln_rms_norm,
    unsupported,
    torch_ops=("ldit::adaln_rms_norm_fwd", "ldit::adaln_rms_norm_bwd"),
    configs={"forward": forward_tiling, "backward": backward_tiling, "vectors": vector_tiling},
)
