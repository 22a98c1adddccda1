"""The Triton kernels of `group_norm_silu`. A program takes `chunk` positions of one sample with C of their channels.

In channels-last memory those are all channels; else the channels of a sample are SPLITS parts of whole groups, and part
`i` of sample `b` is number `b`·SPLITS + `i` wherever sums and statistics are kept. GROUPS are those of a part.

With h = x̂·weight + bias and dh = dy·silu'(h), the sums Σ dh and Σ dh·x̂ of each channel give dbias and dweight, and
weighted and added up over the channels of a group, s1 and s2:

    dx = rstd·(dh·weight − (s1 + x̂·s2) / M)        M elements in a group

The mean is kept with what its rounding leaves, `rest`, for the rounding alone of a mean that is much larger than the
deviations would move every x̂ the same way. `rest` is in units of x̂ and costs nothing in the loops over positions: it
goes into the bias, and into the sums afterwards.

Sums over chunks are added up by whoever needs them, always in the same order: there are at most 128 for a part.
`…_b`, `…_c` and `…_n` are strides over samples, channels and positions; one of the last two is 1 in practice.
"""

import triton
import triton.language as tl


@triton.jit
def group_norm_silu_statistics(
    x, sums, positions, chunk, x_b, x_c, x_n, C: tl.constexpr, GROUPS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of each group in a chunk, float32 [parts, chunks, 3, GROUPS]: an origin, the mean from there, squared deviations.

    Deviations are taken from the mean of the chunk's first tile, channel by channel, so that a mean much larger than
    the deviations costs no digits; channels, and later chunks, are joined by their means (Chan, Golub, LeVeque 1979).
    """
    start, count = chunk_of(positions, chunk)
    x += first_of(tl.program_id(1), start, x_b, x_c, x_n, C, SPLITS)
    c, row = tl.arange(0, BLOCK_C), tl.arange(0, ROWS)
    at = row[:, None] * x_n + (c.to(tl.int64) * x_c)[None, :]
    first = tl.load(x + at, (row < count)[:, None] & (c < C)[None, :], 0.0).to(tl.float32)
    origin = tl.sum(first, 0) / tl.minimum(count, ROWS)
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    squares = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for done in tl.range(0, count, ROWS, num_stages=STAGES):
        inside = (row < count - done)[:, None] & (c < C)[None, :]
        tile = tl.load(x + done * x_n + at, inside, 0.0).to(tl.float32)
        deviation = tl.where(inside, tile - origin[None, :], 0.0)
        total += deviation
        squares += deviation * deviation
    away = tl.sum(total, 0) / count
    spread = tl.sum(squares, 0) - away * away * count

    member = members(C, GROUPS, BLOCK_C, BLOCK_G)
    group_origin = of_groups(origin, member) * (GROUPS / C)
    away += origin - of_channels(group_origin, member)
    group_away = of_groups(away, member) * (GROUPS / C)
    apart = away - of_channels(group_away, member)
    group_spread = of_groups(spread + count * apart * apart, member)
    store_rows(sums, (group_origin, group_away, group_spread), tl.arange(0, BLOCK_G), GROUPS)


@triton.jit
def group_norm_silu_apply(
    x, weight, bias, sums, statistics, y, positions, chunk, chunks, eps, x_b, x_c, x_n, y_b, y_c, y_n,
    C: tl.constexpr, GROUPS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The result, and float32 [3, parts, GROUPS]: mean, 1 / sqrt(var + eps) and rest."""
    part = tl.program_id(1).to(tl.int64)
    g, k = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_K)
    sums += part * chunks * (3 * GROUPS)
    origins, aways, spreads = load_rows(sums + k.to(tl.int64)[:, None] * (3 * GROUPS), k < chunks, g, GROUPS, 3)
    sizes = tl.where(k < chunks, tl.minimum(chunk, positions - k * chunk), 0).to(tl.float32)[:, None]
    origin = tl.load(sums + g, g < GROUPS, 0.0)
    aways += origins - origin[None, :]
    away = tl.sum(sizes * aways, 0) / positions
    apart = aways - away[None, :]
    spread = tl.sum(spreads + sizes * (C // GROUPS) * apart * apart, 0)
    rstd = 1 / tl.sqrt_rn(spread / (positions * (C // GROUPS)) + eps)
    mean = origin + away
    rest = (away - (mean - origin)) * rstd
    if tl.program_id(0) == 0:
        at, size = part * GROUPS + g, tl.num_programs(1).to(tl.int64) * GROUPS
        tl.store(statistics + at, mean, g < GROUPS)
        tl.store(statistics + size + at, rstd, g < GROUPS)
        tl.store(statistics + 2 * size + at, rest, g < GROUPS)

    member = members(C, GROUPS, BLOCK_C, BLOCK_G)
    mean = of_channels(mean, member)
    c, row = tl.arange(0, BLOCK_C), tl.arange(0, ROWS)
    gain, shift = channels_at(weight, part, c, C, SPLITS), channels_at(bias, part, c, C, SPLITS)
    shift -= gain * of_channels(rest, member)
    gain *= of_channels(rstd, member)
    start, count = chunk_of(positions, chunk)
    x += first_of(part, start, x_b, x_c, x_n, C, SPLITS)
    y += first_of(part, start, y_b, y_c, y_n, C, SPLITS)
    x_at = row[:, None] * x_n + (c.to(tl.int64) * x_c)[None, :]
    y_at = row[:, None] * y_n + (c.to(tl.int64) * y_c)[None, :]
    for done in tl.range(0, count, ROWS, num_stages=STAGES):
        inside = (row < count - done)[:, None] & (c < C)[None, :]
        tile = tl.load(x + done * x_n + x_at, inside, 0.0).to(tl.float32)
        h = (tile - mean[None, :]) * gain[None, :] + shift[None, :]
        tl.store(y + done * y_n + y_at, (h * tl.sigmoid(h)).to(y.dtype.element_ty), inside)


@triton.jit
def group_norm_silu_sums(
    dy, x, weight, bias, statistics, channel_sums, group_sums, positions, chunk, dy_b, dy_c, dy_n, x_b, x_c, x_n,
    C: tl.constexpr, GROUPS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Σ dh and Σ dh·x̂ of a chunk: of channels [parts, chunks, 2, C], weighted of groups [parts, chunks, 2, GROUPS]."""
    part = tl.program_id(1).to(tl.int64)
    c, row = tl.arange(0, BLOCK_C), tl.arange(0, ROWS)
    mean, rstd, rest = statistics_of(statistics, part, tl.num_programs(1), c, C, GROUPS)
    gain, shift = channels_at(weight, part, c, C, SPLITS), channels_at(bias, part, c, C, SPLITS)
    shift -= gain * rest
    start, count = chunk_of(positions, chunk)
    x += first_of(part, start, x_b, x_c, x_n, C, SPLITS)
    dy += first_of(part, start, dy_b, dy_c, dy_n, C, SPLITS)
    x_at = row[:, None] * x_n + (c.to(tl.int64) * x_c)[None, :]
    dy_at = row[:, None] * dy_n + (c.to(tl.int64) * dy_c)[None, :]
    plain = tl.zeros((ROWS, BLOCK_C), tl.float32)
    scaled = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for done in tl.range(0, count, ROWS, num_stages=STAGES):
        inside = (row < count - done)[:, None] & (c < C)[None, :]
        tile = tl.load(x + done * x_n + x_at, inside, 0.0).to(tl.float32)
        upstream = tl.load(dy + done * dy_n + dy_at, inside, 0.0).to(tl.float32)
        x_hat = (tile - mean[None, :]) * rstd[None, :]
        dh = upstream * silu_slope(x_hat * gain[None, :] + shift[None, :])  # 0 outside, for upstream is
        plain += dh
        scaled += dh * x_hat
    plain_sum = tl.sum(plain, 0)
    scaled_sum = tl.sum(scaled, 0) - rest * plain_sum
    store_rows(channel_sums, (plain_sum, scaled_sum), c, C)
    member = members(C, GROUPS, BLOCK_C, BLOCK_G)
    of_weighted = of_groups(gain * plain_sum, member), of_groups(gain * scaled_sum, member)
    store_rows(group_sums, of_weighted, tl.arange(0, BLOCK_G), GROUPS)


@triton.jit
def group_norm_silu_gradients(
    dy, x, weight, bias, statistics, channel_sums, group_sums, dx, dweight, dbias, samples, positions, chunk, chunks,
    dy_b, dy_c, dy_n, x_b, x_c, x_n, dx_b, dx_c, dx_n, C: tl.constexpr, GROUPS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_S: tl.constexpr,
    OF_WEIGHTS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx. With OF_WEIGHTS the first rows of programs, one for each split, add up dweight and dbias."""
    part = tl.program_id(1).to(tl.int64) - OF_WEIGHTS * SPLITS
    if part < 0:
        sum_weights(channel_sums, dweight, dbias, samples, chunks, C, SPLITS, BLOCK_W, BLOCK_S)
    else:
        g, k = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_K)
        rows = group_sums + (part * chunks + k)[:, None] * (2 * GROUPS)
        plain, scaled = load_rows(rows, k < chunks, g, GROUPS, 2)
        member = members(C, GROUPS, BLOCK_C, BLOCK_G)
        c, row = tl.arange(0, BLOCK_C), tl.arange(0, ROWS)
        mean, rstd, rest = statistics_of(statistics, part, tl.num_programs(1) - OF_WEIGHTS * SPLITS, c, C, GROUPS)
        gain, shift = channels_at(weight, part, c, C, SPLITS), channels_at(bias, part, c, C, SPLITS)
        shift -= gain * rest
        share = rstd / (positions * (C // GROUPS))
        slope = of_channels(tl.sum(scaled, 0), member) * share
        constant = of_channels(tl.sum(plain, 0), member) * share - rest * slope
        start, count = chunk_of(positions, chunk)
        x += first_of(part, start, x_b, x_c, x_n, C, SPLITS)
        dy += first_of(part, start, dy_b, dy_c, dy_n, C, SPLITS)
        dx += first_of(part, start, dx_b, dx_c, dx_n, C, SPLITS)
        x_at = row[:, None] * x_n + (c.to(tl.int64) * x_c)[None, :]
        dy_at = row[:, None] * dy_n + (c.to(tl.int64) * dy_c)[None, :]
        dx_at = row[:, None] * dx_n + (c.to(tl.int64) * dx_c)[None, :]
        for done in tl.range(0, count, ROWS, num_stages=STAGES):
            inside = (row < count - done)[:, None] & (c < C)[None, :]
            tile = tl.load(x + done * x_n + x_at, inside, 0.0).to(tl.float32)
            upstream = tl.load(dy + done * dy_n + dy_at, inside, 0.0).to(tl.float32)
            x_hat = (tile - mean[None, :]) * rstd[None, :]
            dh = upstream * silu_slope(x_hat * gain[None, :] + shift[None, :])
            gradient = dh * (gain * rstd)[None, :] - constant[None, :] - x_hat * slope[None, :]
            tl.store(dx + done * dx_n + dx_at, gradient.to(dx.dtype.element_ty), inside)


@triton.jit
def sum_weights(
    channel_sums, dweight, dbias, samples, chunks, C: tl.constexpr, SPLITS: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """BLOCK_W channels of both, BLOCK_S sums at a time."""
    split = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    plain = tl.zeros((BLOCK_S, BLOCK_W), tl.float32)
    scaled = tl.zeros((BLOCK_S, BLOCK_W), tl.float32)
    for first in range(0, samples * chunks, BLOCK_S):
        k = first + tl.arange(0, BLOCK_S)
        row = (k // chunks * SPLITS + split).to(tl.int64) * chunks + k % chunks
        more = load_rows(channel_sums + row[:, None] * (2 * C), k < samples * chunks, c, C, 2)
        plain += more[0]
        scaled += more[1]
    tl.store(dbias + split * C + c, tl.sum(plain, 0).to(dbias.dtype.element_ty), c < C)
    tl.store(dweight + split * C + c, tl.sum(scaled, 0).to(dweight.dtype.element_ty), c < C)


@triton.jit
def chunk_of(positions, chunk):
    """Where this program's chunk starts, and how many positions it has."""
    start = tl.program_id(0) * chunk
    return start, tl.minimum(chunk, positions - start)


@triton.jit
def first_of(part, start, of_sample, of_channel, of_position, C: tl.constexpr, SPLITS: tl.constexpr):
    """The offset of the part's first channel at position `start`."""
    channel = (part % SPLITS * C).to(tl.int64)
    return (part // SPLITS).to(tl.int64) * of_sample + channel * of_channel + start.to(tl.int64) * of_position


@triton.jit
def members(C: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    """[BLOCK_G, BLOCK_C]: whether a channel is of a group."""
    c, g = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_G)
    return ((c // (C // GROUPS))[None, :] == g[:, None]) & (c < C)[None, :]


@triton.jit
def of_groups(channels, member):
    """The sum over the channels of each group."""
    return tl.sum(tl.where(member, channels[None, :], 0.0), 1)


@triton.jit
def of_channels(groups, member):
    """For each channel the number of its group."""
    return tl.sum(tl.where(member, groups[:, None], 0.0), 0)


@triton.jit
def channels_at(vector, part, c, C: tl.constexpr, SPLITS: tl.constexpr):
    return tl.load(vector + part % SPLITS * C + c, c < C, 0.0).to(tl.float32)


@triton.jit
def statistics_of(statistics, part, parts, c, C: tl.constexpr, GROUPS: tl.constexpr):
    """Mean, 1 / sqrt(var + eps) and rest for each channel of a part."""
    at, size = part * GROUPS + c // (C // GROUPS), parts.to(tl.int64) * GROUPS
    mean, rstd = tl.load(statistics + at, c < C, 0.0), tl.load(statistics + size + at, c < C, 0.0)
    return mean, rstd, tl.load(statistics + 2 * size + at, c < C, 0.0)


@triton.jit
def store_rows(pointer, rows, i, SIZE: tl.constexpr):
    """Vectors of this program, into [parts, chunks, len(rows), SIZE]."""
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    for n in tl.static_range(len(rows)):
        tl.store(pointer + (program * len(rows) + n) * SIZE + i, rows[n], i < SIZE)


@triton.jit
def load_rows(rows, given, i, SIZE: tl.constexpr, COUNT: tl.constexpr):
    """COUNT vectors from each of `rows`, [COUNT, SIZE] in memory, zero where a row is not given."""
    inside = given[:, None] & (i < SIZE)[None, :]
    found = ()
    for n in tl.static_range(COUNT):
        found += (tl.load(rows + n * SIZE + i[None, :], inside, 0.0),)
    return found


@triton.jit
def silu_slope(h):
    sigmoid = tl.sigmoid(h)
    return sigmoid * (1 + h * (1 - sigmoid))
