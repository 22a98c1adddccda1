"""The kernels of `adaln_rms_norm` and `gated_residual_adaln_rms_norm`; an argument that is None leaves its code out.

With r = rsqrt(mean(x'²) + eps), x̂ = x'·r and gain = weight·(1 + scale), the mean over the D channels of a token:

    x' = x + gate·(branch + bias)          dx = dx' + r·(dx̂ − x̂·mean(dx̂·x̂)), dx̂ = dy·gain
    y  = x̂·gain + shift                    dbranch = gate·dx

and with Σ over the tokens of a sample, S = Σ dy·x̂, no vector needs another pass over the tokens:

    dshift = Σ dy,  dscale = weight·S,  dweight = Σ_b (1 + scale)·S,
    dgate = Σ dx·branch + bias·Σ dx,  dbias = Σ_b gate·Σ dx

A program takes one chunk of a sample's tokens, one token at a time; the vectors and the sums stay in its registers. It
holds a token in blocks of columns whose widths BLOCK_D are powers of two: 1152 = 1024 + 128 keeps every lane busy,
where one block of 2048 would leave 44 % of them idle.

Shapes in memory and in the comments at the ends of lines:

    B, N, D      samples, tokens of a sample, channels
    x, branch, x_new (x'), y, dy, dx_new (dx'), dx, dbranch    [B, N, D], contiguous
    rstd         [B, N] float32, r of each token
    gate, shift, scale    [B, D], rows `…_stride` apart; weight, bias [D]
    partials     [B, chunks, 2 or 4, D] float32: Σ dy·x̂, Σ dy and, where there is a branch, Σ dx·branch, Σ dx of a chunk
    [BLOCK_D]    one row of the i-th block of columns, BLOCK_D[i] wide; a name in the plural holds a tuple of them, one
                 for each block
    []           one number
"""

import triton
import triton.language as tl


@triton.jit
def row_of(pointer, row, stride):
    return pointer + row.to(tl.int64) * stride


@triton.jit
def load(pointer, cols, D: tl.constexpr):
    """Elements `cols` of a row of D, as float32; 0 beyond its end."""
    return tl.load(pointer + cols, mask=cols < D, other=0.0).to(tl.float32)  # shape of cols


@triton.jit
def store(pointer, cols, value, D: tl.constexpr):
    """`value` as elements `cols` of a row of D, in the dtype that the row has."""
    tl.store(pointer + cols, value.to(pointer.dtype.element_ty), mask=cols < D)


