"""The Triton backend of `rope_attention_jvp`: operators, launch configurations. The backward pass is that of
`kernels.rope_attention`."""

import math

import torch

from kernels.backends.layout import contiguous, dense_rows
from kernels.backends.triton_launch import backend, launch, operator
from kernels.rope_attention.autograd import pairs
from kernels.rope_attention.triton_impl import LaunchConfig, cdiv, constants, rope_attention_bwd, runtime_strides
from kernels.rope_attention.triton_impl import unsupported as rope_attention_unsupported
from kernels.rope_attention_jvp.triton_forward import rope_attention_jvp_fwd_kernel

# Each block of queries loads, norms and rotates all keys and their tangents again, which takes about as long as the
# products of 64 queries: so blocks of 128. Compiled for sm_90 at width 72, without spills unless said:
#     queries, keys, warps     registers     shared memory
#     128, 32, 8               193 to 234    60 KB
#     64, 32, 4                217 to 234    40 KB
#     128, 64, 8               255; a QK norm spills 32 bytes
#     64, 64, 4                255, spills 100 bytes
# For sm_80 every shape tried spills: a warp would hold the operands of all six products in registers.
CONFIGS = {"16 bits": LaunchConfig(128, 32, 8), "float32": LaunchConfig(32, 16, 8)}
MIN_CAPABILITY = (9, 0)


def jvp_config(dtype: torch.dtype) -> LaunchConfig:
    return CONFIGS["float32" if dtype == torch.float32 else "16 bits"]


@operator("rope_attention_jvp_fwd")
def rope_attention_jvp_fwd(
    qkv: torch.Tensor,
    qkv_tangent: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out and its tangent `[B, N, H·D]`, and lse `[B, H, N]` as `kernels.rope_attention` keeps it."""
    samples, tokens, _, heads, width = qkv.shape
    out, out_tangent = (qkv.new_empty(samples, tokens, heads * width) for _ in range(2))
    lse = qkv.new_empty(samples, heads, tokens, dtype=torch.float32)
    config = jvp_config(qkv.dtype)
    shared, shared_t = constants(qkv, config), constants(qkv_tangent, config)
    programs = cdiv(tokens, config.queries)
    scale = width**-0.5
    launch(
        rope_attention_jvp_fwd_kernel,
        (programs * heads * samples,),
        *(qkv, qkv_tangent, table, q_weight, k_weight, bias, out, out_tangent, lse),
        *(eps, scale, scale / math.log(2), tokens, programs, *runtime_strides(qkv), *runtime_strides(qkv_tangent)),
        t_stride_n=shared_t["stride_n"],
        **shared | {"ALIGNED": min(shared["ALIGNED"], shared_t["ALIGNED"])},
    )
    return out, out_tangent, lse


def save(ctx, inputs, output) -> None:
    qkv, _, bias, table, q_weight, k_weight, ctx.eps = inputs
    out, tangent, lse = output
    ctx.mark_non_differentiable(tangent, lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, bias, table, q_weight, k_weight, out, lse)


def gradients(ctx, d_out, *_):
    if d_out is None:
        return (None,) * 7
    saved = ctx.saved_tensors  # read once: activation checkpointing allows no more
    normed, summed = saved[3] is not None, ctx.needs_input_grad[2]
    d_qkv, d_q_weight, d_k_weight, d_bias = rope_attention_bwd(dense_rows(d_out), *saved, ctx.eps, summed)
    d_weights = (d_q_weight, d_k_weight) if normed else (None, None)
    return d_qkv, None, d_bias if summed else None, None, *d_weights, None


rope_attention_jvp_fwd.register_autograd(gradients, setup_context=save)


def rope_attention_jvp(qkv, qkv_tangent, cos, sin, q_weight=None, k_weight=None, eps=1e-6, *, bias=None):
    table = None if cos is None else pairs(cos, sin)
    q_weight, k_weight, bias = map(contiguous, (q_weight, k_weight, bias))
    both = dense_rows(qkv), dense_rows(qkv_tangent)
    return rope_attention_jvp_fwd(*both, bias, table, q_weight, k_weight, eps)[:2]


def unsupported(qkv, qkv_tangent, cos, sin, q_weight=None, k_weight=None, eps=1e-6, *, bias=None) -> list[str]:
    return rope_attention_unsupported(qkv, cos, sin, q_weight, k_weight, eps, bias=bias)


BACKEND = backend(
    rope_attention_jvp,
    unsupported,
    torch_ops=("ldit::rope_attention_jvp_fwd", "ldit::rope_attention_bwd"),
    configs=CONFIGS,
    min_capability=MIN_CAPABILITY,
)
