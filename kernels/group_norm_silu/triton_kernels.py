"""The Triton kernels of `group_norm_silu`. A program takes a chunk of positions of one sample with C of their channels.

In channels-last memory those are all channels of the sample; else a sample is SPLITS parts, of whole groups each, and
part `i` of sample `b` has number `b`·SPLITS + `i` wherever sums and statistics are kept.

With x̂ = (x − mean)·rstd, h = x̂·weight + bias and dh = dy·silu'(h), the sums Σ dh and Σ dh·x̂ of each channel give dbias
and dweight, and weighted and added up over the channels of a group, s1 and s2:

    y = h·sigmoid(h),   dx = rstd·(dh·weight − (s1 + x̂·s2) / M)        M elements in a group

The mean is kept with what its rounding leaves, `mean_lo`, for the rounding alone of a mean that is much larger than the
deviations would move every x̂ the same way. `mean_lo` is in units of x̂ and costs nothing in the loops over positions: it
goes into the bias, and into the sums afterwards.

Sums over chunks are added up by every program that needs them, always in the same order: at most 128 for a part.

Shapes in memory and in the comments at the ends of lines:

    C, GROUPS             channels and groups of a part; C / GROUPS channels in a group
    x, y, dy, dx          [B, channels, N positions]; `…_b`, `…_c`, `…_n`: strides over samples, channels and positions,
                          of which one of the last two is 1 in practice
    sums                  [parts, chunks, 3, GROUPS] float32: origin, mean − origin, Σ (x − mean)² of a group in a chunk
    statistics            [3, parts, GROUPS] float32: mean, rstd, mean_lo
    channel_sums          [parts, chunks, 2, C] float32: Σ dh, Σ dh·x̂;  group_sums [parts, chunks, 2, GROUPS]: weighted
    BLOCK_C, BLOCK_G      powers of two that hold C and GROUPS
    BLOCK_N, BLOCK_K      positions of a tile; chunks of a part (a power of two)
    BLOCK_W, BLOCK_S      channels, and sums, of a tile of `reduce_channel_sums`
    []                    one number
"""

import triton
import triton.language as tl


@triton.jit
def group_norm_silu_statistics(
    x, sums, positions, chunk_size, x_b, x_c, x_n, C: tl.constexpr, GROUPS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """`sums` of a chunk: of each group an origin, the mean from there, and the sum of squared deviations (m2).

    Deviations are taken from the mean of the chunk's first tile, channel by channel, so that a mean much larger than
    the deviations costs no digits; channels, and later chunks, are joined by their means (Chan, Golub, LeVeque 1979):

        mean = Σ n_i·mean_i / n,   m2 = Σ m2_i + n_i·(mean_i − mean)²
    """
    start, count = chunk_range(positions, chunk_size)
    x += part_offset(part=tl.program_id(1), start=start, stride_b=x_b, stride_c=x_c, stride_n=x_n, C=C, SPLITS=SPLITS)
    c, n = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N)  # [BLOCK_C], [BLOCK_N]
    offsets = n[:, None] * x_n + (c.to(tl.int64) * x_c)[None, :]  # [BLOCK_N, BLOCK_C]
    first = tl.load(x + offsets, (n < count)[:, None] & (c < C)[None, :], 0.0).to(tl.float32)  # [BLOCK_N, BLOCK_C]
    origin = tl.sum(first, 0) / tl.minimum(count, BLOCK_N)  # [BLOCK_C]
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)  # [BLOCK_N, BLOCK_C]
    squares = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)  # [BLOCK_N, BLOCK_C]
    for start_n in tl.range(0, count, BLOCK_N, num_stages=NUM_STAGES):
        mask = (n < count - start_n)[:, None] & (c < C)[None, :]  # [BLOCK_N, BLOCK_C]
        tile = tl.load(x + start_n * x_n + offsets, mask, 0.0).to(tl.float32)  # [BLOCK_N, BLOCK_C]
        deviation = tl.where(mask, tile - origin[None, :], 0.0)  # [BLOCK_N, BLOCK_C]
        total += deviation
        squares += deviation * deviation
    delta = tl.sum(total, 0) / count  # [BLOCK_C], mean − origin of a channel
    m2 = tl.sum(squares, 0) - delta * delta * count  # [BLOCK_C]

    in_group = group_mask(C, GROUPS, BLOCK_C, BLOCK_G)  # [BLOCK_G, BLOCK_C]
    group_origin = sum_over_channels(origin, in_group) * (GROUPS / C)  # [BLOCK_G]
    delta += origin - expand_to_channels(group_origin, in_group)  # [BLOCK_C], from the origin of the group
    group_delta = sum_over_channels(delta, in_group) * (GROUPS / C)  # [BLOCK_G]
    distance = delta - expand_to_channels(group_delta, in_group)  # [BLOCK_C], mean of the channel − of the group
    group_m2 = sum_over_channels(m2 + count * distance * distance, in_group)  # [BLOCK_G]
    store_vectors(sums, (group_origin, group_delta, group_m2), tl.arange(0, BLOCK_G), GROUPS)


