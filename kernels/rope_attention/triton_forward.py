"""The forward kernels of `rope_attention`. Letters and shapes: see `triton_common`.

    S = q · kᵀ / sqrt(D)     P = softmax(S)     out = P · v     lse = log2 Σ exp(S)

for each head, block by block with an online softmax, so that neither S nor P [N, N] is ever in memory. Exponentials are
powers of two: `scale_log2` is 1 / sqrt(D) · log2(e), and row_max and lse are in that unit.
"""

import triton
import triton.language as tl

from kernels.rope_attention.triton_common import (
    dot_acc,
    dot_nt,
    load_qk,
    load_rows,
    load_vector,
    mask_scores,
    program_coordinates,
    qkv_pointers,
    store_rows,
    zeros,
)


@triton.jit
def online_softmax_init(BQ: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    """Row maximum, row sum and result before the first block of keys."""
    acc = zeros(BQ, MAIN, REST)  # [BQ, D]
    row_max = tl.full((BQ,), float("-inf"), tl.float32)  # [BQ]
    row_sum = tl.zeros((BQ,), tl.float32)  # [BQ]
    return row_max, row_sum, acc


@triton.jit
def online_softmax_update(
    q, k, v, row_max, row_sum, acc, remaining, scale_log2, REST: tl.constexpr, RAGGED: tl.constexpr
):
    """Add one block of keys, of which `remaining` exist; at least one, so that row_max is finite.

    With m the maximum of S · log2(e) so far and m' the one that includes this block:

        p = 2^(S · log2(e) − m')     row_sum ← row_sum · 2^(m − m') + Σ p     acc ← acc · 2^(m − m') + p · v

    Args:
        q [BQ, D], k [BK, D], v [BK, D]; row_max [BQ], row_sum [BQ], acc [BQ, D] float32.
    """
    scores = dot_nt(q, k, REST)  # [BQ, BK]
    if RAGGED:
        scores = mask_scores(scores, remaining)  # [BQ, BK]
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale_log2)  # [BQ]
    p = tl.exp2(scores * scale_log2 - new_max[:, None])  # [BQ, BK]
    rescale = tl.exp2(row_max - new_max)  # [BQ]
    row_sum = row_sum * rescale + tl.sum(p, axis=1)  # [BQ]
    acc = acc[0] * rescale[:, None], acc[1] * rescale[:, None]  # [BQ, D]
    acc = dot_acc(p.to(v[0].dtype), v, acc, REST)  # [BQ, D]
    return new_max, row_sum, acc


