"""The CUDA backend of `rope_attention`, on csrc/rope_attention/: operators and launch configurations."""

from dataclasses import dataclass

import torch

from kernels.backends.cuda_launch import DTYPES, backends, launch, unsupported_reasons
from kernels.backends.operators import operator
from kernels.rope_attention.autograd import MAX_WIDTH, register_autograd, width_reasons

#: Bytes of shared memory that a block may have, by the compute capability of devices that have less than Hopper.
SHARED_LIMITS = {(8, 0): 163 << 10, (8, 6): 99 << 10, (8, 7): 163 << 10, (8, 9): 99 << 10, (12, 0): 99 << 10}
HOPPER_LIMIT = 227 << 10
#: Rows that a grid has at most.
MAX_SAMPLES = 65535


@dataclass(frozen=True)
class LaunchConfig:
    """Rows of a head in shared memory at a time, and warps of a block."""

    queries: int
    keys: int
    warps: int


def round_up(count: int, step: int) -> int:
    return -(-count // step) * step


def has_own_kernel(width: int, itemsize: int) -> bool:
    """Whether there are kernels for just this width, which may hold a head in shared memory."""
    return itemsize == 2 and width in (64, 72)


def kernel_width(width: int, itemsize: int) -> int:
    """Columns of the kernels that serve heads of this width: as many, or more."""
    if has_own_kernel(width, itemsize):
        return width
    return next(columns for columns in (32, 72, MAX_WIDTH) if width <= columns)


def max_width(itemsize: int) -> int:
    """The widest heads that there are kernels for: in float32 those of the models."""
    return MAX_WIDTH if itemsize == 2 else 72


def smem_row_bytes(columns: int, itemsize: int) -> int:
    """Bytes from row to row in shared memory: an odd multiple of 16, so that rows begin in different banks."""
    return (columns * itemsize // 16 | 1) * 16


def forward_config(tokens: int, width: int, itemsize: int, limit: int = HOPPER_LIMIT) -> LaunchConfig:
    """Rows for a forward block of four warps, or fewer where there are few tokens.

    In 16 bits, at most 72 wide, a warp takes 32 queries and a fragment of keys or values serves them all: shared memory
    then delivers as fast as tensor cores multiply. Up to 256 tokens the head is in shared memory, queries too: tables
    are read once for both. At 72 columns that is 108 KiB: two blocks an SM, one loads while the other computes.
    """
    columns = kernel_width(width, itemsize)
    rows, step = (32 if itemsize == 2 and columns <= 72 else 16), (64 if itemsize == 2 else 32)
    padded = round_up(tokens, step)
    warps = min(4, -(-tokens // rows))
    row_bytes = smem_row_bytes(columns, itemsize)
    if has_own_kernel(width, itemsize) and tokens <= 256 and 3 * padded * row_bytes <= limit // 2:
        return LaunchConfig(padded, padded, warps)
    queries = warps * rows
    fits = [keys for keys in (256, 128, 64) if (queries + 2 * keys) * row_bytes <= limit // 2]
    return LaunchConfig(queries, min(max(fits, default=step), padded), warps)


def backward_config(tokens: int, width: int, itemsize: int, limit: int = HOPPER_LIMIT) -> LaunchConfig:
    """Rows for a backward block of up to eight warps, each with the gradients of some keys in registers.

    A kernel for just this width has the head in shared memory, up to 256 tokens, with the gradients of 128 queries'
    scores (at 72 columns 216 KiB), and a warp takes 32 keys. Else keys stream, 16 a warp, and 64 queries at a time.
    """
    if has_own_kernel(width, itemsize) and tokens <= 256:
        head_in_smem = LaunchConfig(round_up(tokens, 32), round_up(tokens, 32), -(-tokens // 32))
        if backward_bytes(head_in_smem, width, itemsize, 128) <= limit:
            return head_in_smem
    columns, max_warps = kernel_width(width, itemsize), min(8, -(-tokens // 16))
    configs = [LaunchConfig(64, 16 * warps, warps) for warps in range(max_warps, 0, -1)]
    return next(config for config in configs if backward_bytes(config, columns, itemsize, 64) <= limit)


def backward_bytes(config: LaunchConfig, columns: int, itemsize: int, block: int) -> int:
    """Shared memory of a block.

    q, k, v and dO; dS, `block` queries wide; lse and delta of the most queries that a kernel serves; the norms' weights
    and the bias, and what each warp sums for their gradients.
    """
    row_bytes = smem_row_bytes(columns, itemsize)
    rows = 2 * (config.keys + config.queries) * row_bytes + config.keys * smem_row_bytes(block, itemsize)
    return rows + 4 * 2 * (256 if block == 128 else 64) + 4 * 5 * columns * (config.warps + 1)


def shared_limit(device: torch.device) -> int:
    if device.type != "cuda":
        return HOPPER_LIMIT
    return SHARED_LIMITS.get(torch.cuda.get_device_capability(device), HOPPER_LIMIT)


@operator("rope_attention_cuda_fwd")
def rope_attention_fwd(
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    samples, tokens, _, heads, width = qkv.shape
    out = qkv.new_empty((samples, tokens, heads * width))
    lse = qkv.new_empty((samples, heads, tokens), dtype=torch.float32)
    config = forward_config(tokens, width, qkv.element_size(), shared_limit(qkv.device))
    launch(
        "rope_attention_fwd",
        *(aligned(qkv), bias, table, q_weight, k_weight, out, lse, eps),
        *(config.queries, config.keys, config.warps),
    )
    return out, lse


@operator("rope_attention_cuda_bwd")
def rope_attention_bwd(
    d_out: torch.Tensor,
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    eps: float,
    summed: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    samples, tokens, _, heads, width = qkv.shape
    config = backward_config(tokens, width, qkv.element_size(), shared_limit(qkv.device))
    d_qkv = qkv.new_empty(qkv.shape)
    dq_in_memory = config.keys < tokens or kernel_width(width, qkv.element_size()) > 72  # summed over blocks of keys
    scratch = lse.new_empty((samples, heads, tokens, width)) if dq_in_memory else None
    dq_weight = dk_weight = d_bias = dw_partial = db_partial = None
    if q_weight is not None and k_weight is not None:
        dq_weight, dk_weight = torch.empty_like(q_weight), torch.empty_like(k_weight)
        dw_partial = lse.new_empty((2, samples * heads, width))
    if summed and bias is not None:
        d_bias, db_partial = torch.empty_like(bias), lse.new_empty((samples, 3, heads, width))
    launch(
        "rope_attention_bwd",
        *(aligned(d_out), aligned(qkv), bias, table, q_weight, k_weight, out, lse, d_qkv, scratch),
        *(dw_partial, db_partial, dq_weight, dk_weight, d_bias, eps),
        *(config.queries, config.keys, config.warps),
    )
    dq_weight, dk_weight, d_bias = (qkv.new_empty(0) if d is None else d for d in (dq_weight, dk_weight, d_bias))
    return d_qkv, dq_weight, dk_weight, d_bias


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous from an address that is a multiple of 16 on, as the kernels for one width want it."""
    is_aligned = tensor.storage_offset() * tensor.element_size() % 16 == 0
    return tensor.contiguous() if is_aligned else tensor.clone(memory_format=torch.contiguous_format)


rope_attention = register_autograd(rope_attention_fwd, rope_attention_bwd)


def unsupported(qkv, cos, sin, q_weight=None, k_weight=None, eps=1e-6, *, bias=None):
    found = unsupported_reasons(qkv, q_weight, k_weight, bias) + width_reasons(qkv, max_width(qkv.element_size()))
    return found + [f"{len(qkv)} samples, above {MAX_SAMPLES}"] * (len(qkv) > MAX_SAMPLES)


BACKEND, EMULATED = backends(
    rope_attention,
    unsupported,
    torch_ops=("ldit::rope_attention_cuda_fwd", "ldit::rope_attention_cuda_bwd"),
    configs={
        "forward": forward_config(256, 72, 2),
        "forward beyond 256": forward_config(1024, 72, 2),
        "backward": backward_config(256, 72, 2),
        "backward beyond 256": backward_config(1024, 72, 2),
    },
    dtypes=DTYPES,
)
