"""Softmax attention over a packed projection, with optional RMS norm of queries and keys, then rotary positions.

    rope_attention(qkv, cos, sin, q_weight=None, k_weight=None, eps=1e-6, *, bias=None) → heads side by side

    qkv     = qkv + bias                                            if it is given
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    q, k    = rms_norm(q) · q_weight, rms_norm(k) · k_weight        if the weights are given; over d, for each head
    q, k    = apply_rope(q), apply_rope(k)                          if the tables are given
    apply_rope: (u[2i], u[2i+1]) → (u[2i]·cos[2i] − u[2i+1]·sin[2i],  u[2i+1]·cos[2i+1] + u[2i]·sin[2i+1])
    out     = softmax(q · kᵀ / sqrt(d)) · v                         within a head

Args:
    qkv: `[B, N, 3, heads, d]`, float64, float32, float16 or bfloat16. Backends serve N from 1 to 1024 at least.
    cos, sin: `[N, d]`, float32 (or float64), both or neither. The values of a pair of neighbours are equal.
    q_weight, k_weight: `[d]`, any of these dtypes, both or neither.
    eps: positive, inside the root of the RMS norms; unused without them.
    bias: `[3·heads·d]`, any of these dtypes: that of the projection before, which then has none. Its gradient, the sum
        of that of `qkv` over samples and tokens, is summed before that is rounded and reads nothing again.

Returns:
    `[B, N, heads·d]` in the dtype of `qkv`. Norms, rotation, softmax and reductions are float32 (float64 for float64
    input); the reference also multiplies in it.

Gradients flow to `qkv`, `q_weight`, `k_weight` and `bias`; the tables are constants.

Raises:
    ValueError: a shape, dtype or device that does not fit, an empty `qkv`, an odd d with tables, one table or one
        weight without the other, or `eps` ≤ 0.

Rotary embedding is arXiv 2104.09864, in the interleaved form; the tables decide what a position is (two-dimensional in
LightningDiT, arXiv 2501.01423).
"""

import torch

from kernels.arguments import check_device, check_dtype, check_eps, check_rank, check_shape, refuse
from kernels.registry import Op

TABLES = frozenset({torch.float32, torch.float64})


def check(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    bias: torch.Tensor | None = None,
) -> None:
    check_arguments(NAME, qkv, cos, sin, q_weight, k_weight, eps, bias)


def check_arguments(
    op: str,
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    bias: torch.Tensor | None,
) -> None:
    """`check`, for any op that takes these."""
    check_rank(op, "qkv", qkv, "B, N, 3, heads, d")
    _, tokens, three, heads, width = qkv.shape
    if three != 3:
        refuse(op, "shape of qkv", tuple(qkv.shape), "[B, N, 3, heads, d]")
    check_dtype(op, "qkv", qkv)
    _check_pair(op, "cos", cos, "sin", sin)
    if cos is not None and sin is not None:
        if width % 2:
            refuse(op, "d, the last dimension of qkv,", width, "an even number, where cos and sin are given")
        for argument, table in (("cos", cos), ("sin", sin)):
            check_shape(op, argument, table, (tokens, width), "N, d")
            check_dtype(op, argument, table, TABLES)
    _check_pair(op, "q_weight", q_weight, "k_weight", k_weight)
    if q_weight is not None and k_weight is not None:
        for argument, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
            check_shape(op, argument, weight, (width,), "d")
            check_dtype(op, argument, weight)
    if bias is not None:
        check_shape(op, "bias", bias, (3 * heads * width,), "3·heads·d")
        check_dtype(op, "bias", bias)
    check_device(op, qkv, cos=cos, sin=sin, q_weight=q_weight, k_weight=k_weight, bias=bias)
    check_eps(op, eps)


def _check_pair(op: str, first: str, a: torch.Tensor | None, second: str, b: torch.Tensor | None) -> None:
    if (a is None) != (b is None):
        missing, given = (first, second) if a is None else (second, first)
        refuse(op, missing, None, f"a tensor, as {given} is one; or None for both")


NAME = "rope_attention"
OP = Op(
    NAME,
    check,
    differentiable=("qkv", "q_weight", "k_weight", "bias"),
    # CUDA is 1.05 × as fast as Triton forward and 1.22 × backward: XL in bfloat16 on an H200 (bench/results).
    order=("cuda", "triton", "reference"),
    save_when_checkpointing=True,
)
