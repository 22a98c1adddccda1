"""The forward kernel of `rope_attention`, and what it shares with the backward ones.

A head of width d is held as two blocks of columns, `MAIN` and `REST` (0 if there is none) wide: 72 = 64 + 8, where the
second is padded with zeros to 16 and never to 64. Functions that return both return the first one twice where there is
no second. Rows and columns that do not exist read as 0, so products need no masks but that of the softmax.
"""

import triton
import triton.language as tl


@triton.jit
def own_head(parts, heads: tl.constexpr):
    """Which of the `parts` of which head of which sample is this program's; programs of a head are neighbours."""
    program = tl.program_id(0)
    return program % parts, (program // parts % heads).to(tl.int64), (program // parts // heads).to(tl.int64)


@triton.jit
def packed_rows(qkv, sample, head, stride_b, stride_3, stride_h, ALIGNED: tl.constexpr):
    """Where the first query, key and value of a head are."""
    queries = qkv + sample * stride_b + tl.multiple_of(head * stride_h, ALIGNED)
    return queries, queries + stride_3, queries + 2 * tl.cast(stride_3, tl.int64)


@triton.jit
def load(
    base,
    stride,
    limit,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    COLS: tl.constexpr,
    D: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Rows 0 to `ROWS` of `base`, those from `limit` on as 0, and columns from `FIRST` on, those from `D` on as 0."""
    rows = tl.arange(0, ROWS)[:, None]
    cols = FIRST + tl.arange(0, COLS)[None, :]
    pointers = base + rows * stride + cols
    if RAGGED and FIRST + COLS > D:
        return tl.load(pointers, mask=(rows < limit) & (cols < D), other=0.0)
    elif RAGGED:
        return tl.load(pointers, mask=rows < limit, other=0.0)
    elif FIRST + COLS > D:
        return tl.load(pointers, mask=cols < D, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_head(
    base,
    stride,
    limit,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Both blocks of the columns of some rows."""
    first = load(base, stride, limit, ROWS, 0, MAIN, D, RAGGED)
    if REST:
        return first, load(base, stride, limit, ROWS, MAIN, REST, D, RAGGED)
    else:
        return first, first


@triton.jit
def store(base, stride, limit, values, FIRST: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr):
    """The counterpart of `load`, in the dtype of `base`."""
    rows = tl.arange(0, values.shape[0])[:, None]
    cols = FIRST + tl.arange(0, values.shape[1])[None, :]
    pointers = base + rows * stride + cols
    values = values.to(base.dtype.element_ty)
    if RAGGED and FIRST + values.shape[1] > D:
        tl.store(pointers, values, mask=(rows < limit) & (cols < D))
    elif RAGGED:
        tl.store(pointers, values, mask=rows < limit)
    elif FIRST + values.shape[1] > D:
        tl.store(pointers, values, mask=cols < D)
    else:
        tl.store(pointers, values)


@triton.jit
def load_vector(vector, FIRST: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr):
    """Columns of a norm's weight or of a head's part of the bias, in float32."""
    cols = FIRST + tl.arange(0, COLS)
    return tl.load(vector + cols, mask=cols < D, other=0.0).to(tl.float32)


@triton.jit
def load_biased(
    base,
    stride,
    limit,
    bias,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BIASED: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Both blocks of the columns of some rows, in float32 and with the bias, which rows from `limit` on have alone."""
    first, rest = load_head(base, stride, limit, ROWS, D, MAIN, REST, RAGGED)
    first, rest = first.to(tl.float32), rest.to(tl.float32)
    if BIASED:
        first += load_vector(bias, 0, MAIN, D)[None, :]
        if REST:
            rest += load_vector(bias, MAIN, REST, D)[None, :]
    return first, rest


@triton.jit
def turn(x, table, INVERSE: tl.constexpr):
    """Turn each pair of neighbouring columns by its angle, or back; `table` has (cos, sin) where `x` has the pair."""
    SHAPE: tl.constexpr = (x.shape[0], x.shape[1] // 2, 2)
    even, odd = tl.split(tl.reshape(x, SHAPE))
    cos, sin = tl.split(tl.reshape(table, SHAPE))
    if INVERSE:
        sin = -sin
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), x.shape)


@triton.jit
def inverse_rms(first, second, eps, D: tl.constexpr, REST: tl.constexpr):
    """1 / root mean square of each row, given its two blocks in float32."""
    squares = tl.sum(first * first, axis=1)
    if REST:
        squares += tl.sum(second * second, axis=1)
    return tl.rsqrt(squares / D + eps)


@triton.jit
def load_turned(
    base,
    stride,
    limit,
    table,
    weight,
    bias,
    eps,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    ROPE: tl.constexpr,
    NORM: tl.constexpr,
    BIASED: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Queries or keys with their bias, normed and rotated in float32 and rounded once to their dtype: both blocks."""
    if ROPE or NORM or BIASED:
        first, second = load_biased(base, stride, limit, bias, ROWS, D, MAIN, REST, BIASED, RAGGED)
        if NORM:
            scale = inverse_rms(first, second, eps, D, REST)[:, None]
            first = first * scale * load_vector(weight, 0, MAIN, D)[None, :]
            if REST:
                second = second * scale * load_vector(weight, MAIN, REST, D)[None, :]
        if ROPE:
            first = turn(first, load(table, D, limit, ROWS, 0, MAIN, D, RAGGED), False)
            if REST:
                second = turn(second, load(table, D, limit, ROWS, MAIN, REST, D, RAGGED), False)
        return first.to(base.dtype.element_ty), second.to(base.dtype.element_ty)
    else:
        return load_head(base, stride, limit, ROWS, D, MAIN, REST, RAGGED)


@triton.jit
def outer(a, a_rest, b, b_rest, REST: tl.constexpr):
    """a · bᵀ in float32, over the columns of both blocks."""
    product = tl.dot(a, tl.trans(b), input_precision="ieee")
    if REST:
        product = tl.dot(a_rest, tl.trans(b_rest), product, input_precision="ieee")
    return product


@triton.jit
def accumulate(weights, b, b_rest, acc, acc_rest, REST: tl.constexpr):
    """acc + weights · b for both blocks."""
    acc = tl.dot(weights, b, acc, input_precision="ieee")
    if REST:
        return acc, tl.dot(weights, b_rest, acc_rest, input_precision="ieee")
    else:
        return acc, acc_rest


@triton.jit
def zeros(ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    """What `accumulate` starts from."""
    first = tl.zeros((ROWS, MAIN), tl.float32)
    if REST:
        return first, tl.zeros((ROWS, REST), tl.float32)
    else:
        return first, first


@triton.jit
def hide_beyond(scores, left):
    """Scores [rows, keys] with −inf for the keys from `left` on."""
    return tl.where(tl.arange(0, scores.shape[1])[None, :] < left, scores, float("-inf"))


@triton.jit
def nothing_seen(ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    """What `see` starts from."""
    first, second = zeros(ROWS, MAIN, REST)
    return tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32), first, second


@triton.jit
def see(
    q, q_rest, k, k_rest, v, v_rest, top, total, acc, acc_rest, left, scale, REST: tl.constexpr, RAGGED: tl.constexpr
):
    """Let queries attend to one more block of keys, of which `left` exist (at least one, so that `top` is finite).

    `top`: the largest score so far, `total` and `acc`: sums of 2^(score − top) and of that times the values.
    """
    scores = outer(q, q_rest, k, k_rest, REST)
    if RAGGED:
        scores = hide_beyond(scores, left)
    higher = tl.maximum(top, tl.max(scores, axis=1) * scale)
    weights = tl.exp2(scores * scale - higher[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(weights, axis=1)
    acc, acc_rest = acc * shrink[:, None], acc_rest * shrink[:, None]
    acc, acc_rest = accumulate(weights.to(v.dtype), v, v_rest, acc, acc_rest, REST)
    return higher, total, acc, acc_rest


@triton.jit
def finish(
    out,
    lse,
    stride,
    left,
    acc,
    acc_rest,
    top,
    total,
    bias,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BIASED: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Divide by the sums of exponentials and store: a tile of the result, and log2 of those sums over all.

    The bias of the values is added here: weights that sum to 1 leave it as it is.
    """
    inverse = (1 / total)[:, None]
    acc *= inverse
    if REST:
        acc_rest *= inverse
    if BIASED:
        acc += load_vector(bias, 0, MAIN, D)[None, :]
        if REST:
            acc_rest += load_vector(bias, MAIN, REST, D)[None, :]
    store(out, stride, left, acc, 0, D, RAGGED)
    if REST:
        store(out, stride, left, acc_rest, MAIN, D, RAGGED)
    rows = tl.arange(0, acc.shape[0])
    tl.store(lse + rows, top + tl.log2(total), mask=rows < left)


@triton.jit(do_not_specialize=["tokens", "parts", "tiles"])
def rope_attention_fwd_resident_kernel(
    qkv, table, q_weight, k_weight, bias, out, lse, eps, scale, tokens, parts, tiles, stride_b, stride_3, stride_h,
    stride_n: tl.constexpr, heads: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr, ROPE: tl.constexpr,
    NORM: tl.constexpr, BIASED: tl.constexpr, RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Each program: `tiles` tiles of `BQ` queries of one head, and all its keys, in `BLOCKS` blocks of `BK`.

    The keys are read, normed, rotated and put in shared memory once.
    `scale` is that of the scores times log2(e); `lse` is log2 of the sum of exponentials.
    """
    part, head, sample = own_head(parts, heads)
    queries, keys, values = packed_rows(qkv, sample, head, stride_b, stride_3, stride_h, ALIGNED)
    cols: tl.constexpr = heads * D
    q_bias = bias + head * D if BIASED else bias
    k_bias = q_bias + cols if BIASED else bias
    v_bias = q_bias + 2 * cols if BIASED else bias
    out += sample * tokens * cols + head * D
    lse += (sample * heads + head) * tokens

    ks = ()
    vs = ()
    for i in tl.static_range(BLOCKS):
        at, left = tl.cast(i * BK, tl.int64), tokens - i * BK
        ks += (
            load_turned(
                keys + at * stride_n,
                stride_n,
                left,
                table + at * D if ROPE else table,
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
        vs += (load_head(values + at * stride_n, stride_n, left, BK, D, MAIN, REST, RAGGED_K),)
    for first in tl.range(part * tiles * BQ, tl.minimum((part + 1) * tiles * BQ, tokens), BQ, disable_licm=True):
        row, rows_left = tl.cast(first, tl.int64), tokens - first
        q, q_rest = load_turned(
            queries + row * stride_n,
            stride_n,
            rows_left,
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
        top, total, acc, acc_rest = nothing_seen(BQ, MAIN, REST)
        for i in tl.static_range(BLOCKS):
            top, total, acc, acc_rest = see(
                q,
                q_rest,
                ks[i][0],
                ks[i][1],
                vs[i][0],
                vs[i][1],
                top,
                total,
                acc,
                acc_rest,
                tokens - i * BK,
                scale,
                REST,
                RAGGED_K and i == BLOCKS - 1,
            )
        finish(
            out + row * cols,
            lse + row,
            cols,
            rows_left,
            acc,
            acc_rest,
            top,
            total,
            v_bias,
            D,
            MAIN,
            REST,
            BIASED,
            RAGGED_Q,
        )


@triton.jit(do_not_specialize=["tokens", "parts"])
def rope_attention_fwd_kernel(
    qkv, table, q_weight, k_weight, bias, out, lse, eps, scale, tokens, parts, stride_b, stride_3, stride_h,
    stride_n: tl.constexpr, heads: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, ROPE: tl.constexpr,
    NORM: tl.constexpr, BIASED: tl.constexpr, RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Each program: one tile of `BQ` queries, while the keys of the head pass by in blocks of `BK`.

    Programs of a head are neighbours, so its keys stay in L2. `scale` and `lse` as above.
    """
    part, head, sample = own_head(parts, heads)
    start, left = part.to(tl.int64) * BQ, tokens - part * BQ
    queries, keys, values = packed_rows(qkv, sample, head, stride_b, stride_3, stride_h, ALIGNED)
    cols: tl.constexpr = heads * D
    q_bias = bias + head * D if BIASED else bias
    k_bias = q_bias + cols if BIASED else bias
    v_bias = q_bias + 2 * cols if BIASED else bias
    out += (sample * tokens + start) * cols + head * D
    lse += (sample * heads + head) * tokens + start

    q, q_rest = load_turned(
        queries + start * stride_n,
        stride_n,
        left,
        table + start * D if ROPE else table,
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
    top, total, acc, acc_rest = nothing_seen(BQ, MAIN, REST)
    for first in range(0, tokens, BK):
        at = tl.cast(first, tl.int64)
        if NORM:
            tl.debug_barrier()  # else keys are loaded before the last ones are done with, and registers spill
        k, k_rest = load_turned(
            keys + at * stride_n,
            stride_n,
            tokens - first,
            table + at * D if ROPE else table,
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
        v, v_rest = load_head(values + at * stride_n, stride_n, tokens - first, BK, D, MAIN, REST, RAGGED_K)
        top, total, acc, acc_rest = see(
            q, q_rest, k, k_rest, v, v_rest, top, total, acc, acc_rest, tokens - first, scale, REST, RAGGED_K
        )
    finish(out, lse, cols, left, acc, acc_rest, top, total, v_bias, D, MAIN, REST, BIASED, RAGGED_Q)
