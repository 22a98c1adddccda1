"""The two passes over the tokens, for operators: allocation, launch configuration, launch."""

import torch

from kernels.adaln_rms_norm.triton_config import backward_config, chunking, forward_config, vector_config
from kernels.adaln_rms_norm.triton_kernels import modulated_norm_bwd, modulated_norm_fwd, modulation_bwd
from kernels.backends.layout import contiguous, dense_rows
from kernels.backends.triton_launch import architecture, launch

Optional = torch.Tensor | None


def forward_pass(
    x: torch.Tensor,
    branch: Optional,
    gate: Optional,
    bias: Optional,
    weight: torch.Tensor,
    shift: Optional,
    scale: torch.Tensor,
    eps: float,
    y_dtype: torch.dtype,
) -> tuple[Optional, torch.Tensor, torch.Tensor]:
    """x' (None without a branch), y and rsqrt(mean(x'²) + eps) `[B, N]` in float32. One launch."""
    samples, tokens, width = x.shape
    x, branch = contiguous(x), contiguous(branch)
    gate, bias, weight, shift, scale = (dense_rows(vector) for vector in (gate, bias, weight, shift, scale))
    x_new = None if branch is None else torch.empty_like(x)
    y = torch.empty_like(x, dtype=y_dtype)
    rstd = torch.empty(samples, tokens, dtype=torch.float32, device=x.device)
    config = forward_config(width, token_bytes(x, branch), architecture())
    chunks, chunk_tokens = chunking(samples, tokens, config, architecture())
    launch(
        modulated_norm_fwd,
        (samples * chunks,),
        *(x, branch, gate, bias, weight, shift, scale, x_new, y, rstd),
        *(tokens, chunks, chunk_tokens, stride(gate), stride(shift), stride(scale), eps),
        **options(width, config),
    )
    return x_new, y, rstd


def backward_pass(
    dy: torch.Tensor,
    upstream: Optional,
    x_new: torch.Tensor,
    branch: Optional,
    rstd: torch.Tensor,
    gate: Optional,
    bias: Optional,
    weight: torch.Tensor,
    shift: Optional,
    scale: torch.Tensor,
    vectors: bool,
) -> list[torch.Tensor]:
    """The gradients of x, branch, gate, bias, weight, shift, scale: two launches, one where `vectors` is false.

    Empty for an argument that is None, and for the vectors where `vectors` is false.
    """
    samples, tokens, width = x_new.shape
    dy, upstream, x_new, branch = (contiguous(tensor) for tensor in (dy, upstream, x_new, branch))
    gate, bias, weight, scale = (dense_rows(vector) for vector in (gate, bias, weight, scale))
    dx = torch.empty_like(x_new)
    dbranch = None if branch is None else torch.empty_like(branch)
    found = token_bytes(dy, upstream, x_new, branch)
    config = backward_config(width, found, architecture(), bias is not None)
    chunks, chunk_tokens = chunking(samples, tokens, config, architecture())
    sums = None
    if vectors:
        kinds = 2 if branch is None else 4
        sums = torch.empty(samples, chunks, kinds, width, dtype=torch.float32, device=dy.device)
    launch(
        modulated_norm_bwd,
        (samples * chunks,),
        *(dy, upstream, x_new, branch, rstd, gate, weight, scale, dx, dbranch, sums),
        *(tokens, chunks, chunk_tokens, stride(gate), stride(scale)),
        SHIFT=shift is not None,
        BIAS=bias is not None,
        **options(width, config),
    )
    gradients = dx, dbranch, *vector_gradients(sums, gate, bias, weight, shift, scale)
    return [dx.new_empty(0) if gradient is None else gradient for gradient in gradients]


def vector_gradients(
    sums: Optional, gate: Optional, bias: Optional, weight: torch.Tensor, shift: Optional, scale: torch.Tensor
) -> list[Optional]:
    """The gradients of the five vectors from the sums of each chunk `[B, chunks, kinds, D]`. One launch."""
    if sums is None:
        return [None] * 5
    samples, chunks, _, width = sums.shape
    found = [
        None if vector is None else torch.empty(vector.shape, dtype=vector.dtype, device=sums.device)
        for vector in (gate, bias, weight, shift, scale)
    ]
    config = vector_config(samples)
    launch(
        modulation_bwd,
        (-(-width // config.columns),),
        *(sums, gate, bias, weight, scale, *found),
        *(samples, chunks, stride(gate), stride(scale)),
        D=width,
        COLUMNS=config.columns,
        SAMPLES=config.samples,
        num_warps=config.warps,
        maxnreg=config.registers,
    )
    return found


def options(width: int, config) -> dict:
    """The compile-time values and options of a pass."""
    return {
        "D": width,
        "PARTS": config.parts,
        "STAGES": config.stages,
        "num_warps": config.warps,
        "maxnreg": config.registers,
    }


def stride(vector: Optional) -> int:
    return 0 if vector is None else vector.stride(0)


def token_bytes(*tensors: Optional) -> int:
    return sum(tensor.shape[-1] * tensor.element_size() for tensor in tensors if tensor is not None)
