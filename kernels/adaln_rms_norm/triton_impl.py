"""The Triton backend of `adaln_rms_norm`: operators. Allocation and launches are in triton_passes.py."""

import torch

from kernels.adaln_rms_norm.autograd import out_dtype_reasons, register_autograd
from kernels.adaln_rms_norm.triton_config import backward_config, forward_config, vector_config
from kernels.adaln_rms_norm.triton_passes import backward_pass, forward_pass
from kernels.backends.triton_launch import DTYPES, backend, operator, unsupported_reasons


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
    _, y, rstd = forward_pass(x, weight=weight, shift=shift, scale=scale, eps=eps, y_dtype=out_dtype)
    return y, rstd


@operator("adaln_rms_norm_bwd")
def adaln_rms_norm_bwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor,
    rstd: torch.Tensor,
    d_y: torch.Tensor,
    eps: float,
    vector_grads: bool,
) -> list[torch.Tensor]:
    """The gradients of x, weight, shift and scale, empty where there is none. `eps` is in `rstd` already."""
    d_x, _, _, _, *others = backward_pass(
        d_y, x, rstd, weight=weight, shift=shift, scale=scale, vector_grads=vector_grads
    )
    return [d_x, *others]


adaln_rms_norm = register_autograd(adaln_rms_norm_fwd, adaln_rms_norm_bwd)


def unsupported(x, weight, shift, scale, eps, *, out_dtype=None):
    return unsupported_reasons(x, weight, shift, scale) + out_dtype_reasons(out_dtype, DTYPES)


BACKEND = backend(
    adaln_rms_norm,
    unsupported,
    torch_ops=("ldit::adaln_rms_norm_fwd", "ldit::adaln_rms_norm_bwd"),
    configs={"forward": forward_config, "backward": backward_config, "vectors": vector_config},
)
