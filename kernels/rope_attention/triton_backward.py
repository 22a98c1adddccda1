"""The backward kernels of `rope_attention`. Letters and shapes: see `triton_common`.

With S, P and out as in `triton_forward` and dO the gradient of out:

    delta = Σ over D of out · dO              [N]; with a bias, out without that of the values (`partial_delta`)
    P  = 2^(S · log2(e) − lse)                [N, N], made again block by block
    dP = dO · vᵀ,  dS = P · (dP − delta)      [N, N]
    dv = Pᵀ · dO,  dq = dS · k / sqrt(D),  dk = dSᵀ · q / sqrt(D)

then dq and dk go back through RoPE and norm. One kernel makes dq and delta, one dk and dv, one adds up partial sums. No
program adds to what another one writes, so there are no atomics; seven matrix products instead of five are the price.
Queries past the end have an infinite lse, so P is 0: they add nothing to dk and dv.

The gradients of the norms' weights and of the bias are sums over tokens, of which each block of rows writes its part:
rows `[D]` at `[B, blocks, H]`, so that a weight, which all heads share, adds up rows of D, and the bias rows of H · D.
That of the values' bias is the sum of dO, because each row of P sums to 1.
"""

import triton
import triton.language as tl

from kernels.rope_attention.triton_common import (
    apply_rope_rows,
    dot_acc,
    dot_nt,
    load_biased,
    load_qk,
    load_rows,
    load_vector,
    mask_scores,
    program_coordinates,
    qkv_pointers,
    rstd,
    store_rows,
    zeros,
)

LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def store_qk_gradient(
    dy, ptr, dx_ptr, stride_n, dx_stride_n, remaining, table_ptr, weight_ptr, bias_ptr, dw_ptr, db_ptr, eps,
    D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Take dy [R, D], the gradient of what `load_qk` returned, back through RoPE and norm, and store it as dx.

    With x̂ = x · rstd, dy rotated back and g = dy · weight:

        dw = Σ over rows of dy · x̂     dx = (g − x̂ · mean(g · x̂)) · rstd     db = Σ over rows of dx

    Args:
        ptr, dx_ptr: of the rows that were loaded, and of where their gradient goes.
        dw_ptr, db_ptr: where these rows' parts of the gradients of weight and bias go, [D] float32; db_ptr may be None.
    """
    R: tl.constexpr = dy[0].shape[0]
    main, rest = dy  # [R, D]
    if bias_ptr is not None and RAGGED:  # rows past the end hold the bias
        exists = tl.arange(0, R)[:, None] < remaining  # [R, 1]
        main = tl.where(exists, main, 0.0)  # [R, MAIN]
        rest = tl.where(exists, rest, 0.0)  # [R, REST]
    if table_ptr is not None:
        main, rest = apply_rope_rows(  # [R, D]
            (main, rest), table_ptr, remaining, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED, INVERSE=True
        )
    if weight_ptr is not None:
        x = load_biased(ptr, stride_n, remaining, bias_ptr, R=R, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED)  # [R, D]
        scale = rstd(x, eps, D, REST)  # [R, 1]
        x_hat = x[0] * scale, x[1] * scale  # [R, D]
        store_columns(dw_ptr, tl.sum(main * x_hat[0], axis=0), 0, D)
        main *= load_vector(weight_ptr, 0, MAIN, D)  # [R, MAIN]
        projection = tl.sum(main * x_hat[0], axis=1)  # [R]
        if REST:
            store_columns(dw_ptr, tl.sum(rest * x_hat[1], axis=0), MAIN, D)
            rest *= load_vector(weight_ptr, MAIN, REST, D)  # [R, REST]
            projection += tl.sum(rest * x_hat[1], axis=1)  # [R]
        projection = projection[:, None] / D  # [R, 1]
        main = (main - x_hat[0] * projection) * scale  # [R, MAIN]
        if REST:
            rest = (rest - x_hat[1] * projection) * scale  # [R, REST]
    store_rows(dx_ptr, dx_stride_n, remaining, (main, rest), D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED)
    if db_ptr is not None:
        store_column_sums(db_ptr, (main, rest), D, MAIN, REST)


@triton.jit
def store_column_sums(ptr, x, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    """Store the sums [D] over the rows of x [R, D], in float32."""
    store_columns(ptr, tl.sum(x[0].to(tl.float32), axis=0), 0, D)
    if REST:
        store_columns(ptr, tl.sum(x[1].to(tl.float32), axis=0), MAIN, D)


@triton.jit
def store_columns(ptr, vector, FIRST: tl.constexpr, D: tl.constexpr):
    """Store a vector [C] from column FIRST on, as far as column D."""
    cols = FIRST + tl.arange(0, vector.shape[0])  # [C]
    tl.store(ptr + cols, vector, mask=cols < D)


@triton.jit
def partial_delta(out, do, bias_ptr, FIRST: tl.constexpr, D: tl.constexpr):
    """Σ (out − bias) · dO over the columns of one tile, [BQ], of out and do [BQ, C].

    dP is made of values without their bias, so it has to go from out as well.
    """
    out = out.to(tl.float32)  # [BQ, C]
    if bias_ptr is not None:
        out -= load_vector(bias_ptr, FIRST, out.shape[1], D)  # [BQ, C]
    return tl.sum(out * do.to(tl.float32), axis=1)  # [BQ]


@triton.jit
def update_dq(q, k, v, do, lse, delta, dq, remaining, scale_log2, REST: tl.constexpr, RAGGED: tl.constexpr):
    """dq + dS · k, for one block of keys, of which `remaining` exist; the factor 1 / sqrt(D) comes later.

    Args:
        q, do [BQ, D]; k, v [BK, D]; lse, delta [BQ]; dq [BQ, D] float32.
    """
    scores = dot_nt(q, k, REST)  # [BQ, BK]
    if RAGGED:
        scores = mask_scores(scores, remaining)  # [BQ, BK]
    p = tl.exp2(scores * scale_log2 - lse[:, None])  # [BQ, BK]
    ds = p * (dot_nt(do, v, REST) - delta[:, None])  # [BQ, BK]
    return dot_acc(ds.to(k[0].dtype), k, dq, REST)  # [BQ, D]


@triton.jit
def update_dkdv(q, k, v, do, lse, delta, dk, dv, scale_log2, REST: tl.constexpr):
    """dk + dSᵀ · q and dv + Pᵀ · dO, for one block of queries; the factor 1 / sqrt(D) of dk comes later.

    Scores are made transposed, keys by queries: so they multiply from registers, and only queries go to shared memory.

    Args:
        q, do [BQ, D]; k, v [BK, D]; lse, delta [BQ]; dk, dv [BK, D] float32.
    """
    p_t = tl.exp2(dot_nt(k, q, REST) * scale_log2 - lse[None, :])  # [BK, BQ]
    dv = dot_acc(p_t.to(v[0].dtype), do, dv, REST)  # [BK, D]
    ds_t = p_t * (dot_nt(v, do, REST) - delta[None, :])  # [BK, BQ]
    dk = dot_acc(ds_t.to(k[0].dtype), q, dk, REST)  # [BK, D]
    return dk, dv


@triton.jit(do_not_specialize=["N", "programs", "tiles"])
def rope_attention_bwd_dq_kernel(
    do_ptr, qkv_ptr, out_ptr, lse_ptr, table_ptr, q_weight_ptr, k_weight_ptr, bias_ptr, dqkv_ptr, delta_ptr,
    dw_partial_ptr, db_partial_ptr, eps, scale_log2, N, programs, tiles, do_stride_b, stride_b, stride_3, stride_h,
    do_stride_n: tl.constexpr, stride_n: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr,
    RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Each program: dq and delta of `tiles` blocks of BQ queries.

    The keys of the head stay in shared memory, as BLOCKS blocks of BK; or stream by for every block of queries where
    BLOCKS is 0.

    Args:
        do_ptr, out_ptr [B, N, H, D]; qkv_ptr, dqkv_ptr [B, N, 3, H, D]; lse_ptr, delta_ptr [B, H, N] float32.
        dw_partial_ptr [B, blocks, H, D] float32: parts of the gradient of q_weight; None without norms.
        db_partial_ptr [2, B, blocks, H, D] float32: of the bias of queries and of values; None if not asked for.
    """
    pid, head, sample = program_coordinates(programs, H)
    q_ptr, k_ptr, v_ptr = qkv_pointers(
        qkv_ptr, sample=sample, head=head, stride_b=stride_b, stride_3=stride_3, stride_h=stride_h, ALIGNED=ALIGNED
    )
    ROW: tl.constexpr = H * D
    q_bias_ptr = bias_ptr + head * D if bias_ptr is not None else None
    k_bias_ptr = q_bias_ptr + ROW if bias_ptr is not None else None
    v_bias_ptr = q_bias_ptr + 2 * ROW if bias_ptr is not None else None
    do_ptr += sample * do_stride_b + head * D
    out_ptr += sample * N * ROW + head * D
    dqkv_ptr += sample * N * 3 * ROW + head * D
    lse_ptr += (sample * H + head) * N
    delta_ptr += (sample * H + head) * N
    rows = tl.arange(0, BQ)  # [BQ]

    ks = ()  # BLOCKS of [BK, D]
    vs = ()  # BLOCKS of [BK, D]
    for i in tl.static_range(BLOCKS):
        row, remaining = tl.cast(i * BK, tl.int64), N - i * BK
        k_rows_ptr = k_ptr + row * stride_n
        k_table_ptr = table_ptr + i * BK * D if table_ptr is not None else None
        k = load_qk(  # [BK, D]
            k_rows_ptr, stride_n, remaining, k_table_ptr,
            k_weight_ptr, k_bias_ptr, eps, R=BK, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_K,
        )  # fmt: skip
        v = load_rows(  # [BK, D]
            v_ptr + row * stride_n, stride_n, remaining, R=BK, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_K
        )
        ks += (k,)
        vs += (v,)
    for q_start in tl.range(pid * tiles * BQ, tl.minimum((pid + 1) * tiles * BQ, N), BQ, disable_licm=True):
        q_row, q_remaining = tl.cast(q_start, tl.int64), N - q_start
        q_table_ptr = table_ptr + q_row * D if table_ptr is not None else None
        part = (sample * programs * tiles + q_start // BQ) * ROW + head * D
        dw_ptr = dw_partial_ptr + part if dw_partial_ptr is not None else None
        db_ptr = db_partial_ptr + part if db_partial_ptr is not None else None
        do = load_rows(  # [BQ, D]
            do_ptr + q_row * do_stride_n, do_stride_n, q_remaining, R=BQ, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_Q
        )
        if db_ptr is not None:
            store_column_sums(db_ptr + tl.num_programs(0).to(tl.int64) * tiles * D, do, D, MAIN, REST)
        out = load_rows(  # [BQ, D]
            out_ptr + q_row * ROW, ROW, q_remaining, R=BQ, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_Q
        )
        delta = partial_delta(out[0], do[0], v_bias_ptr, 0, D)  # [BQ]
        if REST:
            delta += partial_delta(out[1], do[1], v_bias_ptr, MAIN, D)  # [BQ]
        tl.store(delta_ptr + q_row + rows, delta, mask=rows < q_remaining)
        lse = tl.load(lse_ptr + q_row + rows, mask=rows < q_remaining, other=float("inf"))  # [BQ]
        q = load_qk(  # [BQ, D]
            q_ptr + q_row * stride_n, stride_n, q_remaining, q_table_ptr, q_weight_ptr, q_bias_ptr, eps,
            R=BQ, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_Q,
        )  # fmt: skip
        dq = zeros(BQ, MAIN, REST)  # [BQ, D]
        for i in tl.static_range(BLOCKS):
            dq = update_dq(  # [BQ, D]
                q, k=ks[i], v=vs[i], do=do, lse=lse, delta=delta, dq=dq,
                remaining=N - i * BK, scale_log2=scale_log2, REST=REST, RAGGED=RAGGED_K and i == BLOCKS - 1,
            )  # fmt: skip
        if BLOCKS == 0:
            for k_start in tl.range(0, N, BK, disable_licm=True):
                k_row, k_remaining = tl.cast(k_start, tl.int64), N - k_start
                k_rows_ptr = k_ptr + k_row * stride_n
                k_table_ptr = table_ptr + k_row * D if table_ptr is not None else None
                k = load_qk(  # [BK, D]
                    k_rows_ptr, stride_n, k_remaining, k_table_ptr,
                    k_weight_ptr, k_bias_ptr, eps, R=BK, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_K,
                )  # fmt: skip
                v = load_rows(  # [BK, D]
                    v_ptr + k_row * stride_n, stride_n, k_remaining, R=BK, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_K
                )
                dq = update_dq(  # [BQ, D]
                    q, k=k, v=v, do=do, lse=lse, delta=delta, dq=dq,
                    remaining=k_remaining, scale_log2=scale_log2, REST=REST, RAGGED=RAGGED_K,
                )  # fmt: skip
        softmax_scale = scale_log2 * LN_2
        if q_weight_ptr is not None or db_ptr is not None:
            tl.debug_barrier()  # else what the way back needs is loaded before, and registers spill
        store_qk_gradient(
            dy=(dq[0] * softmax_scale, dq[1] * softmax_scale), ptr=q_ptr + q_row * stride_n,
            dx_ptr=dqkv_ptr + q_row * 3 * ROW, stride_n=stride_n, dx_stride_n=3 * ROW, remaining=q_remaining,
            table_ptr=q_table_ptr, weight_ptr=q_weight_ptr, bias_ptr=q_bias_ptr, dw_ptr=dw_ptr, db_ptr=db_ptr, eps=eps,
            D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_Q,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "programs", "tiles"])
def rope_attention_bwd_dkdv_kernel(
    do_ptr, qkv_ptr, lse_ptr, delta_ptr, table_ptr, q_weight_ptr, k_weight_ptr, bias_ptr, dqkv_ptr,
    dw_partial_ptr, db_partial_ptr, eps, scale_log2, N, programs, tiles, do_stride_b, stride_b, stride_3, stride_h,
    do_stride_n: tl.constexpr, stride_n: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr,
    RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Each program: dk and dv of `tiles` blocks of BK keys.

    The queries of the head and their dO stay in shared memory, as BLOCKS blocks of BQ; or stream by for every block of
    keys where BLOCKS is 0.

    Args:
        do_ptr [B, N, H, D]; qkv_ptr, dqkv_ptr [B, N, 3, H, D]; lse_ptr, delta_ptr [B, H, N] float32.
        dw_partial_ptr, db_partial_ptr [B, blocks, H, D] float32: parts of the gradients of k_weight and of the bias of
        keys; None without norms, and if not asked for.
    """
    pid, head, sample = program_coordinates(programs, H)
    q_ptr, k_ptr, v_ptr = qkv_pointers(
        qkv_ptr, sample=sample, head=head, stride_b=stride_b, stride_3=stride_3, stride_h=stride_h, ALIGNED=ALIGNED
    )
    ROW: tl.constexpr = H * D
    q_bias_ptr = bias_ptr + head * D if bias_ptr is not None else None
    k_bias_ptr = q_bias_ptr + ROW if bias_ptr is not None else None
    do_ptr += sample * do_stride_b + head * D
    dqkv_ptr += (sample * N * 3 + 1) * ROW + head * D
    lse_ptr += (sample * H + head) * N
    delta_ptr += (sample * H + head) * N
    rows = tl.arange(0, BQ)  # [BQ]

    qs = ()  # BLOCKS of [BQ, D]
    dos = ()  # BLOCKS of [BQ, D]
    for i in tl.static_range(BLOCKS):
        row, remaining = tl.cast(i * BQ, tl.int64), N - i * BQ
        q_rows_ptr = q_ptr + row * stride_n
        q_table_ptr = table_ptr + i * BQ * D if table_ptr is not None else None
        q = load_qk(  # [BQ, D]
            q_rows_ptr, stride_n, remaining, q_table_ptr,
            q_weight_ptr, q_bias_ptr, eps, R=BQ, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_Q,
        )  # fmt: skip
        do = load_rows(  # [BQ, D]
            do_ptr + row * do_stride_n, do_stride_n, remaining, R=BQ, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_Q
        )
        qs += (q,)
        dos += (do,)
    for k_start in tl.range(pid * tiles * BK, tl.minimum((pid + 1) * tiles * BK, N), BK, disable_licm=True):
        k_row, k_remaining = tl.cast(k_start, tl.int64), N - k_start
        k_table_ptr = table_ptr + k_row * D if table_ptr is not None else None
        k = load_qk(  # [BK, D]
            k_ptr + k_row * stride_n, stride_n, k_remaining, k_table_ptr, k_weight_ptr, k_bias_ptr, eps,
            R=BK, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_K,
        )  # fmt: skip
        v = load_rows(  # [BK, D]
            v_ptr + k_row * stride_n, stride_n, k_remaining, R=BK, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_K
        )
        dk = zeros(BK, MAIN, REST)  # [BK, D]
        dv = zeros(BK, MAIN, REST)  # [BK, D]
        for i in tl.static_range(BLOCKS):
            lse = tl.load(lse_ptr + i * BQ + rows, mask=rows < N - i * BQ, other=float("inf"))  # [BQ]
            delta = tl.load(delta_ptr + i * BQ + rows, mask=rows < N - i * BQ, other=0.0)  # [BQ]
            dk, dv = update_dkdv(  # [BK, D], [BK, D]
                qs[i], k=k, v=v, do=dos[i], lse=lse, delta=delta, dk=dk, dv=dv, scale_log2=scale_log2, REST=REST
            )
        if BLOCKS == 0:
            for q_start in tl.range(0, N, BQ, disable_licm=True):
                q_row, q_remaining = tl.cast(q_start, tl.int64), N - q_start
                q_rows_ptr = q_ptr + q_row * stride_n
                q_table_ptr = table_ptr + q_row * D if table_ptr is not None else None
                q = load_qk(  # [BQ, D]
                    q_rows_ptr, stride_n, q_remaining, q_table_ptr,
                    q_weight_ptr, q_bias_ptr, eps, R=BQ, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_Q,
                )  # fmt: skip
                do = load_rows(  # [BQ, D]
                    do_ptr + q_row * do_stride_n, do_stride_n, q_remaining,
                    R=BQ, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_Q,
                )  # fmt: skip
                lse = tl.load(lse_ptr + q_start + rows, mask=rows < q_remaining, other=float("inf"))  # [BQ]
                delta = tl.load(delta_ptr + q_start + rows, mask=rows < q_remaining, other=0.0)  # [BQ]
                dk, dv = update_dkdv(  # [BK, D], [BK, D]
                    q, k=k, v=v, do=do, lse=lse, delta=delta, dk=dk, dv=dv, scale_log2=scale_log2, REST=REST
                )
        dv_ptr = dqkv_ptr + k_row * 3 * ROW + ROW
        store_rows(dv_ptr, 3 * ROW, k_remaining, dv, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_K)
        softmax_scale = scale_log2 * LN_2
        part = (sample * programs * tiles + k_start // BK) * ROW + head * D
        dw_ptr = dw_partial_ptr + part if dw_partial_ptr is not None else None
        db_ptr = db_partial_ptr + part if db_partial_ptr is not None else None
        store_qk_gradient(
            dy=(dk[0] * softmax_scale, dk[1] * softmax_scale), ptr=k_ptr + k_row * stride_n,
            dx_ptr=dqkv_ptr + k_row * 3 * ROW, stride_n=stride_n, dx_stride_n=3 * ROW, remaining=k_remaining,
            table_ptr=k_table_ptr, weight_ptr=k_weight_ptr, bias_ptr=k_bias_ptr,
            dw_ptr=dw_ptr, db_ptr=db_ptr, eps=eps,
            D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["q_parts", "k_parts"])
def rope_attention_bwd_sums_kernel(
    q_partial_ptr, k_partial_ptr, q_sum_ptr, k_sum_ptr, q_parts, k_parts,
    W: tl.constexpr, BW: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Each program: BW of W columns of the sum over all parts of queries (second grid index 0) or of keys (1).

    Where there is an index 2, of values: their parts lie behind those of queries, their sum behind that of keys.

    Args:
        q_partial_ptr [q_parts, W], or [2, q_parts, W] with those of values; k_partial_ptr [k_parts, W] float32.
        q_sum_ptr, k_sum_ptr [W]; with values, one after the other in [3, W].
        BP: parts added at a time.
    """
    if tl.program_id(1) == 1:
        sum_columns(k_partial_ptr, k_sum_ptr, k_parts, W, BW, BP)
    else:
        if tl.program_id(1) == 2:
            q_partial_ptr += tl.cast(q_parts, tl.int64) * W
            q_sum_ptr += 2 * W
        sum_columns(q_partial_ptr, q_sum_ptr, q_parts, W, BW, BP)


@triton.jit
def sum_columns(partial_ptr, sum_ptr, parts, W: tl.constexpr, BW: tl.constexpr, BP: tl.constexpr):
    """sum[c] = Σ partial[:, c] for BW columns c, always in the same order."""
    cols = tl.program_id(0) * BW + tl.arange(0, BW)  # [BW]
    rows = tl.arange(0, BP)  # [BP]
    acc = tl.zeros((BP, BW), tl.float32)  # [BP, BW]
    for first in range(0, parts, BP):
        part = (first + rows).to(tl.int64)[:, None]  # [BP, 1]
        mask = (part < parts) & (cols < W)[None, :]  # [BP, BW]
        acc += tl.load(partial_ptr + part * W + cols[None, :], mask=mask, other=0.0)  # [BP, BW]
    tl.store(sum_ptr + cols, tl.sum(acc, axis=0).to(sum_ptr.dtype.element_ty), mask=cols < W)
