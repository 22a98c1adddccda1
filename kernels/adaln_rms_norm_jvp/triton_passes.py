"""The forward pass that the operators of both forward modes call: allocation, launch configuration, launch."""

from typing import NamedTuple

import torch

from kernels.adaln_rms_norm.triton_config import LaunchConfig, chunking, columns_per_lane, launch_config
from kernels.adaln_rms_norm.triton_passes import options, stride, token_bytes
from kernels.adaln_rms_norm_jvp.triton_kernels import modulated_norm_jvp_fwd
from kernels.backends.layout import contiguous, dense_rows
from kernels.backends.triton_launch import architecture, launch

MaybeTensor = torch.Tensor | None


class Pair(NamedTuple):
    """An argument and its tangent, of one shape and dtype; both may be None."""

    value: MaybeTensor
    tangent: MaybeTensor


NOTHING = Pair(None, None)


def jvp_config(width: int, token_bytes: int, architecture: int) -> LaunchConfig:
    """`token_bytes`: of x, branch and their tangents, for one token.

    A column takes x' and x'_t, and of the vectors gain, shift, gate, their tangents, and bias.
    """
    registers = 8 * columns_per_lane(width) + 72
    return launch_config(width, token_bytes, architecture, registers, programs=5, least_tokens=16)


def jvp_pass(
    x: Pair,
    branch: Pair = NOTHING,
    gate: Pair = NOTHING,
    bias: MaybeTensor = None,
    *,
    weight: torch.Tensor,
    shift: Pair,
    scale: Pair,
    eps: float,
    y_dtype: torch.dtype,
) -> tuple[Pair, Pair, torch.Tensor]:
    """x' (nothing without a branch) and y, each with its tangent, and rsqrt(mean(x'²) + eps) `[B, N]` in float32."""
    x, branch = (Pair(*map(contiguous, pair)) for pair in (x, branch))
    gate, shift, scale = (Pair(*map(dense_rows, pair)) for pair in (gate, shift, scale))
    bias, weight = dense_rows(bias), dense_rows(weight)
    assert x.value is not None
    samples, tokens, width = x.value.shape
    x_new = NOTHING if branch is NOTHING or branch.value is None else Pair(*(torch.empty_like(x.value) for _ in "vt"))
    y = Pair(*(torch.empty_like(x.value, dtype=y_dtype) for _ in "vt"))
    rstd = torch.empty(samples, tokens, dtype=torch.float32, device=x.value.device)
    config = jvp_config(width, token_bytes(*x, *branch), architecture())
    chunks, chunk_tokens = chunking(samples, tokens, config, architecture())
    launch(
        modulated_norm_jvp_fwd,
        (samples * chunks,),
        *(*x, *branch, *gate, bias, weight, *shift, *scale, *x_new, *y, rstd),
        *(tokens, chunks, chunk_tokens, *map(stride, (*gate, *shift, *scale)), eps),
        **options(width, config),
    )
    return x_new, y, rstd
