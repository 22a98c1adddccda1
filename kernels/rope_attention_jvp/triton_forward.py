"""The kernel of `rope_attention_jvp`. Letters and shapes: see `kernels.rope_attention.triton_common`.

    S   = q · kᵀ / sqrt(D)                     P     = softmax(S)     out = P · v     lse = log2 Σ exp(S)
    S_t = (q_t · kᵀ + q · k_tᵀ) / sqrt(D)      out_t = (P ∘ (S_t − rowsum(P ∘ S_t))) · v + P · v_t

A name that ends in `_t` is the tangent of the one before. S_t is taken less a number for each row, `center`: its mean
in the first block of keys. That changes nothing in the sums above, as P_t sums to 0, and makes P ∘ (S_t − center) small
where it is rounded for the tensor cores.
"""

import triton
import triton.language as tl

from kernels.rope_attention.triton_common import (
    apply_rope_rows,
    dot_acc,
    dot_nt,
    load_biased,
    load_rows,
    load_vector,
    mask_scores,
    program_coordinates,
    qkv_pointers,
    rstd,
    store_rows,
    zeros,
)
from kernels.rope_attention.triton_forward import store_out


@triton.jit
def load_qk_jvp(
    ptr, t_ptr, stride_n, t_stride_n, remaining, table_ptr, weight_ptr, bias_ptr, eps,
    R: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Load queries or keys and their tangents, [R, D] each, as the products take them.

    x is rope(rms_norm(x + bias) · weight); a step whose pointer is None is left out. With x̂ = (x + bias)·r, the norm's
    tangent is r·(x_t − x̂·mean(x̂·x_t))·weight. Computed in float32 and rounded once, to the dtype of `ptr`.
    """
    main, rest = load_biased(  # [R, D]
        ptr, stride_n, remaining, bias_ptr, R=R, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED
    )
    main_t, rest_t = load_biased(  # [R, D]
        t_ptr, t_stride_n, remaining, None, R=R, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED
    )
    if weight_ptr is not None:
        r = rstd((main, rest), eps, D, REST)  # [R, 1]
        main *= r  # [R, MAIN]
        dot = tl.sum(main * main_t, axis=1)  # [R]
        if REST:
            rest *= r  # [R, REST]
            dot += tl.sum(rest * rest_t, axis=1)  # [R]
        mean = (dot / D)[:, None]  # [R, 1]
        weight = load_vector(weight_ptr, 0, MAIN, D)  # [1, MAIN]
        main_t = (main_t - main * mean) * r * weight  # [R, MAIN]
        main *= weight  # [R, MAIN]
        if REST:
            weight = load_vector(weight_ptr, MAIN, REST, D)  # [1, REST]
            rest_t = (rest_t - rest * mean) * r * weight  # [R, REST]
            rest *= weight  # [R, REST]
    if table_ptr is not None:
        main, rest = apply_rope_rows(  # [R, D]
            (main, rest), table_ptr, remaining, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED, INVERSE=False
        )
        main_t, rest_t = apply_rope_rows(  # [R, D]
            (main_t, rest_t), table_ptr, remaining, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED, INVERSE=False
        )
    dtype: tl.constexpr = ptr.dtype.element_ty
    return (main.to(dtype), rest.to(dtype)), (main_t.to(dtype), rest_t.to(dtype))  # [R, D] both


@triton.jit
def online_softmax_jvp_update(
    q, q_t, k, k_t, v, v_t, row_max, row_sum, row_dot, center, acc, acc_t, first, remaining, scale, scale_log2,
    REST: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Add one block of keys, of which `remaining` exist; at least one, so that row_max is finite.

    With m the maximum of S · log2(e) so far, m' the one that includes this block, p = 2^(S · log2(e) − m'),
    w = p ∘ (S_t − center) and α = 2^(m − m'):

        row_sum ← row_sum · α + Σ p    row_dot ← row_dot · α + Σ w    acc ← acc · α + p · v
        acc_t ← acc_t · α + w · v + p · v_t

    Args:
        q, q_t [BQ, D], k, k_t, v, v_t [BK, D]; row_max, row_sum, row_dot, center [BQ], acc, acc_t [BQ, D] float32.
        first: whether this is the first block, whose mean of S_t becomes `center`.
    """
    scores = dot_nt(q, k, REST)  # [BQ, BK]
    if RAGGED:
        scores = mask_scores(scores, remaining)  # [BQ, BK]
    scores_t = tl.dot(q_t[0], tl.trans(k[0]), input_precision="ieee")  # [BQ, BK]
    scores_t = tl.dot(q[0], tl.trans(k_t[0]), scores_t, input_precision="ieee")  # [BQ, BK]
    if REST:
        scores_t = tl.dot(q_t[1], tl.trans(k[1]), scores_t, input_precision="ieee")  # [BQ, BK]
        scores_t = tl.dot(q[1], tl.trans(k_t[1]), scores_t, input_precision="ieee")  # [BQ, BK]
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale_log2)  # [BQ]
    p = tl.exp2(scores * scale_log2 - new_max[:, None])  # [BQ, BK]
    rescale = tl.exp2(row_max - new_max)  # [BQ]
    block_sum = tl.sum(p, axis=1)  # [BQ]
    block_dot = tl.sum(p * scores_t, axis=1) * scale  # [BQ]
    if first:
        center = block_dot / block_sum  # [BQ]
    w = p * (scores_t * scale - center[:, None])  # [BQ, BK]
    row_sum = row_sum * rescale + block_sum  # [BQ]
    row_dot = row_dot * rescale + block_dot - center * block_sum  # [BQ]
    acc = acc[0] * rescale[:, None], acc[1] * rescale[:, None]  # [BQ, D]
    acc_t = acc_t[0] * rescale[:, None], acc_t[1] * rescale[:, None]  # [BQ, D]
    p = p.to(v[0].dtype)  # [BQ, BK]
    acc = dot_acc(p, v, acc, REST)  # [BQ, D]
    acc_t = dot_acc(p, v_t, acc_t, REST)  # [BQ, D]
    acc_t = dot_acc(w.to(v[0].dtype), v, acc_t, REST)  # [BQ, D]
    return new_max, row_sum, row_dot, center, acc, acc_t


