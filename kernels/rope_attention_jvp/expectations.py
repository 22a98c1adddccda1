"""Expectations of `rope_attention_jvp`: launches, limits of its kernels, wrong edits of the reference."""

from kernels.rope_attention.expectations import EXPECTATIONS as PRIMAL
from kernels.testing.expectations import Expectations, TritonLimits

EXPECTATIONS = Expectations(
    wrong_edits=(
        ("scale = q.shape[-1] ** -0.5", "scale = 80 ** -0.5"),
        ("k_weight.to(acc_dtype)", "q_weight.to(acc_dtype)"),
        ("rms_norm_jvp(k, k_t, k_weight.to(acc_dtype), eps)", "rms_norm_jvp(k, k_t, k_weight.to(acc_dtype), 0.0)"),
        ("for t in (q, k, q_t, k_t))", "for t in (q, k.detach(), q_t, k_t))"),
        ("for t in (q, k, q_t, k_t))", "for t in (q, k, k_t, q_t))"),
        ("softmax(dim=-1)", "softmax(dim=-2)"),
        ("out = p @ v", "out = p @ v.detach()"),
        ("accumulation_dtype(qkv)", "qkv.dtype"),
        ("cos is not None", "False"),
        ("q_weight is not None", "False"),
        ("qkv.to(acc_dtype) + bias.to(acc_dtype).view(qkv.shape[2:])", "qkv.to(acc_dtype)"),
        ("bias.to(acc_dtype).view(qkv.shape[2:])", "bias.detach().to(acc_dtype).view(qkv.shape[2:])"),
        ("(q_t * scale) @ k.transpose(-1, -2) + ", ""),
        (" + (q * scale) @ k_t.transpose(-1, -2)", ""),
        ("(q_t * scale)", "q_t"),
        (" - (p * scores_t).sum(dim=-1, keepdim=True)", ""),
        ("(p * scores_t).sum(dim=-1, keepdim=True)", "scores_t.mean(dim=-1, keepdim=True)"),
        ("p_t @ v + ", ""),
        (" + p @ v_t", ""),
        (" - x_hat * (x_hat * x_t).mean(dim=-1, keepdim=True)", ""),
        ("x_hat_t = r * (", "x_hat_t = ("),
        ("y_t = x_hat_t * weight", "y_t = x_hat_t"),
    ),
    triton_launches=(1, 4),
    triton={
        "rope_attention_jvp_fwd_kernel": TritonLimits(
            registers=255, shared_bytes=96 * 1024, wgmma=True, loads_128_bits=True
        ),
        **{name: limits for name, limits in PRIMAL.triton.items() if "bwd" in name},
    },
)