@triton.jit
def store_out(
    out_ptr, lse_ptr, stride_n, remaining, row_max, row_sum, acc, bias_ptr,
    D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """out = acc / row_sum + bias of the values, [BQ, D], and lse = row_max + log2(row_sum), [BQ].

    The values were multiplied without their bias: p sums to 1 over the keys, which leaves it as it is.
    """
    inverse = (1 / row_sum)[:, None]  # [BQ, 1]
    main, rest = acc  # [BQ, D]
    main *= inverse  # [BQ, MAIN]
    if REST:
        rest *= inverse  # [BQ, REST]
    if bias_ptr is not None:
        main += load_vector(bias_ptr, 0, MAIN, D)  # [BQ, MAIN]
        if REST:
            rest += load_vector(bias_ptr, MAIN, REST, D)  # [BQ, REST]
    store_rows(out_ptr, stride_n, remaining, (main, rest), D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED)
    rows = tl.arange(0, main.shape[0])  # [BQ]
    tl.store(lse_ptr + rows, row_max + tl.log2(row_sum), mask=rows < remaining)


@triton.jit(do_not_specialize=["N", "programs", "tiles"])
def rope_attention_fwd_keys_in_smem_kernel(
    qkv_ptr, table_ptr, q_weight_ptr, k_weight_ptr, bias_ptr, out_ptr, lse_ptr, eps, scale_log2, N, programs, tiles,
    stride_b, stride_3, stride_h,
    stride_n: tl.constexpr, H: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr,
    RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Each program: `tiles` blocks of BQ queries of one head, against all its keys, held as BLOCKS blocks of BK.

    Keys are loaded, normed, rotated and put in shared memory once.

    Args:
        qkv_ptr [B, N, 3, H, D]; table_ptr [N, D / 2, 2] float32, cos and sin of each pair; q_weight_ptr, k_weight_ptr
        [D]; bias_ptr [3, H, D]; out_ptr [B, N, H, D]; lse_ptr [B, H, N] float32. Table, weights and bias may be None.
    """
    pid, head, sample = program_coordinates(programs, H)
    q_ptr, k_ptr, v_ptr = qkv_pointers(
        qkv_ptr, sample=sample, head=head, stride_b=stride_b, stride_3=stride_3, stride_h=stride_h, ALIGNED=ALIGNED
    )
    ROW: tl.constexpr = H * D
    q_bias_ptr = bias_ptr + head * D if bias_ptr is not None else None
    k_bias_ptr = q_bias_ptr + ROW if bias_ptr is not None else None
    v_bias_ptr = q_bias_ptr + 2 * ROW if bias_ptr is not None else None
    out_ptr += sample * N * ROW + head * D
    lse_ptr += (sample * H + head) * N

    ks = ()  # BLOCKS of [BK, D]
    vs = ()  # BLOCKS of [BK, D]
    for i in tl.static_range(BLOCKS):
        row, remaining = tl.cast(i * BK, tl.int64), N - i * BK
        k_rows_ptr = k_ptr + row * stride_n
        k_table_ptr = table_ptr + row * D if table_ptr is not None else None
        k = load_qk(  # [BK, D]
            k_rows_ptr, stride_n, remaining, k_table_ptr, k_weight_ptr, k_bias_ptr, eps,
            R=BK, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_K,
        )  # fmt: skip
        v = load_rows(  # [BK, D]
            v_ptr + row * stride_n, stride_n, remaining, R=BK, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_K
        )
        ks += (k,)
        vs += (v,)
    for start in tl.range(pid * tiles * BQ, tl.minimum((pid + 1) * tiles * BQ, N), BQ, disable_licm=True):
        q_row, q_remaining = tl.cast(start, tl.int64), N - start
        q_rows_ptr = q_ptr + q_row * stride_n
        q_table_ptr = table_ptr + q_row * D if table_ptr is not None else None
        q = load_qk(  # [BQ, D]
            q_rows_ptr, stride_n, q_remaining, q_table_ptr,
            q_weight_ptr, q_bias_ptr, eps, R=BQ, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_Q,
        )  # fmt: skip
        row_max, row_sum, acc = online_softmax_init(BQ, MAIN, REST)  # [BQ], [BQ], [BQ, D]
        for i in tl.static_range(BLOCKS):
            row_max, row_sum, acc = online_softmax_update(  # [BQ], [BQ], [BQ, D]
                q, k=ks[i], v=vs[i], row_max=row_max, row_sum=row_sum, acc=acc,
                remaining=N - i * BK, scale_log2=scale_log2, REST=REST, RAGGED=RAGGED_K and i == BLOCKS - 1,
            )  # fmt: skip
        store_out(
            out_ptr=out_ptr + q_row * ROW, lse_ptr=lse_ptr + q_row, stride_n=ROW, remaining=q_remaining,
            row_max=row_max, row_sum=row_sum, acc=acc, bias_ptr=v_bias_ptr,
            D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_Q,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "programs"])
def rope_attention_fwd_kernel(
    qkv_ptr, table_ptr, q_weight_ptr, k_weight_ptr, bias_ptr, out_ptr, lse_ptr, eps, scale_log2, N, programs,
    stride_b, stride_3, stride_h,
    stride_n: tl.constexpr, H: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Each program: one block of BQ queries of a head, while its keys and values stream by in blocks of BK.

    Args: as above.
    """
    pid, head, sample = program_coordinates(programs, H)
    q_row, q_remaining = pid.to(tl.int64) * BQ, N - pid * BQ
    q_ptr, k_ptr, v_ptr = qkv_pointers(
        qkv_ptr, sample=sample, head=head, stride_b=stride_b, stride_3=stride_3, stride_h=stride_h, ALIGNED=ALIGNED
    )
    ROW: tl.constexpr = H * D
    q_bias_ptr = bias_ptr + head * D if bias_ptr is not None else None
    k_bias_ptr = q_bias_ptr + ROW if bias_ptr is not None else None
    v_bias_ptr = q_bias_ptr + 2 * ROW if bias_ptr is not None else None
    out_ptr += (sample * N + q_row) * ROW + head * D
    lse_ptr += (sample * H + head) * N + q_row

    q_rows_ptr = q_ptr + q_row * stride_n
    q_table_ptr = table_ptr + q_row * D if table_ptr is not None else None
    q = load_qk(  # [BQ, D]
        q_rows_ptr, stride_n, q_remaining, q_table_ptr, q_weight_ptr, q_bias_ptr, eps,
        R=BQ, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_Q,
    )  # fmt: skip
    row_max, row_sum, acc = online_softmax_init(BQ, MAIN, REST)  # [BQ], [BQ], [BQ, D]
    for start in range(0, N, BK):
        k_row = tl.cast(start, tl.int64)
        if k_weight_ptr is not None:
            tl.debug_barrier()  # else keys are loaded before the last ones are done with, and registers spill
        k_rows_ptr = k_ptr + k_row * stride_n
        k_table_ptr = table_ptr + k_row * D if table_ptr is not None else None
        k = load_qk(  # [BK, D]
            k_rows_ptr, stride_n, N - start, k_table_ptr, k_weight_ptr, k_bias_ptr, eps,
            R=BK, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_K,
        )  # fmt: skip
        v = load_rows(  # [BK, D]
            v_ptr + k_row * stride_n, stride_n, N - start, R=BK, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_K
        )
        row_max, row_sum, acc = online_softmax_update(  # [BQ], [BQ], [BQ, D]
            q, k=k, v=v, row_max=row_max, row_sum=row_sum, acc=acc,
            remaining=N - start, scale_log2=scale_log2, REST=REST, RAGGED=RAGGED_K,
        )  # fmt: skip
    store_out(
        out_ptr=out_ptr, lse_ptr=lse_ptr, stride_n=ROW, remaining=q_remaining,
        row_max=row_max, row_sum=row_sum, acc=acc, bias_ptr=v_bias_ptr,
        D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_Q,
    )  # fmt: skip