@triton.jit
def modulated_norm_fwd(
    x, branch, gate, bias, weight, shift, scale, x_new, y, rstd,
    tokens, chunks, chunk_tokens, gate_stride, shift_stride, scale_stride, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """x' = x + gate·(branch + bias) where there is a branch, r = rsqrt(mean(x'²) + eps), y = x'·r·gain + shift."""
    sample, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    scale = row_of(scale, sample, scale_stride)
    if gate is not None:
        gate = row_of(gate, sample, gate_stride)
    if shift is not None:
        shift = row_of(shift, sample, shift_stride)
    columns, gates, biases, gains, shifts, start = (), (), (), (), (), 0
    for i in tl.static_range(len(BLOCK_D)):
        cols = start + tl.arange(0, BLOCK_D[i])  # [BLOCK_D]
        columns += (cols,)
        gains += (load(weight, cols, D) * (1 + load(scale, cols, D)),)  # [BLOCK_D]
        if gate is not None:
            gates += (load(gate, cols, D),)  # [BLOCK_D]
        if bias is not None:
            biases += (load(bias, cols, D),)  # [BLOCK_D]
        if shift is not None:
            shifts += (load(shift, cols, D),)  # [BLOCK_D]
        start += BLOCK_D[i]

    first = chunk * chunk_tokens
    for token in tl.range(first, tl.minimum(first + chunk_tokens, tokens), num_stages=NUM_STAGES):
        row = sample.to(tl.int64) * tokens + token
        # x' = x + gate·(branch + bias), and Σ x'² over the row
        values, squares = (), 0.0
        for i in tl.static_range(len(BLOCK_D)):
            value = load(x + row * D, columns[i], D)  # [BLOCK_D]
            if branch is not None:
                added = load(branch + row * D, columns[i], D)  # [BLOCK_D]
                if bias is not None:
                    added += biases[i]
                # The norm sees x' as it is returned, rounded to the dtype of the stream.
                rounded = (value + gates[i] * added).to(x_new.dtype.element_ty)  # [BLOCK_D]
                store(x_new + row * D, columns[i], rounded, D)
                value = rounded.to(tl.float32)  # [BLOCK_D]
            squares += tl.sum(value * value)  # []
            values += (value,)
        # y = x'·r·gain + shift
        r = tl.rsqrt(squares / D + eps)  # []
        tl.store(rstd + row, r)
        for i in tl.static_range(len(BLOCK_D)):
            result = values[i] * r * gains[i]  # [BLOCK_D]
            if shift is not None:
                result += shifts[i]
            store(y + row * D, columns[i], result, D)


@triton.jit
def modulated_norm_bwd(
    dy, dx_new, x_new, branch, rstd, gate, weight, scale, dx, dbranch, partials,
    tokens, chunks, chunk_tokens, gate_stride, scale_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr, SHIFT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """dx = dx' + r·(dx̂ − x̂·mean(dx̂·x̂)) with dx̂ = dy·gain, dbranch = gate·dx, and `partials` of the chunk.

    SHIFT, BIAS: whether there is a shift, a bias, whose gradient Σ dy, Σ dx is for.
    """
    sample, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    scale = row_of(scale, sample, scale_stride)
    if gate is not None:
        gate = row_of(gate, sample, gate_stride)
    columns, gates, gains, zeros, start = (), (), (), (), 0
    for i in tl.static_range(len(BLOCK_D)):
        cols = start + tl.arange(0, BLOCK_D[i])  # [BLOCK_D]
        columns += (cols,)
        gains += (load(weight, cols, D) * (1 + load(scale, cols, D)),)  # [BLOCK_D]
        if gate is not None:
            gates += (load(gate, cols, D),)  # [BLOCK_D]
        zeros += (tl.zeros(cols.shape, tl.float32),)  # [BLOCK_D]
        start += BLOCK_D[i]

    sum_dy_x, sum_dy, sum_dx_branch, sum_dx = zeros, zeros, zeros, zeros
    first = chunk * chunk_tokens
    for token in tl.range(first, tl.minimum(first + chunk_tokens, tokens), num_stages=NUM_STAGES):
        row = sample.to(tl.int64) * tokens + token
        r = tl.load(rstd + row)  # []
        # x̂ = x'·r, dx̂ = dy·gain, and Σ dx̂·x̂ over the row
        x_hats, dx_hats, dot = (), (), 0.0
        next_dy_x, next_dy, next_dx_branch, next_dx = (), (), (), ()
        for i in tl.static_range(len(BLOCK_D)):
            x_hat = load(x_new + row * D, columns[i], D) * r  # [BLOCK_D]
            grad = load(dy + row * D, columns[i], D)  # [BLOCK_D]
            dx_hat = grad * gains[i]  # [BLOCK_D]
            dot += tl.sum(dx_hat * x_hat)  # []
            next_dy_x += (sum_dy_x[i] + grad * x_hat,)  # [BLOCK_D]
            next_dy += (sum_dy[i] + grad,)  # [BLOCK_D]
            x_hats += (x_hat,)
            dx_hats += (dx_hat,)
        # dx = dx' + r·(dx̂ − x̂·mean(dx̂·x̂)), dbranch = gate·dx
        for i in tl.static_range(len(BLOCK_D)):
            d = (dx_hats[i] - x_hats[i] * (dot / D)) * r  # [BLOCK_D]
            if dx_new is not None:
                d += load(dx_new + row * D, columns[i], D)  # [BLOCK_D]
            store(dx + row * D, columns[i], d, D)
            if branch is not None:
                next_dx_branch += (sum_dx_branch[i] + d * load(branch + row * D, columns[i], D),)  # [BLOCK_D]
                next_dx += (sum_dx[i] + d,)  # [BLOCK_D]
                store(dbranch + row * D, columns[i], d * gates[i], D)
        sum_dy_x, sum_dy = next_dy_x, next_dy
        if branch is not None:
            sum_dx_branch, sum_dx = next_dx_branch, next_dx

    if partials is not None:
        for i in tl.static_range(len(BLOCK_D)):
            if branch is None:
                partial = partials + tl.program_id(0).to(tl.int64) * 2 * D
            else:
                partial = partials + tl.program_id(0).to(tl.int64) * 4 * D
                store(partial + 2 * D, columns[i], sum_dx_branch[i], D)
                if BIAS:
                    store(partial + 3 * D, columns[i], sum_dx[i], D)
            store(partial, columns[i], sum_dy_x[i], D)
            if SHIFT:
                store(partial + D, columns[i], sum_dy[i], D)


@triton.jit
def modulation_bwd(
    partials, gate, bias, weight, scale, dgate, dbias, dweight, dshift, dscale,
    samples, chunks, gate_stride, scale_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Adds up `partials` in the order of the chunks; a program makes BLOCK_D columns of every gradient, in all samples.

    dscale = weight·S, dshift = Σ dy, dgate = Σ dx·branch + bias·Σ dx of each sample; of BLOCK_B samples at a time
    dweight = Σ_b (1 + scale)·S and dbias = Σ_b gate·Σ dx, with S = Σ dy·x̂. Here BLOCK_D is one width.
    """
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    num_sums = 2
    if gate is not None:
        num_sums = 4
    weights = load(weight, cols, D)[None, :]  # [1, BLOCK_D]
    zeros = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)  # [BLOCK_B, BLOCK_D]
    sum_dweight, sum_dbias = zeros, zeros  # [BLOCK_B, BLOCK_D]
    for first in range(0, samples, BLOCK_B):
        sample = first + tl.arange(0, BLOCK_B)[:, None].to(tl.int64)  # [BLOCK_B, 1]
        mask = (sample < samples) & (cols < D)[None, :]  # [BLOCK_B, BLOCK_D]
        scales = tl.load(scale + sample * scale_stride + cols[None, :], mask, 0.0).to(tl.float32)  # [BLOCK_B, BLOCK_D]
        if bias is not None:
            gates = tl.load(gate + sample * gate_stride + cols[None, :], mask, 0.0).to(tl.float32)  # [BLOCK_B, BLOCK_D]
        sum_dy_x, sum_dy, sum_dx_branch, sum_dx = zeros, zeros, zeros, zeros  # [BLOCK_B, BLOCK_D]
        partial = partials + sample * chunks * (num_sums * D) + cols[None, :]  # [BLOCK_B, BLOCK_D]
        for _ in tl.range(0, chunks, loop_unroll_factor=4):
            sum_dy_x += tl.load(partial, mask=mask, other=0.0)  # [BLOCK_B, BLOCK_D]
            if dshift is not None:
                sum_dy += tl.load(partial + D, mask=mask, other=0.0)  # [BLOCK_B, BLOCK_D]
            if gate is not None:
                sum_dx_branch += tl.load(partial + 2 * D, mask=mask, other=0.0)  # [BLOCK_B, BLOCK_D]
            if bias is not None:
                sum_dx += tl.load(partial + 3 * D, mask=mask, other=0.0)  # [BLOCK_B, BLOCK_D]
            partial += num_sums * D

        offsets = sample * D + cols[None, :]  # [BLOCK_B, BLOCK_D]
        tl.store(dscale + offsets, (weights * sum_dy_x).to(dscale.dtype.element_ty), mask=mask)
        sum_dweight += (1 + scales) * sum_dy_x  # [BLOCK_B, BLOCK_D]
        if dshift is not None:
            tl.store(dshift + offsets, sum_dy.to(dshift.dtype.element_ty), mask=mask)
        if bias is not None:
            sum_dbias += gates * sum_dx  # [BLOCK_B, BLOCK_D]
            sum_dx_branch += load(bias, cols, D)[None, :] * sum_dx  # [BLOCK_B, BLOCK_D]
        if gate is not None:
            tl.store(dgate + offsets, sum_dx_branch.to(dgate.dtype.element_ty), mask=mask)
    store(dweight, cols, tl.sum(sum_dweight, axis=0), D)
    if bias is not None:
        store(dbias, cols, tl.sum(sum_dbias, axis=0), D)
