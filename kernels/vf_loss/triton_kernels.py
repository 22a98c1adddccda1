"""The Triton kernels of `vf_loss`. Vectors lie anywhere: `…_c` and `…_n` are strides over channels and positions.

A tile of either cosine matrix lives in registers only, as raw products of the inputs: the inverse norms are applied to
the fp32 products, so the inputs are never rounded. Both matrices are symmetric.
"""

import triton
import triton.language as tl

#: Norms below these count as these, in the first term and in the second.
FLOOR_DISTMAT = tl.constexpr(1e-12)
FLOOR_COS = tl.constexpr(1e-8)
#: The largest weight of a position in the backward product: float16 then holds weights of ratios up to 2**29 exactly
#: enough, and the other dtypes do not mind.
TOP_WEIGHT = tl.constexpr(32768.0)


@triton.jit
def vf_loss_positions(
    z,
    f,
    z_norms,
    f_norms,
    products,
    cos_sums,
    cos_margin,
    z_b,
    z_c,
    z_n,
    f_b,
    f_c,
    f_n,
    channels,
    positions: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Norms and products z·f, float32 [B, N], and the sum of the second term over BLOCK_N positions."""
    sample = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    z += sample * z_b
    f += sample * f_b
    zz = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    ff = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    zf = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    for start in range(0, channels, BLOCK_C):
        inside = ((start + c) < channels)[:, None] & (n < positions)[None, :]
        z_tile = tl.load(z + (start + c)[:, None] * z_c + n[None, :] * z_n, inside, 0.0).to(tl.float32)
        f_tile = tl.load(f + (start + c)[:, None] * f_c + n[None, :] * f_n, inside, 0.0).to(tl.float32)
        zz += z_tile * z_tile
        ff += f_tile * f_tile
        zf += z_tile * f_tile
    z_norm, f_norm, product = tl.sqrt_rn(tl.sum(zz, 0)), tl.sqrt_rn(tl.sum(ff, 0)), tl.sum(zf, 0)
    at = sample * positions + n
    tl.store(z_norms + at, z_norm, n < positions)
    tl.store(f_norms + at, f_norm, n < positions)
    tl.store(products + at, product, n < positions)
    cosine = product * inverse_norm(z_norm, FLOOR_COS) * inverse_norm(f_norm, FLOOR_COS)
    cos_sum = tl.sum(tl.where(n < positions, above(1 - cos_margin - cosine), 0.0))
    tl.store(cos_sums + sample * tl.num_programs(0) + tl.program_id(0), cos_sum)


@triton.jit
def vf_loss_tiles(
    z,
    f,
    z_norms,
    f_norms,
    tile_sums,
    tiles,
    distmat_margin,
    z_b,
    z_c,
    z_n,
    f_b,
    f_c,
    f_n,
    channels,
    positions: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sum of the first term over one tile; one above the diagonal counts twice, one below it not at all."""
    sample = tl.program_id(1).to(tl.int64)
    row, column = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    total = 0.0
    if row <= column:
        i, j = row * BLOCK + tl.arange(0, BLOCK), column * BLOCK + tl.arange(0, BLOCK)
        zz, ff = products_of(
            z + sample * z_b, f + sample * f_b, i, j, z_c, z_n, f_c, f_n, channels, positions, BLOCK, BLOCK, BLOCK_C
        )
        z_norms += sample * positions
        f_norms += sample * positions
        difference = cosines(zz, norms_at(z_norms, i, positions), norms_at(z_norms, j, positions)) - cosines(
            ff, norms_at(f_norms, i, positions), norms_at(f_norms, j, positions)
        )
        inside = (i < positions)[:, None] & (j < positions)[None, :]
        total = tl.sum(tl.where(inside, above(tl.abs(difference) - distmat_margin), 0.0))
        total *= tl.where(row < column, 2.0, 1.0)
    tl.store(tile_sums + sample * tl.num_programs(0) + tl.program_id(0), total)


@triton.jit
def vf_loss_means(tile_sums, cos_sums, distmat, cos, num_tiles, num_cos, pairs, positions, BLOCK: tl.constexpr):
    """Both terms from their partial sums, always added in the same order."""
    tl.store(distmat, sum_of(tile_sums, num_tiles, BLOCK) / pairs)
    tl.store(cos, sum_of(cos_sums, num_cos, BLOCK) / positions)


@triton.jit
def vf_loss_gradient(
    z, f, z_norms, f_norms, products, d_distmat, d_cos, partial, dz, distmat_margin, cos_margin, pairs, vectors,
    z_b, z_c, z_n, f_b, f_c, f_n, dz_b, dz_c, dz_n, channels, positions: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_OUT: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_M rows of z. Both terms are symmetric in z and f: swap them for the gradient of f.

    With G = sign(d)·[|d| > margin], symmetric, the first term pulls the unit vector of row i by 2 Σ_j G_ij ẑ_j; taking
    out what points along ẑ_i needs Σ_j G_ij cos(z_i, z_j), which the tile has. Sums over the tiles of a row are kept in
    `partial` (float32, laid out as dz) unless ONE_TILE.
    """
    sample = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    z += sample * z_b
    f += sample * f_b
    z_norms += sample * positions
    f_norms += sample * positions
    z_norm, f_norm = norms_at(z_norms, i, positions), norms_at(f_norms, i, positions)
    product = norms_at(products + sample * positions, i, positions)
    to_unit = inverse_norm(z_norm, FLOOR_DISTMAT)
    pull_scale = to_unit * (tl.load(d_distmat) * 2 / pairs)

    z_to_unit, f_to_unit = inverse_norm(z_norm, FLOOR_COS), inverse_norm(f_norm, FLOOR_COS)
    cosine = product * z_to_unit * f_to_unit
    cos_scale = tl.where(1 - cos_margin - cosine > 0, tl.load(d_cos) / vectors, 0.0) * z_to_unit
    f_scale = -cos_scale * f_to_unit
    z_scale = tl.where(z_norm >= FLOOR_COS, cos_scale * cosine * z_to_unit, 0.0)

    along = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, positions, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        zz, ff = products_of(z, f, i, j, z_c, z_n, f_c, f_n, channels, positions, BLOCK_M, BLOCK_N, BLOCK_C)
        z_norm_j, f_norm_j = norms_at(z_norms, j, positions), norms_at(f_norms, j, positions)
        difference = cosines(zz, z_norm, z_norm_j) - cosines(ff, f_norm, f_norm_j)
        # A vector of zeros pulls nothing: its weight must not be the one that the others are scaled by.
        weight = tl.where(z_norm_j > 0, inverse_norm(z_norm_j, FLOOR_DISTMAT), 0.0)
        top = tl.max(weight)
        unscale = tl.where(top > 0, top / TOP_WEIGHT, 1.0)
        pull = tl.where(difference > 0, 1.0, -1.0) * (weight / unscale)[None, :]
        pull = tl.where(tl.abs(difference) > distmat_margin, pull, 0.0).to(z.dtype.element_ty)
        # With the weights as rounded for the product, so that their rounding is taken out with the rest along ẑ_i.
        along += tl.sum(pull.to(tl.float32) * zz, 1) * unscale
        last = start + BLOCK_N >= positions
        z_scale_now = z_scale - tl.where(z_norm >= FLOOR_DISTMAT, along * to_unit * to_unit * pull_scale, 0.0)
        for first in range(0, channels, BLOCK_OUT):
            c = first + tl.arange(0, BLOCK_OUT)
            columns = (j < positions)[:, None] & (c < channels)[None, :]
            inside = (i < positions)[:, None] & (c < channels)[None, :]
            z_j = tl.load(z + j[:, None] * z_n + c[None, :] * z_c, columns, 0.0)
            out = tl.dot(pull, z_j, input_precision="ieee") * unscale
            at = sample * dz_b + i[:, None] * dz_n + c[None, :] * dz_c
            if not ONE_TILE:
                out += tl.load(partial + at, inside & (start > 0), 0.0)
                tl.store(partial + at, out, inside & (not last))
            z_i = tl.load(z + i[:, None] * z_n + c[None, :] * z_c, inside & last, 0.0).to(tl.float32)
            f_i = tl.load(f + i[:, None] * f_n + c[None, :] * f_c, inside & last, 0.0).to(tl.float32)
            gradient = out * pull_scale[:, None] + z_i * z_scale_now[:, None] + f_i * f_scale[:, None]
            tl.store(dz + at, gradient.to(dz.dtype.element_ty), inside & last)
        if not ONE_TILE:
            tl.debug_barrier()  # other threads may load what these have stored


@triton.jit
def products_of(
    z,
    f,
    i,
    j,
    z_c,
    z_n,
    f_c,
    f_n,
    channels,
    positions: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Σ_c z_ic z_jc and Σ_c f_ic f_jc, float32 [BLOCK_I, BLOCK_J]."""
    zz = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    ff = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside_i = (i < positions)[:, None] & (c < channels)[None, :]
        inside_j = (c < channels)[:, None] & (j < positions)[None, :]
        z_i = tl.load(z + i[:, None] * z_n + c[None, :] * z_c, inside_i, 0.0)
        z_j = tl.load(z + c[:, None] * z_c + j[None, :] * z_n, inside_j, 0.0)
        f_i = tl.load(f + i[:, None] * f_n + c[None, :] * f_c, inside_i, 0.0)
        f_j = tl.load(f + c[:, None] * f_c + j[None, :] * f_n, inside_j, 0.0)
        zz = tl.dot(z_i, z_j, zz, input_precision="ieee")
        ff = tl.dot(f_i, f_j, ff, input_precision="ieee")
    return zz, ff


@triton.jit
def cosines(products, norms_i, norms_j):
    return products * inverse_norm(norms_i, FLOOR_DISTMAT)[:, None] * inverse_norm(norms_j, FLOOR_DISTMAT)[None, :]


@triton.jit
def inverse_norm(norm, FLOOR: tl.constexpr):
    return 1 / tl.maximum(norm, FLOOR)


@triton.jit
def norms_at(norms, n, positions):
    return tl.load(norms + n, n < positions, 0.0)


@triton.jit
def above(x):
    """relu(x), NaN where x is: a maximum with 0 would hide it."""
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def sum_of(values, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(values + at, at < count, 0.0)
    return tl.sum(total)
