"""Device functions shared by the forward and the backward kernels of `rope_attention`.

Letters, here and in the kernels:

    B, N, H, D    samples, tokens, heads, width of a head
    BQ, BK        rows of a block of queries (and of their gradients), of a block of keys and values
    MAIN, REST    columns of the two tiles that hold the D columns of a head; REST is 0 where one tile is enough
    R, C          rows and columns of any tile

A shape `[R, D]` in a comment means a pair of tiles, `[R, MAIN]` and `[R, REST]`: 72 = 64 + 8, where the second is
padded with zeros to 16 and the whole never to 128. Without a second tile a pair holds the first one twice. Rows and
columns that do not exist are loaded as 0, so products need no masks but that of the softmax.
"""

import triton
import triton.language as tl


@triton.jit
def program_coordinates(programs, H: tl.constexpr):
    """Which of the `programs` of a head this one is, its head and its sample.

    Programs of a head are neighbours, so that its keys stay in L2.
    """
    pid = tl.program_id(0)
    return pid % programs, (pid // programs % H).to(tl.int64), (pid // programs // H).to(tl.int64)


@triton.jit
def qkv_pointers(qkv_ptr, sample, head, stride_b, stride_3, stride_h, ALIGNED: tl.constexpr):
    """Addresses of the first query, key and value of a head."""
    q_ptr = qkv_ptr + sample * stride_b + tl.multiple_of(head * stride_h, ALIGNED)
    return q_ptr, q_ptr + stride_3, q_ptr + 2 * tl.cast(stride_3, tl.int64)


@triton.jit
def load_tile(
    ptr, stride_n, remaining,
    R: tl.constexpr, FIRST: tl.constexpr, C: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Load [R, C]: columns FIRST to FIRST + C, 0 from column D on; rows from `remaining` on are 0 if RAGGED."""
    rows = tl.arange(0, R)[:, None]  # [R, 1]
    cols = FIRST + tl.arange(0, C)[None, :]  # [1, C]
    ptrs = ptr + rows * stride_n + cols  # [R, C]
    if RAGGED and FIRST + C > D:
        return tl.load(ptrs, mask=(rows < remaining) & (cols < D), other=0.0)  # [R, C]
    elif RAGGED:
        return tl.load(ptrs, mask=rows < remaining, other=0.0)  # [R, C]
    elif FIRST + C > D:
        return tl.load(ptrs, mask=cols < D, other=0.0)  # [R, C]
    else:
        return tl.load(ptrs)  # [R, C]


@triton.jit
def load_rows(
    ptr, stride_n, remaining,
    R: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Load [R, D]; rows from `remaining` on are 0 if RAGGED."""
    main = load_tile(ptr, stride_n, remaining, R=R, FIRST=0, C=MAIN, D=D, RAGGED=RAGGED)  # [R, MAIN]
    if REST:
        rest = load_tile(ptr, stride_n, remaining, R=R, FIRST=MAIN, C=REST, D=D, RAGGED=RAGGED)  # [R, REST]
        return main, rest
    else:
        return main, main


@triton.jit
def store_tile(ptr, stride_n, remaining, x, FIRST: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr):
    """Store x [R, C] where `load_tile` would read it, in the dtype of `ptr`."""
    rows = tl.arange(0, x.shape[0])[:, None]  # [R, 1]
    cols = FIRST + tl.arange(0, x.shape[1])[None, :]  # [1, C]
    ptrs = ptr + rows * stride_n + cols  # [R, C]
    x = x.to(ptr.dtype.element_ty)  # [R, C]
    if RAGGED and FIRST + x.shape[1] > D:
        tl.store(ptrs, x, mask=(rows < remaining) & (cols < D))
    elif RAGGED:
        tl.store(ptrs, x, mask=rows < remaining)
    elif FIRST + x.shape[1] > D:
        tl.store(ptrs, x, mask=cols < D)
    else:
        tl.store(ptrs, x)


@triton.jit
def store_rows(ptr, stride_n, remaining, x, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
               RAGGED: tl.constexpr):  # fmt: skip
    """Store x [R, D] where `load_rows` would read it."""
    store_tile(ptr, stride_n, remaining, x[0], FIRST=0, D=D, RAGGED=RAGGED)
    if REST:
        store_tile(ptr, stride_n, remaining, x[1], FIRST=MAIN, D=D, RAGGED=RAGGED)


@triton.jit
def load_vector(ptr, FIRST: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Load [1, C] in float32: of a norm's weight, or of one head's part of the bias."""
    cols = FIRST + tl.arange(0, C)  # [C]
    return tl.load(ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]  # [1, C]


@triton.jit
def load_biased(
    ptr, stride_n, remaining, bias_ptr,
    R: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Load [R, D] in float32 and add the bias, which rows from `remaining` on have alone."""
    main, rest = load_rows(ptr, stride_n, remaining, R=R, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED)  # [R, D]
    main, rest = main.to(tl.float32), rest.to(tl.float32)  # [R, D]
    if bias_ptr is not None:
        main += load_vector(bias_ptr, 0, MAIN, D)  # [R, MAIN]
        if REST:
            rest += load_vector(bias_ptr, MAIN, REST, D)  # [R, REST]
    return main, rest


@triton.jit
def rstd(x, eps, D: tl.constexpr, REST: tl.constexpr):
    """[R, 1] of x [R, D] in float32: 1 / sqrt(Σ x² / D + eps) over each row."""
    squares = tl.sum(x[0] * x[0], axis=1)  # [R]
    if REST:
        squares += tl.sum(x[1] * x[1], axis=1)  # [R]
    return tl.rsqrt(squares / D + eps)[:, None]  # [R, 1]


@triton.jit
def apply_rope(x, cos_sin, INVERSE: tl.constexpr):
    """Rotate each pair of neighbouring columns of x [R, C] by its angle, or by minus that angle.

    (x₀, x₁) → (x₀·cos − x₁·sin, x₁·cos + x₀·sin); cos_sin [R, C] has cos and sin where x has the pair.
    """
    PAIRS: tl.constexpr = (x.shape[0], x.shape[1] // 2, 2)
    x0, x1 = tl.split(tl.reshape(x, PAIRS))  # [R, C / 2] each
    cos, sin = tl.split(tl.reshape(cos_sin, PAIRS))  # [R, C / 2] each
    if INVERSE:
        sin = -sin
    return tl.reshape(tl.join(x0 * cos - x1 * sin, x1 * cos + x0 * sin), x.shape)  # [R, C]


@triton.jit
def apply_rope_rows(
    x, table_ptr, remaining,
    D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, RAGGED: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """`apply_rope` to x [R, D], whose angles begin at `table_ptr`."""
    R: tl.constexpr = x[0].shape[0]
    main, rest = x
    cos_sin = load_tile(table_ptr, D, remaining, R=R, FIRST=0, C=MAIN, D=D, RAGGED=RAGGED)  # [R, MAIN]
    main = apply_rope(main, cos_sin, INVERSE)  # [R, MAIN]
    if REST:
        cos_sin = load_tile(table_ptr, D, remaining, R=R, FIRST=MAIN, C=REST, D=D, RAGGED=RAGGED)  # [R, REST]
        rest = apply_rope(rest, cos_sin, INVERSE)  # [R, REST]
    return main, rest


@triton.jit
def load_qk(
    ptr, stride_n, remaining, table_ptr, weight_ptr, bias_ptr, eps,
    R: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Load queries or keys [R, D] as the scores take them: rope(rms_norm(x + bias) · weight).

    A step whose pointer is None is left out. Computed in float32 and rounded once, to the dtype of `ptr`.
    """
    if table_ptr is not None or weight_ptr is not None or bias_ptr is not None:
        main, rest = load_biased(  # [R, D]
            ptr, stride_n, remaining, bias_ptr, R=R, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED
        )
        if weight_ptr is not None:
            scale = rstd((main, rest), eps, D, REST)  # [R, 1]
            main = main * scale * load_vector(weight_ptr, 0, MAIN, D)  # [R, MAIN]
            if REST:
                rest = rest * scale * load_vector(weight_ptr, MAIN, REST, D)  # [R, REST]
        if table_ptr is not None:
            main, rest = apply_rope_rows(  # [R, D]
                (main, rest), table_ptr, remaining, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED, INVERSE=False
            )
        return main.to(ptr.dtype.element_ty), rest.to(ptr.dtype.element_ty)  # [R, D]
    else:
        return load_rows(ptr, stride_n, remaining, R=R, D=D, MAIN=MAIN, REST=REST, RAGGED=RAGGED)  # [R, D]


@triton.jit
def dot_nt(a, b, REST: tl.constexpr):
    """a · bᵀ, float32 [Ra, Rb], of a [Ra, D] and b [Rb, D]."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")  # [Ra, Rb]
    if REST:
        product = tl.dot(a[1], tl.trans(b[1]), product, input_precision="ieee")  # [Ra, Rb]
    return product


@triton.jit
def dot_acc(p, b, acc, REST: tl.constexpr):
    """acc + p · b, float32 [Rp, D], of p [Rp, Rb] and b [Rb, D]."""
    main = tl.dot(p, b[0], acc[0], input_precision="ieee")  # [Rp, MAIN]
    if REST:
        return main, tl.dot(p, b[1], acc[1], input_precision="ieee")  # [Rp, D]
    else:
        return main, acc[1]


@triton.jit
def zeros(R: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    """Float32 zeros [R, D], for `dot_acc` to add to."""
    main = tl.zeros((R, MAIN), tl.float32)  # [R, MAIN]
    if REST:
        return main, tl.zeros((R, REST), tl.float32)  # [R, D]
    else:
        return main, main


@triton.jit
def mask_scores(scores, remaining):
    """scores [Rq, Rk] with −inf for the keys from `remaining` on."""
    return tl.where(tl.arange(0, scores.shape[1])[None, :] < remaining, scores, float("-inf"))  # [Rq, Rk]
