"""Softmax attention over a packed projection with its tangent, in one pass over the keys.

    rope_attention_jvp(qkv, qkv_tangent, cos, sin, q_weight=None, k_weight=None, eps=1e-6, *, bias=None)
        → (out, out_tangent)

With q, k, v as `kernels.rope_attention` multiplies them, q_t, k_t, v_t their tangents (after norm and rotation, which
the bias does not change but for the norm), S = q·kᵀ/sqrt(d), P = softmax(S) and S_t = (q_t·kᵀ + q·k_tᵀ)/sqrt(d):

    out   = P·v
    out_t = (P ∘ (S_t − rowsum(P ∘ S_t)))·v + P·v_t

Args:
    qkv, cos, sin, q_weight, k_weight, eps, bias: as `kernels.rope_attention` takes them. Only `qkv` has a tangent.
    qkv_tangent: as `qkv`.

Returns:
    `out` and `out_tangent`, `[B, N, heads·d]` each, in the dtype of `qkv`. Norms, rotation, softmax and reductions are
    float32 (float64 for float64 input); the reference also multiplies in it.

Gradients flow to `qkv`, `q_weight`, `k_weight` and `bias` through `out` alone: the tangent is a constant to autograd.

Raises:
    ValueError: as `kernels.rope_attention`, and for a tangent that is not like its argument.

The derivative of the softmax with an online maximum, as in FlashAttention (arXiv 2205.14135), is that of sCM
(arXiv 2410.11081, appendix on the Jacobian-vector product of flash attention); rotation and norm are linear in what
follows them, and differentiated here before the products.
"""

import torch

from kernels.arguments import check_tangent
from kernels.registry import Op
from kernels.rope_attention import check_arguments


def check(
    qkv: torch.Tensor,
    qkv_tangent: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    bias: torch.Tensor | None = None,
) -> None:
    check_arguments(NAME, qkv, cos, sin, q_weight, k_weight, eps, bias)
    check_tangent(NAME, "qkv", qkv, qkv_tangent)


NAME = "rope_attention_jvp"
OP = Op(
    NAME,
    check,
    differentiable=("qkv", "q_weight", "k_weight", "bias"),
    save_when_checkpointing=True,
    forward_mode_of="rope_attention",
)
