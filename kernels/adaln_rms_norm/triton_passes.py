"""The forward and the backward pass that the operators call: allocation, launch configuration, launches."""

import torch

from kernels.adaln_rms_norm.triton_config import backward_config, chunking, forward_config, vector_config
from kernels.adaln_rms_norm.triton_kernels import modulated_norm_bwd, modulated_norm_fwd, modulation_bwd
from kernels.backends.layout import contiguous, dense_rows
from kernels.backends.triton_launch import architecture, launch

MaybeTensor = torch.Tensor | None


def forward_pass(
    x: torch.Tensor,
    branch: MaybeTensor = None,
    gate: MaybeTensor = None,
    bias: MaybeTensor = None,
    *,
    weight: torch.Tensor,
    shift: MaybeTensor,
    scale: torch.Tensor,
    eps: float,
    y_dtype: torch.dtype,
) -> tuple[MaybeTensor, torch.Tensor, torch.Tensor]:
    """x' (None without a branch), y and rsqrt(mean(x'²) + eps) `[B, N]` in float32. One launch."""
    samples, tokens, width = x.shape
    x, branch = contiguous(x), contiguous(branch)
    gate, bias, shift = (dense_rows(vector) for vector in (gate, bias, shift))
    weight, scale = dense_rows(weight), dense_rows(scale)
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
    x_new: torch.Tensor,
    rstd: torch.Tensor,
    dx_new: MaybeTensor = None,
    branch: MaybeTensor = None,
    gate: MaybeTensor = None,
    bias: MaybeTensor = None,
    *,
    weight: torch.Tensor,
    shift: MaybeTensor,
    scale: torch.Tensor,
    vector_grads: bool,
) -> list[torch.Tensor]:
    """The gradients of x, branch, gate, bias, weight, shift, scale: two launches, one where `vector_grads` is false.

    They are empty for an argument that is None, and for the five vectors where `vector_grads` is false. `dx_new` is the
    upstream gradient of x', `dy` that of y.
    """
    samples, tokens, width = x_new.shape
    dy, dx_new, x_new, branch = contiguous(dy), contiguous(dx_new), contiguous(x_new), contiguous(branch)
    gate, bias, weight, scale = dense_rows(gate), dense_rows(bias), dense_rows(weight), dense_rows(scale)
    dx = torch.empty_like(x_new)
    dbranch = None if branch is None else torch.empty_like(branch)
    bytes_of_token = token_bytes(dy, dx_new, x_new, branch)
    config = backward_config(width, bytes_of_token, architecture(), bias is not None)
    chunks, chunk_tokens = chunking(samples, tokens, config, architecture())
    partials = None
    if vector_grads:
        num_sums = 2 if branch is None else 4
        partials = torch.empty(samples, chunks, num_sums, width, dtype=torch.float32, device=dy.device)
    launch(
        modulated_norm_bwd,
        (samples * chunks,),
        *(dy, dx_new, x_new, branch, rstd, gate, weight, scale, dx, dbranch, partials),
        *(tokens, chunks, chunk_tokens, stride(gate), stride(scale)),
        SHIFT=shift is not None,
        BIAS=bias is not None,
        **options(width, config),
    )
    gradients = dx, dbranch, *vector_gradients(partials, gate, bias, weight, shift, scale)
    return [dx.new_empty(0) if gradient is None else gradient for gradient in gradients]


def vector_gradients(
    partials: MaybeTensor,
    gate: MaybeTensor,
    bias: MaybeTensor,
    weight: torch.Tensor,
    shift: MaybeTensor,
    scale: torch.Tensor,
) -> list[MaybeTensor]:
    """The gradients of the five vectors from the float32 sums of each chunk, `[B, chunks, 2 or 4, D]`. One launch."""
    if partials is None:
        return [None] * 5
    samples, chunks, _, width = partials.shape
    found = [
        None if vector is None else torch.empty(vector.shape, dtype=vector.dtype, device=partials.device)
        for vector in (gate, bias, weight, shift, scale)
    ]
    config = vector_config(samples)
    launch(
        modulation_bwd,
        (-(-width // config.columns),),
        *(partials, gate, bias, weight, scale, *found),
        *(samples, chunks, stride(gate), stride(scale)),
        D=width,
        BLOCK_D=config.columns,
        BLOCK_B=config.samples,
        num_warps=config.warps,
        maxnreg=config.registers,
    )
    return found


def options(width: int, config) -> dict:
    """The compile-time values and options of a pass."""
    return {
        "D": width,
        "BLOCK_D": config.blocks,
        "NUM_STAGES": config.stages,
        "num_warps": config.warps,
        "maxnreg": config.registers,
    }


def stride(vector: MaybeTensor) -> int:
    return 0 if vector is None else vector.stride(0)


def token_bytes(*tensors: MaybeTensor) -> int:
    return sum(tensor.shape[-1] * tensor.element_size() for tensor in tensors if tensor is not None)
