"""Expectations of `rope_attention`: launches, limits of its kernels, wrong edits of the reference."""

from kernels.testing.expectations import CudaLimits, Expectations, TritonLimits

EXPECTATIONS = Expectations(
    wrong_edits=(
        ("(-odd, even)", "(odd, -even)"),
        ("(-odd, even)", "(-even, odd)"),
        ("q.shape[-1] ** -0.5", "80 ** -0.5"),
        ("* k_weight", "* q_weight"),
        ("rms_normalize(k, eps)", "rms_normalize(k, 0.0)"),
        ("rms_normalize(q, eps)", "rms_normalize(q, 1e-5)"),
        ("scores.softmax(dim=-1)", "scores.softmax(dim=-2)"),
        ("scores.softmax(dim=-1)", "scores.tril().softmax(dim=-1)"),
        ("scores.softmax(dim=-1)", "(scores.exp() / scores.exp().sum(-1, True))"),
        ("for t in (q, k))", "for t in (q, k.detach()))"),
        ("for t in (q, k))", "for t in (k, q))"),
        ("softmax(dim=-1) @ v", "softmax(dim=-1) @ v.detach()"),
        ("unbind(0)", "flip(0).unbind(0)"),
        ("accumulation_dtype(qkv)", "qkv.dtype"),
        ("cos is not None", "False"),
        ("q_weight is not None", "False"),
        ("qkv.to(acc_dtype) + bias.to(acc_dtype).view(qkv.shape[2:])", "qkv.to(acc_dtype)"),
        ("+ bias.to(acc_dtype).view(qkv.shape[2:])", "- bias.to(acc_dtype).view(qkv.shape[2:])"),
        ("bias.to(acc_dtype).view(qkv.shape[2:])", "bias.detach().to(acc_dtype).view(qkv.shape[2:])"),
        ("view(qkv.shape[2:])", "view(qkv.shape[3], 3, -1).transpose(0, 1)"),
    ),
    triton_launches=(1, 4),  # backward, the third and fourth for the weights of QK norm and for the bias
    triton={
        "rope_attention_fwd_keys_in_smem_kernel": TritonLimits(
            registers=255, shared_bytes=88 * 1024, wgmma=True, loads_128_bits=True
        ),
        "rope_attention_fwd_kernel": TritonLimits(
            registers=255, shared_bytes=48 * 1024, wgmma=True, loads_128_bits=True, float32_spills=336
        ),
        "rope_attention_bwd_dq_kernel": TritonLimits(
            registers=255, shared_bytes=98 * 1024, wgmma=True, loads_128_bits=True, float32_spills=112
        ),
        "rope_attention_bwd_dkdv_kernel": TritonLimits(
            registers=255, shared_bytes=92 * 1024, wgmma=True, loads_128_bits=True, float32_spills=24
        ),
        "rope_attention_bwd_sums_kernel": TritonLimits(registers=40, shared_bytes=256, loads_128_bits=True),
    },
    cuda={
        "rope_attention_fwd": CudaLimits(
            registers=255, shared_bytes=2560, instances_loading_128_bits=12, instances_with_mma=10
        ),
        "rope_attention_bwd": CudaLimits(
            registers=255, shared_bytes=3488, instances_loading_128_bits=12, instances_with_mma=10
        ),
        "column_sums": CudaLimits(registers=32, shared_bytes=1024),
    },
)
