"""Attention on the kernels of csrc/rope_attention_*.cu: operators and launch configuration."""

from dataclasses import dataclass

import torch

from kernels.backends.cuda_launch import DTYPES, backends, launch, unsupported_reasons
from kernels.backends.operators import operator
from kernels.rope_attention.autograd import WIDEST, register_autograd, width_reasons

#: Bytes of shared memory that a block may have, by the compute capability of devices that have less than Hopper.
SHARED_LIMITS = {(8, 0): 163 << 10, (8, 6): 99 << 10, (8, 7): 163 << 10, (8, 9): 99 << 10, (12, 0): 99 << 10}
HOPPER_LIMIT = 227 << 10
#: The most rows that a grid has.
MOST_SAMPLES = 65535


@dataclass(frozen=True)
class LaunchConfig:
    """How many rows of a head are in shared memory at a time, and the warps that work on them."""

    queries: int
    keys: int
    warps: int


def up(count: int, step: int) -> int:
    return -(-count // step) * step


def made_for(width: int, size: int) -> bool:
    """Whether there are kernels for just this width, which hold a whole head, in elements of `size` bytes."""
    return size == 2 and width in (64, 72)


def held(width: int, size: int) -> int:
    """Columns of the kernels that serve heads of this width, in elements of `size` bytes: made for it, or with room."""
    if made_for(width, size):
        return width
    return next(columns for columns in (32, 72, WIDEST) if width <= columns)


def widest(size: int) -> int:
    """The widest heads that there are kernels for, in elements of `size` bytes: in float32 those of the models."""
    return WIDEST if size == 2 else 72


def stride(columns: int, size: int) -> int:
    """Bytes from row to row in shared memory: an odd number of 16."""
    return (columns * size // 16 | 1) * 16


def forward(tokens: int, width: int, size: int, limit: int = HOPPER_LIMIT) -> LaunchConfig:
    """Rows for a forward block of four warps, or fewer where there are few tokens.

    In 16 bits, at most 72 wide, a warp takes 32 queries and a fragment of keys or values serves them all: shared memory
    then delivers as fast as tensor cores multiply. Up to 256 tokens are held as a whole, with their queries: tables are
    read once for both. At 72 columns that is 108 KiB: two blocks to a multiprocessor, one loads while the other works.
    """
    columns = held(width, size)
    rows, step = (32 if size == 2 and columns <= 72 else 16), (64 if size == 2 else 32)
    whole = up(tokens, step)
    warps = min(4, -(-tokens // rows))
    if made_for(width, size) and tokens <= 256 and 3 * whole * stride(columns, size) <= limit // 2:
        return LaunchConfig(whole, whole, warps)
    queries = warps * rows
    fits = [keys for keys in (256, 128, 64) if (queries + 2 * keys) * stride(columns, size) <= limit // 2]
    keys = max(fits, default=step)
    return LaunchConfig(queries, min(keys, whole), warps)


def backward(tokens: int, width: int, size: int, limit: int = HOPPER_LIMIT) -> LaunchConfig:
    """Rows for a backward block of up to eight warps, each with the gradients of some keys in registers.

    A kernel made for the width holds the whole head, up to 256 tokens, with the gradients of 128 queries' scores (at 72
    columns 216 KiB), and a warp takes 32 keys. Else keys pass in turns, 16 to a warp, and 64 queries at a time.
    """
    if made_for(width, size) and tokens <= 256:
        whole = LaunchConfig(up(tokens, 32), up(tokens, 32), -(-tokens // 32))
        if backward_bytes(whole, width, size, 128) <= limit:
            return whole
    most = min(8, -(-tokens // 16))
    configs = [LaunchConfig(64, 16 * warps, warps) for warps in range(most, 0, -1)]
    return next(config for config in configs if backward_bytes(config, held(width, size), size, 64) <= limit)


def backward_bytes(config: LaunchConfig, columns: int, size: int, block: int) -> int:
    """Shared memory of a block: four matrices, gradients of scores, two sums for each of the most queries that a kernel
    serves; the norms' weights and the bias, and what each warp sums for their gradients."""
    rows = 2 * (config.keys + config.queries) * stride(columns, size) + config.keys * stride(block, size)
    return rows + 4 * 2 * (256 if block == 128 else 64) + 4 * 5 * columns * (config.warps + 1)


def shared_limit(device: torch.device) -> int:
    if device.type != "cuda":
        return HOPPER_LIMIT
    return SHARED_LIMITS.get(torch.cuda.get_device_capability(device), HOPPER_LIMIT)


@operator("rope_attention_cuda_fwd")
def rope_attention_fwd(
    qkv: torch.Tensor, bias: torch.Tensor | None, table: torch.Tensor | None, q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    samples, tokens, _, heads, width = qkv.shape
    out = qkv.new_empty((samples, tokens, heads * width))
    lse = qkv.new_empty((samples, heads, tokens), dtype=torch.float32)
    config = forward(tokens, width, qkv.element_size(), shared_limit(qkv.device))
    launch(
        "rope_attention_fwd", dense(qkv), bias, table, q_weight, k_weight, out, lse, eps,
        config.queries, config.keys, config.warps,
    )  # fmt: skip
    return out, lse


@operator("rope_attention_cuda_bwd")
def rope_attention_bwd(
    d_out: torch.Tensor, qkv: torch.Tensor, bias: torch.Tensor | None, table: torch.Tensor | None,
    q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, eps: float,
    summed: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    samples, tokens, _, heads, width = qkv.shape
    config = backward(tokens, width, qkv.element_size(), shared_limit(qkv.device))
    d_qkv = qkv.new_empty(qkv.shape)
    summed_there = config.keys < tokens or held(width, qkv.element_size()) > 72
    scratch = lse.new_empty((samples, heads, tokens, width)) if summed_there else None
    d_weights, d_bias, dw_partial, db_partial = (None, None), None, None, None
    if q_weight is not None:
        d_weights = torch.empty_like(q_weight), torch.empty_like(k_weight)
        dw_partial = lse.new_empty((2, samples * heads, width))
    if summed:
        d_bias, db_partial = torch.empty_like(bias), lse.new_empty((samples, 3, heads, width))
    launch(
        "rope_attention_bwd", dense(d_out), dense(qkv), bias, table, q_weight, k_weight, out, lse, d_qkv, scratch,
        dw_partial, db_partial, *d_weights, d_bias, eps, config.queries, config.keys, config.warps,
    )  # fmt: skip
    return d_qkv, *(qkv.new_empty(0) if gradient is None else gradient for gradient in (*d_weights, d_bias))


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous from an address that is a multiple of 16 on, as the kernels for one width want it."""
    begins = tensor.storage_offset() * tensor.element_size() % 16 == 0
    return tensor.contiguous() if begins else tensor.clone(memory_format=torch.contiguous_format)


rope_attention = register_autograd(rope_attention_fwd, rope_attention_bwd)


def unsupported(qkv, cos, sin, q_weight=None, k_weight=None, eps=1e-6, *, bias=None):
    found = unsupported_reasons(qkv, q_weight, k_weight, bias) + width_reasons(qkv, widest(qkv.element_size()))
    return found + [f"{len(qkv)} samples, above {MOST_SAMPLES}"] * (len(qkv) > MOST_SAMPLES)


BACKEND, EMULATED = backends(
    rope_attention,
    unsupported,
    torch_ops=("ldit::rope_attention_cuda_fwd", "ldit::rope_attention_cuda_bwd"),
    configs={
        "forward": forward(256, 72, 2),
        "forward beyond 256": forward(1024, 72, 2),
        "backward": backward(256, 72, 2),
        "backward beyond 256": backward(1024, 72, 2),
    },
    dtypes=DTYPES,
)
