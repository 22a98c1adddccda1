"""The CUDA backend of `adaln_rms_norm`: operators and launch configuration of csrc/adaln_rms_norm.cu."""

from dataclasses import dataclass

import torch

from kernels.adaln_rms_norm.autograd import out_dtype_reasons, register_autograd
from kernels.backends.cuda_launch import DTYPES, backends, launch, unsupported_reasons
from kernels.backends.layout import dense_rows
from kernels.backends.operators import operator

MAX_WIDTH = 4096


@dataclass(frozen=True)
class LaunchConfig:
    """Launch configuration: tokens of one sample that a block takes, one after the other."""

    tokens_per_block: int


#: The modulation is read once for each block: with 16 tokens that is a tenth of the traffic, from the L2 cache.
FORWARD = LaunchConfig(tokens_per_block=16)
#: Partial sums cost 8 bytes a column, written and read: with 32 tokens of 6 bytes a column, 8 % of the traffic.
BACKWARD = LaunchConfig(tokens_per_block=32)


@operator("adaln_rms_norm_cuda_fwd")
def adaln_rms_norm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    launch(
        "adaln_rms_norm_fwd",
        x.contiguous(),
        weight.contiguous(),
        dense_rows(shift),
        dense_rows(scale),
        y,
        eps,
        FORWARD.tokens_per_block,
    )
    return y


@operator("adaln_rms_norm_cuda_bwd")
def adaln_rms_norm_bwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor,
    d_y: torch.Tensor,
    eps: float,
    vector_grads: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, weight, shift and scale; the last three empty unless `vector_grads`."""
    samples, tokens, width = x.shape
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    chunks = -(-tokens // BACKWARD.tokens_per_block)
    count = samples if vector_grads else 0
    d_weight = weight.new_empty(width if vector_grads else 0)
    d_scale = scale.new_empty((count, width))
    d_shift = (scale if shift is None else shift).new_empty((count, width))
    partials = x.new_empty((count, chunks, 2, width), dtype=torch.float32)
    asked = (partials, d_weight, d_scale, d_shift) if vector_grads else (None,) * 4
    launch(
        "adaln_rms_norm_bwd",
        x.contiguous(),
        weight.contiguous(),
        dense_rows(scale),
        d_y.contiguous(),
        d_x,
        *asked,
        eps,
        BACKWARD.tokens_per_block,
    )
    return d_x, d_weight, d_shift, d_scale


adaln_rms_norm = register_autograd(adaln_rms_norm_fwd, adaln_rms_norm_bwd)


def width_reasons(x: torch.Tensor) -> list[str]:
    """Why the kernels cannot take rows like these; empty if they can."""
    return [f"width {x.shape[-1]} is above {MAX_WIDTH}"] if x.shape[-1] > MAX_WIDTH else []


def unsupported(x, weight, shift, scale, eps, *, out_dtype=None):
    return width_reasons(x) + unsupported_reasons(x, weight, shift, scale) + out_dtype_reasons(out_dtype, DTYPES)


BACKEND, EMULATED = backends(
    adaln_rms_norm,
    unsupported,
    torch_ops=("ldit::adaln_rms_norm_cuda_fwd", "ldit::adaln_rms_norm_cuda_bwd"),
    configs={"forward": FORWARD, "backward": BACKWARD},
)