@triton.jit
def group_norm_silu_apply(
    x, weight, bias, sums, statistics, y, positions, chunk_size, chunks, eps, x_b, x_c, x_n, y_b, y_c, y_n,
    C: tl.constexpr, GROUPS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """y = h·sigmoid(h) of a chunk, h = (x − mean)·gain + shift; and `statistics` of a part from `sums` of its chunks.

    gain = weight·rstd, shift = bias − weight·mean_lo, rstd = 1 / sqrt(m2 / M + eps).
    """
    part = tl.program_id(1).to(tl.int64)
    g, k = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_K)  # [BLOCK_G], [BLOCK_K]
    sums += part * chunks * (3 * GROUPS)
    chunk_rows = sums + k.to(tl.int64)[:, None] * (3 * GROUPS)  # [BLOCK_K, 1]
    origins, deltas, m2s = load_vectors(chunk_rows, k < chunks, g, GROUPS, 3)  # [BLOCK_K, BLOCK_G] each
    counts = tl.where(k < chunks, tl.minimum(chunk_size, positions - k * chunk_size), 0)  # [BLOCK_K], positions
    weights = counts.to(tl.float32)[:, None]  # [BLOCK_K, 1]
    origin = tl.load(sums + g, g < GROUPS, 0.0)  # [BLOCK_G], of the first chunk
    deltas += origins - origin[None, :]
    delta = tl.sum(weights * deltas, 0) / positions  # [BLOCK_G], mean − origin
    distances = deltas - delta[None, :]  # [BLOCK_K, BLOCK_G]
    m2 = tl.sum(m2s + weights * (C // GROUPS) * distances * distances, 0)  # [BLOCK_G]
    rstd = 1 / tl.sqrt_rn(m2 / (positions * (C // GROUPS)) + eps)  # [BLOCK_G]
    mean = origin + delta  # [BLOCK_G]
    mean_lo = (delta - (mean - origin)) * rstd  # [BLOCK_G]
    if tl.program_id(0) == 0:
        offsets, size = part * GROUPS + g, tl.num_programs(1).to(tl.int64) * GROUPS  # [BLOCK_G], []
        tl.store(statistics + offsets, mean, g < GROUPS)
        tl.store(statistics + size + offsets, rstd, g < GROUPS)
        tl.store(statistics + 2 * size + offsets, mean_lo, g < GROUPS)

    in_group = group_mask(C, GROUPS, BLOCK_C, BLOCK_G)  # [BLOCK_G, BLOCK_C]
    mean = expand_to_channels(mean, in_group)  # [BLOCK_C]
    c, n = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N)  # [BLOCK_C], [BLOCK_N]
    gain, shift = load_channels(weight, part, c, C, SPLITS), load_channels(bias, part, c, C, SPLITS)  # [BLOCK_C] each
    shift -= gain * expand_to_channels(mean_lo, in_group)
    gain *= expand_to_channels(rstd, in_group)
    start, count = chunk_range(positions, chunk_size)
    x += part_offset(part=part, start=start, stride_b=x_b, stride_c=x_c, stride_n=x_n, C=C, SPLITS=SPLITS)
    y += part_offset(part=part, start=start, stride_b=y_b, stride_c=y_c, stride_n=y_n, C=C, SPLITS=SPLITS)
    x_offsets = n[:, None] * x_n + (c.to(tl.int64) * x_c)[None, :]  # [BLOCK_N, BLOCK_C]
    y_offsets = n[:, None] * y_n + (c.to(tl.int64) * y_c)[None, :]  # [BLOCK_N, BLOCK_C]
    for start_n in tl.range(0, count, BLOCK_N, num_stages=NUM_STAGES):
        mask = (n < count - start_n)[:, None] & (c < C)[None, :]  # [BLOCK_N, BLOCK_C]
        tile = tl.load(x + start_n * x_n + x_offsets, mask, 0.0).to(tl.float32)  # [BLOCK_N, BLOCK_C]
        h = (tile - mean[None, :]) * gain[None, :] + shift[None, :]  # [BLOCK_N, BLOCK_C]
        tl.store(y + start_n * y_n + y_offsets, (h * tl.sigmoid(h)).to(y.dtype.element_ty), mask)


@triton.jit
def group_norm_silu_sums(
    dy, x, weight, bias, statistics, channel_sums, group_sums, positions, chunk_size, dy_b, dy_c, dy_n, x_b, x_c, x_n,
    C: tl.constexpr, GROUPS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Σ dh and Σ dh·x̂ of a chunk with dh = dy·silu'(h): of each channel, and weighted s1 and s2 of each group."""
    part = tl.program_id(1).to(tl.int64)
    c, n = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N)  # [BLOCK_C], [BLOCK_N]
    mean, rstd, mean_lo = load_statistics(statistics, part, tl.num_programs(1), c, C, GROUPS)  # [BLOCK_C] each
    gain, shift = load_channels(weight, part, c, C, SPLITS), load_channels(bias, part, c, C, SPLITS)  # [BLOCK_C] each
    shift -= gain * mean_lo
    start, count = chunk_range(positions, chunk_size)
    x += part_offset(part=part, start=start, stride_b=x_b, stride_c=x_c, stride_n=x_n, C=C, SPLITS=SPLITS)
    dy += part_offset(part=part, start=start, stride_b=dy_b, stride_c=dy_c, stride_n=dy_n, C=C, SPLITS=SPLITS)
    x_offsets = n[:, None] * x_n + (c.to(tl.int64) * x_c)[None, :]  # [BLOCK_N, BLOCK_C]
    dy_offsets = n[:, None] * dy_n + (c.to(tl.int64) * dy_c)[None, :]  # [BLOCK_N, BLOCK_C]
    dh_total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)  # [BLOCK_N, BLOCK_C]
    dh_x_total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)  # [BLOCK_N, BLOCK_C]
    for start_n in tl.range(0, count, BLOCK_N, num_stages=NUM_STAGES):
        mask = (n < count - start_n)[:, None] & (c < C)[None, :]  # [BLOCK_N, BLOCK_C]
        tile = tl.load(x + start_n * x_n + x_offsets, mask, 0.0).to(tl.float32)  # [BLOCK_N, BLOCK_C]
        upstream = tl.load(dy + start_n * dy_n + dy_offsets, mask, 0.0).to(tl.float32)  # [BLOCK_N, BLOCK_C]
        x_hat = (tile - mean[None, :]) * rstd[None, :]  # [BLOCK_N, BLOCK_C]
        dh = upstream * silu_derivative(x_hat * gain[None, :] + shift[None, :])  # [BLOCK_N, BLOCK_C]; 0 outside, as dy
        dh_total += dh
        dh_x_total += dh * x_hat
    sum_dh = tl.sum(dh_total, 0)  # [BLOCK_C]
    sum_dh_x = tl.sum(dh_x_total, 0) - mean_lo * sum_dh  # [BLOCK_C]
    store_vectors(channel_sums, (sum_dh, sum_dh_x), c, C)
    in_group = group_mask(C, GROUPS, BLOCK_C, BLOCK_G)  # [BLOCK_G, BLOCK_C]
    s1 = sum_over_channels(gain * sum_dh, in_group)  # [BLOCK_G]
    s2 = sum_over_channels(gain * sum_dh_x, in_group)  # [BLOCK_G]
    store_vectors(group_sums, (s1, s2), tl.arange(0, BLOCK_G), GROUPS)


@triton.jit
def group_norm_silu_gradients(
    dy, x, weight, bias, statistics, channel_sums, group_sums, dx, dweight, dbias, samples, positions, chunk_size,
    chunks, dy_b, dy_c, dy_n, x_b, x_c, x_n, dx_b, dx_c, dx_n, C: tl.constexpr, GROUPS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_S: tl.constexpr, NEEDS_DWEIGHT: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """dx = dh·weight·rstd − (s1 + x̂·s2)·rstd / M of a chunk.

    With NEEDS_DWEIGHT the first rows of programs, one for each split, add up dweight and dbias instead.
    """
    part = tl.program_id(1).to(tl.int64) - NEEDS_DWEIGHT * SPLITS
    if part < 0:
        reduce_channel_sums(
            channel_sums=channel_sums, dweight=dweight, dbias=dbias, samples=samples, chunks=chunks,
            C=C, SPLITS=SPLITS, BLOCK_W=BLOCK_W, BLOCK_S=BLOCK_S,
        )  # fmt: skip
    else:
        g, k = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_K)  # [BLOCK_G], [BLOCK_K]
        chunk_rows = group_sums + (part * chunks + k)[:, None] * (2 * GROUPS)  # [BLOCK_K, 1]
        s1_chunks, s2_chunks = load_vectors(chunk_rows, k < chunks, g, GROUPS, 2)  # [BLOCK_K, BLOCK_G] each
        in_group = group_mask(C, GROUPS, BLOCK_C, BLOCK_G)  # [BLOCK_G, BLOCK_C]
        c, n = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N)  # [BLOCK_C], [BLOCK_N]
        parts = tl.num_programs(1) - NEEDS_DWEIGHT * SPLITS
        mean, rstd, mean_lo = load_statistics(statistics, part, parts, c, C, GROUPS)  # [BLOCK_C] each
        gain, shift = load_channels(weight, part, c, C, SPLITS), load_channels(bias, part, c, C, SPLITS)  # [BLOCK_C]
        shift -= gain * mean_lo
        rstd_over_m = rstd / (positions * (C // GROUPS))  # [BLOCK_C]
        s2 = expand_to_channels(tl.sum(s2_chunks, 0), in_group) * rstd_over_m  # [BLOCK_C], s2·rstd / M
        s1 = expand_to_channels(tl.sum(s1_chunks, 0), in_group) * rstd_over_m - mean_lo * s2  # [BLOCK_C]
        start, count = chunk_range(positions, chunk_size)
        x += part_offset(part=part, start=start, stride_b=x_b, stride_c=x_c, stride_n=x_n, C=C, SPLITS=SPLITS)
        dy += part_offset(part=part, start=start, stride_b=dy_b, stride_c=dy_c, stride_n=dy_n, C=C, SPLITS=SPLITS)
        dx += part_offset(part=part, start=start, stride_b=dx_b, stride_c=dx_c, stride_n=dx_n, C=C, SPLITS=SPLITS)
        x_offsets = n[:, None] * x_n + (c.to(tl.int64) * x_c)[None, :]  # [BLOCK_N, BLOCK_C]
        dy_offsets = n[:, None] * dy_n + (c.to(tl.int64) * dy_c)[None, :]  # [BLOCK_N, BLOCK_C]
        dx_offsets = n[:, None] * dx_n + (c.to(tl.int64) * dx_c)[None, :]  # [BLOCK_N, BLOCK_C]
        for start_n in tl.range(0, count, BLOCK_N, num_stages=NUM_STAGES):
            mask = (n < count - start_n)[:, None] & (c < C)[None, :]  # [BLOCK_N, BLOCK_C]
            tile = tl.load(x + start_n * x_n + x_offsets, mask, 0.0).to(tl.float32)  # [BLOCK_N, BLOCK_C]
            upstream = tl.load(dy + start_n * dy_n + dy_offsets, mask, 0.0).to(tl.float32)  # [BLOCK_N, BLOCK_C]
            x_hat = (tile - mean[None, :]) * rstd[None, :]  # [BLOCK_N, BLOCK_C]
            dh = upstream * silu_derivative(x_hat * gain[None, :] + shift[None, :])  # [BLOCK_N, BLOCK_C]
            gradient = dh * (gain * rstd)[None, :] - s1[None, :] - x_hat * s2[None, :]  # [BLOCK_N, BLOCK_C]
            tl.store(dx + start_n * dx_n + dx_offsets, gradient.to(dx.dtype.element_ty), mask)


@triton.jit
def reduce_channel_sums(
    channel_sums, dweight, dbias, samples, chunks, C: tl.constexpr, SPLITS: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dbias = Σ dh, dweight = Σ dh·x̂ over samples and chunks: BLOCK_W channels of both, BLOCK_S sums at a time."""
    split = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)  # [BLOCK_W]
    dh_total = tl.zeros((BLOCK_S, BLOCK_W), tl.float32)  # [BLOCK_S, BLOCK_W]
    dh_x_total = tl.zeros((BLOCK_S, BLOCK_W), tl.float32)  # [BLOCK_S, BLOCK_W]
    for first in range(0, samples * chunks, BLOCK_S):
        k = first + tl.arange(0, BLOCK_S)  # [BLOCK_S]
        row = (k // chunks * SPLITS + split).to(tl.int64) * chunks + k % chunks  # [BLOCK_S]
        more = load_vectors(channel_sums + row[:, None] * (2 * C), k < samples * chunks, c, C, 2)  # [BLOCK_S, BLOCK_W]
        dh_total += more[0]
        dh_x_total += more[1]
    tl.store(dbias + split * C + c, tl.sum(dh_total, 0).to(dbias.dtype.element_ty), c < C)
    tl.store(dweight + split * C + c, tl.sum(dh_x_total, 0).to(dweight.dtype.element_ty), c < C)


@triton.jit
def chunk_range(positions, chunk_size):
    """First position of this program's chunk, and how many it has."""
    start = tl.program_id(0) * chunk_size
    return start, tl.minimum(chunk_size, positions - start)


@triton.jit
def part_offset(part, start, stride_b, stride_c, stride_n, C: tl.constexpr, SPLITS: tl.constexpr):
    """The offset of the part's first channel at position `start`."""
    channel = (part % SPLITS * C).to(tl.int64)
    return (part // SPLITS).to(tl.int64) * stride_b + channel * stride_c + start.to(tl.int64) * stride_n


@triton.jit
def group_mask(C: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    """[BLOCK_G, BLOCK_C]: whether a channel is of a group."""
    c, g = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_G)  # [BLOCK_C], [BLOCK_G]
    return ((c // (C // GROUPS))[None, :] == g[:, None]) & (c < C)[None, :]  # [BLOCK_G, BLOCK_C]


@triton.jit
def sum_over_channels(channels, in_group):
    """[BLOCK_C] → [BLOCK_G]: the sum over the channels of each group."""
    return tl.sum(tl.where(in_group, channels[None, :], 0.0), 1)  # [BLOCK_G]


@triton.jit
def expand_to_channels(groups, in_group):
    """[BLOCK_G] → [BLOCK_C]: for each channel the number of its group."""
    return tl.sum(tl.where(in_group, groups[:, None], 0.0), 0)  # [BLOCK_C]


@triton.jit
def load_channels(vector, part, c, C: tl.constexpr, SPLITS: tl.constexpr):
    """Elements of a vector [channels] for the channels `c` of a part, as float32."""
    return tl.load(vector + part % SPLITS * C + c, c < C, 0.0).to(tl.float32)  # [BLOCK_C]


@triton.jit
def load_statistics(statistics, part, parts, c, C: tl.constexpr, GROUPS: tl.constexpr):
    """mean, rstd and mean_lo for each channel of a part."""
    offsets, size = part * GROUPS + c // (C // GROUPS), parts.to(tl.int64) * GROUPS  # [BLOCK_C], []
    mean = tl.load(statistics + offsets, c < C, 0.0)  # [BLOCK_C]
    rstd = tl.load(statistics + size + offsets, c < C, 0.0)  # [BLOCK_C]
    mean_lo = tl.load(statistics + 2 * size + offsets, c < C, 0.0)  # [BLOCK_C]
    return mean, rstd, mean_lo


@triton.jit
def store_vectors(pointer, vectors, i, SIZE: tl.constexpr):
    """Vectors of this program, into [parts, chunks, len(vectors), SIZE]."""
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    for v in tl.static_range(len(vectors)):
        tl.store(pointer + (program * len(vectors) + v) * SIZE + i, vectors[v], i < SIZE)


@triton.jit
def load_vectors(rows, row_mask, i, SIZE: tl.constexpr, COUNT: tl.constexpr):
    """COUNT vectors [R, I] for R rows, of which each has [COUNT, SIZE] in memory; zero where a row is masked off.

    Args:
        row_mask [R]; i [I], with I at least SIZE.
    """
    mask = row_mask[:, None] & (i < SIZE)[None, :]  # [R, I]
    found = ()
    for v in tl.static_range(COUNT):
        found += (tl.load(rows + v * SIZE + i[None, :], mask, 0.0),)  # [R, I]
    return found


@triton.jit
def silu_derivative(h):
    """sigmoid(h)·(1 + h·(1 − sigmoid(h)))."""
    sigmoid = tl.sigmoid(h)  # shape of h
    return sigmoid * (1 + h * (1 - sigmoid))