@triton.jit(do_not_specialize=["N", "programs"])
def rope_attention_jvp_fwd_kernel(
    qkv_ptr, qkv_t_ptr, table_ptr, q_weight_ptr, k_weight_ptr, bias_ptr, out_ptr, out_t_ptr, lse_ptr,
    eps, scale, scale_log2, N, programs, stride_b, stride_3, stride_h, t_stride_b, t_stride_3, t_stride_h,
    stride_n: tl.constexpr, t_stride_n: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Each program: one block of BQ queries of a head, while its keys and values stream by in blocks of BK.

    Args:
        qkv_ptr, qkv_t_ptr [B, N, 3, H, D]; table_ptr [N, D / 2, 2] float32, cos and sin of each pair; q_weight_ptr,
        k_weight_ptr [D]; bias_ptr [3, H, D]; out_ptr, out_t_ptr [B, N, H, D]; lse_ptr [B, H, N] float32. Table, weights
        and bias may be None.
    """
    pid, head, sample = program_coordinates(programs, H)
    q_row, q_remaining = pid.to(tl.int64) * BQ, N - pid * BQ
    q_ptr, k_ptr, v_ptr = qkv_pointers(
        qkv_ptr, sample=sample, head=head, stride_b=stride_b, stride_3=stride_3, stride_h=stride_h, ALIGNED=ALIGNED
    )
    q_t_ptr, k_t_ptr, v_t_ptr = qkv_pointers(
        qkv_t_ptr, sample=sample, head=head, stride_b=t_stride_b, stride_3=t_stride_3, stride_h=t_stride_h,
        ALIGNED=ALIGNED,
    )  # fmt: skip
    ROW: tl.constexpr = H * D
    q_bias_ptr = bias_ptr + head * D if bias_ptr is not None else None
    k_bias_ptr = q_bias_ptr + ROW if bias_ptr is not None else None
    v_bias_ptr = q_bias_ptr + 2 * ROW if bias_ptr is not None else None
    start_of_out = (sample * N + q_row) * ROW + head * D
    lse_ptr += (sample * H + head) * N + q_row

    q_table_ptr = table_ptr + q_row * D if table_ptr is not None else None
    q, q_t = load_qk_jvp(  # [BQ, D] both
        q_ptr + q_row * stride_n, q_t_ptr + q_row * t_stride_n, stride_n, t_stride_n, q_remaining, q_table_ptr,
        q_weight_ptr, q_bias_ptr, eps, R=BQ, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_Q,
    )  # fmt: skip
    acc, acc_t = zeros(BQ, MAIN, REST), zeros(BQ, MAIN, REST)  # [BQ, D] both
    row_max = tl.full((BQ,), float("-inf"), tl.float32)  # [BQ]
    row_sum = tl.zeros((BQ,), tl.float32)  # [BQ]
    row_dot, center = row_sum, row_sum  # [BQ] both
    for start in range(0, N, BK):
        k_row = tl.cast(start, tl.int64)
        tl.debug_barrier()  # else keys are loaded before the last ones are done with, and registers spill
        k_table_ptr = table_ptr + k_row * D if table_ptr is not None else None
        k, k_t = load_qk_jvp(  # [BK, D] both
            k_ptr + k_row * stride_n, k_t_ptr + k_row * t_stride_n, stride_n, t_stride_n, N - start, k_table_ptr,
            k_weight_ptr, k_bias_ptr, eps, R=BK, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_K,
        )  # fmt: skip
        v = load_rows(  # [BK, D]
            v_ptr + k_row * stride_n, stride_n, N - start, R=BK, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_K
        )
        v_t = load_rows(  # [BK, D]
            v_t_ptr + k_row * t_stride_n, t_stride_n, N - start, R=BK, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_K
        )
        row_max, row_sum, row_dot, center, acc, acc_t = online_softmax_jvp_update(
            q, q_t, k=k, k_t=k_t, v=v, v_t=v_t, row_max=row_max, row_sum=row_sum, row_dot=row_dot, center=center,
            acc=acc, acc_t=acc_t, first=start == 0, remaining=N - start, scale=scale, scale_log2=scale_log2,
            REST=REST, RAGGED=RAGGED_K,
        )  # fmt: skip

    # out_t = acc_t / row_sum − (row_dot / row_sum) · acc / row_sum: the bias of the values is in neither
    inverse = (1 / row_sum)[:, None]  # [BQ, 1]
    mean = row_dot[:, None] * inverse  # [BQ, 1]
    main_t = (acc_t[0] - mean * acc[0]) * inverse  # [BQ, MAIN]
    rest_t = (acc_t[1] - mean * acc[1]) * inverse if REST else main_t  # [BQ, REST]
    store_rows(out_t_ptr + start_of_out, ROW, q_remaining, (main_t, rest_t), D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_Q)
    store_out(
        out_ptr=out_ptr + start_of_out, lse_ptr=lse_ptr, stride_n=ROW, remaining=q_remaining,
        row_max=row_max, row_sum=row_sum, acc=acc, bias_ptr=v_bias_ptr,
        D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_Q,
    )  # fmt: skip
