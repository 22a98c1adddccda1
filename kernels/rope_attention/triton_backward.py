"""The backward kernels of `rope_attention`: dq and delta, then dk and dv, then sums over all tiles.

No program adds to what another one writes, so there are no atomics; seven matrix products instead of five are the
price. Queries past the end have an infinite log-sum-exp, so weights of 0: they add nothing to dk and dv.

The gradients of the norms' weights and of the bias are sums over tokens, of which a tile writes its part: rows `[D]` at
`[samples, tiles, heads]`, so that a weight, which all heads share, adds up rows of D, and the bias rows of heads · D.
That of the values' bias is the sum of the upstream gradient, because the weights of each query sum to 1.
"""

import triton
import triton.language as tl

from kernels.rope_attention.triton_forward import (
    accumulate,
    hide_beyond,
    inverse_rms,
    load,
    load_biased,
    load_head,
    load_turned,
    load_vector,
    outer,
    own_head,
    packed_rows,
    store,
    turn,
    zeros,
)

LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def store_turned_back(
    d_first, d_rest, base, into, stride, into_stride, limit, table, weight, bias, dw_partial, db_partial, eps,
    D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, ROPE: tl.constexpr, NORM: tl.constexpr,
    BIASED: tl.constexpr, SUMMED: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Take the gradient of the rows that `load_turned` gave back through rotation and norm, and store it.

    `dw_partial`, `db_partial`: where the gradients of `weight` and `bias` from these rows go, `D` float32 each.
    """
    ROWS: tl.constexpr = d_first.shape[0]
    if BIASED and RAGGED:  # rows past the end hold the bias
        exists = tl.arange(0, ROWS)[:, None] < limit
        d_first = tl.where(exists, d_first, 0.0)
        d_rest = tl.where(exists, d_rest, 0.0)
    if ROPE:
        d_first = turn(d_first, load(table, D, limit, ROWS, 0, MAIN, D, RAGGED), True)
        if REST:
            d_rest = turn(d_rest, load(table, D, limit, ROWS, MAIN, REST, D, RAGGED), True)
    if NORM:
        first, rest = load_biased(base, stride, limit, bias, ROWS, D, MAIN, REST, BIASED, RAGGED)
        inverse = inverse_rms(first, rest, eps, D, REST)[:, None]
        first, rest = first * inverse, rest * inverse
        store_columns(dw_partial, tl.sum(d_first * first, axis=0), 0, D)
        d_first *= load_vector(weight, 0, MAIN, D)[None, :]
        along = tl.sum(d_first * first, axis=1)
        if REST:
            store_columns(dw_partial, tl.sum(d_rest * rest, axis=0), MAIN, D)
            d_rest *= load_vector(weight, MAIN, REST, D)[None, :]
            along += tl.sum(d_rest * rest, axis=1)
        along = along[:, None] / D
        d_first = (d_first - first * along) * inverse
        if REST:
            d_rest = (d_rest - rest * along) * inverse
    store(into, into_stride, limit, d_first, 0, D, RAGGED)
    if REST:
        store(into, into_stride, limit, d_rest, MAIN, D, RAGGED)
    if SUMMED:
        store_column_sums(db_partial, d_first, d_rest, D, MAIN, REST)


@triton.jit
def store_column_sums(into, first, rest, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    store_columns(into, tl.sum(first.to(tl.float32), axis=0), 0, D)
    if REST:
        store_columns(into, tl.sum(rest.to(tl.float32), axis=0), MAIN, D)


@triton.jit
def store_columns(base, values, FIRST: tl.constexpr, D: tl.constexpr):
    cols = FIRST + tl.arange(0, values.shape[0])
    tl.store(base + cols, values, mask=cols < D)


@triton.jit
def row_sums(out, grad, bias, FIRST: tl.constexpr, D: tl.constexpr, BIASED: tl.constexpr):
    """Σ (out − bias) · grad of each row: the values stand without their bias in the products, so it goes from here."""
    out = out.to(tl.float32)
    if BIASED:
        out -= load_vector(bias, FIRST, out.shape[1], D)[None, :]
    return tl.sum(out * grad.to(tl.float32), axis=1)


@triton.jit
def add_to_dq(
    q,
    q_rest,
    do,
    do_rest,
    top,
    dot,
    k,
    k_rest,
    v,
    v_rest,
    dq,
    dq_rest,
    left,
    scale,
    REST: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """What one more block of keys, of which `left` exist, adds to the gradient of a tile of turned queries."""
    scores = outer(q, q_rest, k, k_rest, REST)
    if RAGGED:
        scores = hide_beyond(scores, left)
    weights = tl.exp2(scores * scale - top[:, None])
    d_scores = weights * (outer(do, do_rest, v, v_rest, REST) - dot[:, None])
    return accumulate(d_scores.to(k.dtype), k, k_rest, dq, dq_rest, REST)


@triton.jit
def add_to_dk_dv(
    q, q_rest, do, do_rest, top, dot, k, k_rest, v, v_rest, dk, dk_rest, dv, dv_rest, scale, REST: tl.constexpr
):
    """What one more tile of queries adds to the gradients of a block of turned keys and of values.

    Scores stand transposed, keys by queries: so they multiply from registers, and only queries go to shared memory.
    """
    weights = tl.exp2(outer(k, k_rest, q, q_rest, REST) * scale - top[None, :])
    dv, dv_rest = accumulate(weights.to(v.dtype), do, do_rest, dv, dv_rest, REST)
    d_scores = weights * (outer(v, v_rest, do, do_rest, REST) - dot[None, :])
    dk, dk_rest = accumulate(d_scores.to(k.dtype), q, q_rest, dk, dk_rest, REST)
    return dk, dk_rest, dv, dv_rest


@triton.jit(do_not_specialize=["tokens", "parts", "tiles"])
def rope_attention_bwd_dq_kernel(
    grad, qkv, out, lse, table, q_weight, k_weight, bias, dqkv, delta, dw_partial, db_partial, eps, scale, tokens,
    parts, tiles,
    grad_b, stride_b, stride_3, stride_h,
    grad_n: tl.constexpr, stride_n: tl.constexpr, heads: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr,
    REST: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr, ROPE: tl.constexpr,
    NORM: tl.constexpr, BIASED: tl.constexpr, SUMMED: tl.constexpr, RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Each program: dq and delta = Σ out·grad of `tiles` tiles of `BQ` queries.

    The keys of the head stay in shared memory, in `BLOCKS` blocks of `BK`; or pass by for every tile if that is 0.
    `dw_partial` [samples, tiles, heads, D]: parts of the gradient of `q_weight`; `db_partial` [2, …]: of the bias of
    queries and of values.
    """
    part, head, sample = own_head(parts, heads)
    queries, keys, values = packed_rows(qkv, sample, head, stride_b, stride_3, stride_h, ALIGNED)
    cols: tl.constexpr = heads * D
    q_bias = bias + head * D if BIASED else bias
    k_bias = q_bias + cols if BIASED else bias
    v_bias = q_bias + 2 * cols if BIASED else bias
    grad += sample * grad_b + head * D
    out += sample * tokens * cols + head * D
    dqkv += sample * tokens * 3 * cols + head * D
    lse += (sample * heads + head) * tokens
    delta += (sample * heads + head) * tokens
    rows = tl.arange(0, BQ)
    ks = ()
    vs = ()
    for i in tl.static_range(BLOCKS):
        left = tokens - i * BK
        ks += (
            load_turned(
                keys + tl.cast(i * BK, tl.int64) * stride_n,
                stride_n,
                left,
                table + i * BK * D if ROPE else table,
                k_weight,
                k_bias,
                eps,
                BK,
                D,
                MAIN,
                REST,
                ROPE,
                NORM,
                BIASED,
                RAGGED_K,
            ),
        )
        vs += (load_head(values + tl.cast(i * BK, tl.int64) * stride_n, stride_n, left, BK, D, MAIN, REST, RAGGED_K),)
    for start in tl.range(part * tiles * BQ, tl.minimum((part + 1) * tiles * BQ, tokens), BQ, disable_licm=True):
        at, left = tl.cast(start, tl.int64), tokens - start
        here = table + at * D if ROPE else table
        tile = (sample * parts * tiles + start // BQ) * cols + head * D
        into_weight = dw_partial + tile if NORM else dw_partial
        into_bias = db_partial + tile if SUMMED else db_partial
        do, do_rest = load_head(grad + at * grad_n, grad_n, left, BQ, D, MAIN, REST, RAGGED_Q)
        if SUMMED:
            of_values = into_bias + tl.num_programs(0).to(tl.int64) * tiles * D
            store_column_sums(of_values, do, do_rest, D, MAIN, REST)
        o, o_rest = load_head(out + at * cols, cols, left, BQ, D, MAIN, REST, RAGGED_Q)
        dot = row_sums(o, do, v_bias, 0, D, BIASED)
        if REST:
            dot += row_sums(o_rest, do_rest, v_bias, MAIN, D, BIASED)
        tl.store(delta + at + rows, dot, mask=rows < left)
        top = tl.load(lse + at + rows, mask=rows < left, other=float("inf"))
        q, q_rest = load_turned(
            queries + at * stride_n,
            stride_n,
            left,
            here,
            q_weight,
            q_bias,
            eps,
            BQ,
            D,
            MAIN,
            REST,
            ROPE,
            NORM,
            BIASED,
            RAGGED_Q,
        )
        dq, dq_rest = zeros(BQ, MAIN, REST)
        for i in tl.static_range(BLOCKS):
            dq, dq_rest = add_to_dq(
                q,
                q_rest,
                do,
                do_rest,
                top,
                dot,
                ks[i][0],
                ks[i][1],
                vs[i][0],
                vs[i][1],
                dq,
                dq_rest,
                tokens - i * BK,
                scale,
                REST,
                RAGGED_K and i == BLOCKS - 1,
            )
        if BLOCKS == 0:
            for first in tl.range(0, tokens, BK, disable_licm=True):
                row = tl.cast(first, tl.int64)
                k, k_rest = load_turned(
                    keys + row * stride_n,
                    stride_n,
                    tokens - first,
                    table + row * D if ROPE else table,
                    k_weight,
                    k_bias,
                    eps,
                    BK,
                    D,
                    MAIN,
                    REST,
                    ROPE,
                    NORM,
                    BIASED,
                    RAGGED_K,
                )
                v, v_rest = load_head(values + row * stride_n, stride_n, tokens - first, BK, D, MAIN, REST, RAGGED_K)
                dq, dq_rest = add_to_dq(
                    q,
                    q_rest,
                    do,
                    do_rest,
                    top,
                    dot,
                    k,
                    k_rest,
                    v,
                    v_rest,
                    dq,
                    dq_rest,
                    tokens - first,
                    scale,
                    REST,
                    RAGGED_K,
                )
        natural = scale * LN_2
        if NORM or SUMMED:
            tl.debug_barrier()  # else what the way back needs is loaded before, and registers spill
        store_turned_back(
            dq * natural,
            dq_rest * natural,
            queries + at * stride_n,
            dqkv + at * 3 * cols,
            stride_n,
            3 * cols,
            left,
            here,
            q_weight,
            q_bias,
            into_weight,
            into_bias,
            eps,
            D,
            MAIN,
            REST,
            ROPE,
            NORM,
            BIASED,
            SUMMED,
            RAGGED_Q,
        )


@triton.jit(do_not_specialize=["tokens", "parts", "tiles"])
def rope_attention_bwd_dkdv_kernel(
    grad, qkv, lse, delta, table, q_weight, k_weight, bias, dqkv, dw_partial, db_partial, eps, scale, tokens, parts,
    tiles,
    grad_b, stride_b, stride_3, stride_h,
    grad_n: tl.constexpr, stride_n: tl.constexpr, heads: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr,
    REST: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr, ROPE: tl.constexpr,
    NORM: tl.constexpr, BIASED: tl.constexpr, SUMMED: tl.constexpr, RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Each program: dk and dv of `tiles` tiles of `BK` keys.

    The queries of the head and their upstream gradients stay in shared memory, in `BLOCKS` blocks of `BQ`; or pass by
    for every tile if that is 0. `dw_partial`, `db_partial` [samples, tiles, heads, D]: parts of the gradients of
    `k_weight` and of the bias of keys.
    """
    part, head, sample = own_head(parts, heads)
    queries, keys, values = packed_rows(qkv, sample, head, stride_b, stride_3, stride_h, ALIGNED)
    cols: tl.constexpr = heads * D
    q_bias = bias + head * D if BIASED else bias
    k_bias = q_bias + cols if BIASED else bias
    grad += sample * grad_b + head * D
    dqkv += (sample * tokens * 3 + 1) * cols + head * D
    lse += (sample * heads + head) * tokens
    delta += (sample * heads + head) * tokens
    rows = tl.arange(0, BQ)
    qs = ()
    dos = ()
    for i in tl.static_range(BLOCKS):
        left = tokens - i * BQ
        qs += (
            load_turned(
                queries + tl.cast(i * BQ, tl.int64) * stride_n,
                stride_n,
                left,
                table + i * BQ * D if ROPE else table,
                q_weight,
                q_bias,
                eps,
                BQ,
                D,
                MAIN,
                REST,
                ROPE,
                NORM,
                BIASED,
                RAGGED_Q,
            ),
        )
        dos += (load_head(grad + tl.cast(i * BQ, tl.int64) * grad_n, grad_n, left, BQ, D, MAIN, REST, RAGGED_Q),)
    for start in tl.range(part * tiles * BK, tl.minimum((part + 1) * tiles * BK, tokens), BK, disable_licm=True):
        at, left = tl.cast(start, tl.int64), tokens - start
        here = table + at * D if ROPE else table
        k, k_rest = load_turned(
            keys + at * stride_n,
            stride_n,
            left,
            here,
            k_weight,
            k_bias,
            eps,
            BK,
            D,
            MAIN,
            REST,
            ROPE,
            NORM,
            BIASED,
            RAGGED_K,
        )
        v, v_rest = load_head(values + at * stride_n, stride_n, left, BK, D, MAIN, REST, RAGGED_K)
        dk, dk_rest = zeros(BK, MAIN, REST)
        dv, dv_rest = zeros(BK, MAIN, REST)
        for i in tl.static_range(BLOCKS):
            top = tl.load(lse + i * BQ + rows, mask=rows < tokens - i * BQ, other=float("inf"))
            dot = tl.load(delta + i * BQ + rows, mask=rows < tokens - i * BQ, other=0.0)
            dk, dk_rest, dv, dv_rest = add_to_dk_dv(
                qs[i][0],
                qs[i][1],
                dos[i][0],
                dos[i][1],
                top,
                dot,
                k,
                k_rest,
                v,
                v_rest,
                dk,
                dk_rest,
                dv,
                dv_rest,
                scale,
                REST,
            )
        if BLOCKS == 0:
            for first in tl.range(0, tokens, BQ, disable_licm=True):
                row = tl.cast(first, tl.int64)
                q, q_rest = load_turned(
                    queries + row * stride_n,
                    stride_n,
                    tokens - first,
                    table + row * D if ROPE else table,
                    q_weight,
                    q_bias,
                    eps,
                    BQ,
                    D,
                    MAIN,
                    REST,
                    ROPE,
                    NORM,
                    BIASED,
                    RAGGED_Q,
                )
                do, do_rest = load_head(grad + row * grad_n, grad_n, tokens - first, BQ, D, MAIN, REST, RAGGED_Q)
                top = tl.load(lse + first + rows, mask=rows < tokens - first, other=float("inf"))
                dot = tl.load(delta + first + rows, mask=rows < tokens - first, other=0.0)
                dk, dk_rest, dv, dv_rest = add_to_dk_dv(
                    q, q_rest, do, do_rest, top, dot, k, k_rest, v, v_rest, dk, dk_rest, dv, dv_rest, scale, REST
                )
        values_into = dqkv + at * 3 * cols + cols
        store(values_into, 3 * cols, left, dv, 0, D, RAGGED_K)
        if REST:
            store(values_into, 3 * cols, left, dv_rest, MAIN, D, RAGGED_K)
        natural = scale * LN_2
        tile = (sample * parts * tiles + start // BK) * cols + head * D
        into_weight = dw_partial + tile if NORM else dw_partial
        into_bias = db_partial + tile if SUMMED else db_partial
        store_turned_back(
            dk * natural,
            dk_rest * natural,
            keys + at * stride_n,
            dqkv + at * 3 * cols,
            stride_n,
            3 * cols,
            left,
            here,
            k_weight,
            k_bias,
            into_weight,
            into_bias,
            eps,
            D,
            MAIN,
            REST,
            ROPE,
            NORM,
            BIASED,
            SUMMED,
            RAGGED_K,
        )


@triton.jit(do_not_specialize=["q_parts", "k_parts"])
def rope_attention_bwd_sums_kernel(
    of_queries, of_keys, into_queries, into_keys, q_parts, k_parts,
    WIDTH: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Each program: `COLS` of `WIDTH` columns of a sum over all parts of queries (second grid index 0) or of keys (1).

    Where there is an index 2, of values: their parts lie behind those of queries, their sum behind that of keys.
    """
    if tl.program_id(1) == 1:
        sum_columns(of_keys, into_keys, k_parts, WIDTH, COLS, ROWS)
    else:
        if tl.program_id(1) == 2:
            of_queries += tl.cast(q_parts, tl.int64) * WIDTH
            into_queries += 2 * WIDTH
        sum_columns(of_queries, into_queries, q_parts, WIDTH, COLS, ROWS)


@triton.jit
def sum_columns(parts, into, count, WIDTH: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr):
    """into[c] = Σ parts[:, c], always in the same order."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    rows = tl.arange(0, ROWS)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(0, count, ROWS):
        at = (first + rows).to(tl.int64)[:, None]
        acc += tl.load(parts + at * WIDTH + cols[None, :], mask=(at < count) & (cols < WIDTH)[None, :], other=0.0)
    tl.store(into + cols, tl.sum(acc, axis=0).to(into.dtype.element_ty), mask=cols < WIDTH)
