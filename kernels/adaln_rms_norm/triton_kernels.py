"""The kernels of `adaln_rms_norm` and `gated_residual_adaln_rms_norm`; an argument that is None leaves its code out.

With r = rsqrt(mean(x'²) + eps), x̂ = x'·r and h = weight·(1 + scale), the mean over the D channels of a token:

    x' = x + gate·(branch + bias)          dx = upstream + r·(dy·h − x̂·mean(dy·h·x̂))
    y  = x̂·h + shift                       dbranch = gate·dx

and with Σ over the tokens of a sample, S = Σ dy·x̂, no vector needs another pass over the tokens:

    dshift = Σ dy,  dscale = weight·S,  dweight = Σ_b (1 + scale)·S,
    dgate = Σ dx·branch + bias·Σ dx,  dbias = Σ_b gate·Σ dx

A program takes one chunk of a sample's tokens, one token at a time; the vectors and the sums stay in its registers. It
holds a token as PARTS, blocks of columns whose widths are powers of two: 1152 = 1024 + 128 keeps every lane busy, where
one block of 2048 would leave 44 % of them idle.
"""

import triton
import triton.language as tl


@triton.jit
def _row(pointer, row, stride):
    return pointer + row.to(tl.int64) * stride


@triton.jit
def _read(pointer, columns, D: tl.constexpr):
    return tl.load(pointer + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def _write(pointer, columns, value, D: tl.constexpr):
    tl.store(pointer + columns, value.to(pointer.dtype.element_ty), mask=columns < D)


@triton.jit
def modulated_norm_fwd(
    x, branch, gate, bias, weight, shift, scale, x_new, y, rstd,
    tokens, chunks, chunk_tokens, gate_stride, shift_stride, scale_stride, eps,
    D: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    sample, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    scale = _row(scale, sample, scale_stride)
    if gate is not None:
        gate = _row(gate, sample, gate_stride)
    if shift is not None:
        shift = _row(shift, sample, shift_stride)
    columns, gates, biases, gains, shifts, start = (), (), (), (), (), 0
    for i in tl.static_range(len(PARTS)):
        cols = start + tl.arange(0, PARTS[i])
        columns += (cols,)
        gains += (_read(weight, cols, D) * (1 + _read(scale, cols, D)),)
        if gate is not None:
            gates += (_read(gate, cols, D),)
        if bias is not None:
            biases += (_read(bias, cols, D),)
        if shift is not None:
            shifts += (_read(shift, cols, D),)
        start += PARTS[i]

    first = chunk * chunk_tokens
    for token in tl.range(first, tl.minimum(first + chunk_tokens, tokens), num_stages=STAGES):
        row = sample.to(tl.int64) * tokens + token
        values, squares = (), 0.0
        for i in tl.static_range(len(PARTS)):
            value = _read(x + row * D, columns[i], D)
            if branch is not None:
                added = _read(branch + row * D, columns[i], D)
                if bias is not None:
                    added += biases[i]
                # The norm sees x' as it is returned, rounded to the dtype of the stream.
                rounded = (value + gates[i] * added).to(x_new.dtype.element_ty)
                _write(x_new + row * D, columns[i], rounded, D)
                value = rounded.to(tl.float32)
            squares += tl.sum(value * value)
            values += (value,)
        r = tl.rsqrt(squares / D + eps)
        tl.store(rstd + row, r)
        for i in tl.static_range(len(PARTS)):
            result = values[i] * r * gains[i]
            if shift is not None:
                result += shifts[i]
            _write(y + row * D, columns[i], result, D)


@triton.jit
def modulated_norm_bwd(
    dy, upstream, x_new, branch, rstd, gate, weight, scale, dx, dbranch, sums,
    tokens, chunks, chunk_tokens, gate_stride, scale_stride,
    D: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, SHIFT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """`sums` [sample, chunk, 2 or 4, D]: Σ dy·x̂, Σ dy, and where there is a branch Σ dx·branch, Σ dx of the chunk."""
    sample, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    scale = _row(scale, sample, scale_stride)
    if gate is not None:
        gate = _row(gate, sample, gate_stride)
    columns, gates, gains, zeros, start = (), (), (), (), 0
    for i in tl.static_range(len(PARTS)):
        cols = start + tl.arange(0, PARTS[i])
        columns += (cols,)
        gains += (_read(weight, cols, D) * (1 + _read(scale, cols, D)),)
        if gate is not None:
            gates += (_read(gate, cols, D),)
        zeros += (tl.zeros(cols.shape, tl.float32),)
        start += PARTS[i]

    sum_dy_x, sum_dy, sum_dx_branch, sum_dx = zeros, zeros, zeros, zeros
    first = chunk * chunk_tokens
    for token in tl.range(first, tl.minimum(first + chunk_tokens, tokens), num_stages=STAGES):
        row = sample.to(tl.int64) * tokens + token
        r = tl.load(rstd + row)
        normed, slopes, dot = (), (), 0.0
        next_dy_x, next_dy, next_dx_branch, next_dx = (), (), (), ()
        for i in tl.static_range(len(PARTS)):
            x_hat = _read(x_new + row * D, columns[i], D) * r
            grad = _read(dy + row * D, columns[i], D)
            slope = grad * gains[i]
            dot += tl.sum(slope * x_hat)
            next_dy_x += (sum_dy_x[i] + grad * x_hat,)
            next_dy += (sum_dy[i] + grad,)
            normed += (x_hat,)
            slopes += (slope,)
        for i in tl.static_range(len(PARTS)):
            d = (slopes[i] - normed[i] * (dot / D)) * r
            if upstream is not None:
                d += _read(upstream + row * D, columns[i], D)
            _write(dx + row * D, columns[i], d, D)
            if branch is not None:
                next_dx_branch += (sum_dx_branch[i] + d * _read(branch + row * D, columns[i], D),)
                next_dx += (sum_dx[i] + d,)
                _write(dbranch + row * D, columns[i], d * gates[i], D)
        sum_dy_x, sum_dy = next_dy_x, next_dy
        if branch is not None:
            sum_dx_branch, sum_dx = next_dx_branch, next_dx

    if sums is not None:
        for i in tl.static_range(len(PARTS)):
            if branch is None:
                place = sums + tl.program_id(0).to(tl.int64) * 2 * D
            else:
                place = sums + tl.program_id(0).to(tl.int64) * 4 * D
                _write(place + 2 * D, columns[i], sum_dx_branch[i], D)
                if BIAS:
                    _write(place + 3 * D, columns[i], sum_dx[i], D)
            _write(place, columns[i], sum_dy_x[i], D)
            if SHIFT:
                _write(place + D, columns[i], sum_dy[i], D)


@triton.jit
def modulation_bwd(
    sums, gate, bias, weight, scale, dgate, dbias, dweight, dshift, dscale,
    samples, chunks, gate_stride, scale_stride,
    D: tl.constexpr, COLUMNS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Adds up `sums` in the order of the chunks; a program makes COLUMNS of every gradient, in all samples."""
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    kinds = 2
    if gate is not None:
        kinds = 4
    weights = _read(weight, cols, D)[None, :]
    zeros = tl.zeros([SAMPLES, COLUMNS], tl.float32)
    weight_sum, bias_sum = zeros, zeros
    for first in range(0, samples, SAMPLES):
        sample = first + tl.arange(0, SAMPLES)[:, None].to(tl.int64)
        inside = (sample < samples) & (cols < D)[None, :]
        scales = tl.load(scale + sample * scale_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            gates = tl.load(gate + sample * gate_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        sum_dy_x, sum_dy, sum_dx_branch, sum_dx = zeros, zeros, zeros, zeros
        place = sums + sample * chunks * (kinds * D) + cols[None, :]
        for _ in tl.range(0, chunks, loop_unroll_factor=4):
            sum_dy_x += tl.load(place, mask=inside, other=0.0)
            if dshift is not None:
                sum_dy += tl.load(place + D, mask=inside, other=0.0)
            if gate is not None:
                sum_dx_branch += tl.load(place + 2 * D, mask=inside, other=0.0)
            if bias is not None:
                sum_dx += tl.load(place + 3 * D, mask=inside, other=0.0)
            place += kinds * D

        at = sample * D + cols[None, :]
        tl.store(dscale + at, (weights * sum_dy_x).to(dscale.dtype.element_ty), mask=inside)
        weight_sum += (1 + scales) * sum_dy_x
        if dshift is not None:
            tl.store(dshift + at, sum_dy.to(dshift.dtype.element_ty), mask=inside)
        if bias is not None:
            bias_sum += gates * sum_dx
            sum_dx_branch += _read(bias, cols, D)[None, :] * sum_dx
        if gate is not None:
            tl.store(dgate + at, sum_dx_branch.to(dgate.dtype.element_ty), mask=inside)
    _write(dweight, cols, tl.sum(weight_sum, axis=0), D)
    if bias is not None:
        _write(dbias, cols, tl.sum(bias_sum, axis=0), D)
