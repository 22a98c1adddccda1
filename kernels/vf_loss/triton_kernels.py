"""The Triton kernels of `vf_loss`.

    B, C, N         samples, channels, positions of a sample
    i, j            positions along the rows and the columns of a tile of a cosine matrix
    BI, BJ          positions along its sides
    BN              positions of a program of vf_loss_positions
    BC, BO          channels of one step of the products, of one step of the gradient
    zz, ff, zf      z_i · z_j, f_i · f_j, z_i · f_i

z and f are [B, C, N] anywhere in memory: `…_b`, `…_c` and `…_n` are strides over samples, channels and positions. A
tile of either cosine matrix [N, N] lives in registers only, as raw products of the inputs: the inverse norms are
applied to the float32 products, so the inputs are never rounded. Both matrices are symmetric.
"""

import triton
import triton.language as tl

#: Norms below these count as these, in the first term and in the second.
FLOOR_DISTMAT = tl.constexpr(1e-12)
FLOOR_COS = tl.constexpr(1e-8)
#: The largest weight of a position in the backward product: float16 then holds weights of ratios up to 2**29 exactly
#: enough, and the other dtypes do not mind.
MAX_WEIGHT = tl.constexpr(32768.0)


@triton.jit
def vf_loss_positions(
    z_ptr, f_ptr, z_norms_ptr, f_norms_ptr, products_ptr, cos_sums_ptr, cos_margin, z_b, z_c, z_n, f_b, f_c, f_n, C,
    N: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """For BN positions n: |z_n|, |f_n|, z_n · f_n, and Σ relu(1 − cos_margin − cos(z_n, f_n)), the second term's part.

    Args:
        z_ptr, f_ptr [B, C, N]; z_norms_ptr, f_norms_ptr, products_ptr [B, N] float32, results; cos_sums_ptr
        [B, programs of a sample] float32, result.
    """
    sample = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)  # [BN]
    c = tl.arange(0, BC)  # [BC]
    z_ptr += sample * z_b
    f_ptr += sample * f_b
    zz = tl.zeros((BC, BN), tl.float32)  # [BC, BN]
    ff = tl.zeros((BC, BN), tl.float32)  # [BC, BN]
    zf = tl.zeros((BC, BN), tl.float32)  # [BC, BN]
    for start in range(0, C, BC):
        mask = ((start + c) < C)[:, None] & (n < N)[None, :]  # [BC, BN]
        z = tl.load(z_ptr + (start + c)[:, None] * z_c + n[None, :] * z_n, mask, 0.0).to(tl.float32)  # [BC, BN]
        f = tl.load(f_ptr + (start + c)[:, None] * f_c + n[None, :] * f_n, mask, 0.0).to(tl.float32)  # [BC, BN]
        zz += z * z  # [BC, BN]
        ff += f * f  # [BC, BN]
        zf += z * f  # [BC, BN]
    z_norm, f_norm, product = tl.sqrt_rn(tl.sum(zz, 0)), tl.sqrt_rn(tl.sum(ff, 0)), tl.sum(zf, 0)  # [BN] each
    offsets = sample * N + n  # [BN]
    tl.store(z_norms_ptr + offsets, z_norm, n < N)
    tl.store(f_norms_ptr + offsets, f_norm, n < N)
    tl.store(products_ptr + offsets, product, n < N)
    cosine = product * inverse_norm(z_norm, FLOOR_COS) * inverse_norm(f_norm, FLOOR_COS)  # [BN]
    cos_sum = tl.sum(tl.where(n < N, relu(1 - cos_margin - cosine), 0.0))
    tl.store(cos_sums_ptr + sample * tl.num_programs(0) + tl.program_id(0), cos_sum)


@triton.jit
def vf_loss_tiles(
    z_ptr, f_ptr, z_norms_ptr, f_norms_ptr, tile_sums_ptr, tiles_across, distmat_margin,
    z_b, z_c, z_n, f_b, f_c, f_n, C, N: tl.constexpr, BI: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Σ relu(|cos(z_i, z_j) − cos(f_i, f_j)| − distmat_margin), the first term's part, over one tile [BI, BI].

    A tile above the diagonal counts twice, one below it not at all.

    Args:
        z_ptr, f_ptr [B, C, N]; z_norms_ptr, f_norms_ptr [B, N] float32; tile_sums_ptr [B, tiles] float32, result.
    """
    sample = tl.program_id(1).to(tl.int64)
    tile_i, tile_j = tl.program_id(0) // tiles_across, tl.program_id(0) % tiles_across
    tile_sum = 0.0
    if tile_i <= tile_j:
        i, j = tile_i * BI + tl.arange(0, BI), tile_j * BI + tl.arange(0, BI)  # [BI] each
        zz, ff = dot_products(  # [BI, BI] each
            z_ptr + sample * z_b, f_ptr + sample * f_b, i, j,
            z_c=z_c, z_n=z_n, f_c=f_c, f_n=f_n, C=C, N=N, BI=BI, BJ=BI, BC=BC,
        )  # fmt: skip
        z_norms_ptr += sample * N
        f_norms_ptr += sample * N
        difference = cosines(zz, load_vector(z_norms_ptr, i, N), load_vector(z_norms_ptr, j, N)) - cosines(  # [BI, BI]
            ff, load_vector(f_norms_ptr, i, N), load_vector(f_norms_ptr, j, N)
        )
        mask = (i < N)[:, None] & (j < N)[None, :]  # [BI, BI]
        tile_sum = tl.sum(tl.where(mask, relu(tl.abs(difference) - distmat_margin), 0.0))
        tile_sum *= tl.where(tile_i < tile_j, 2.0, 1.0)
    tl.store(tile_sums_ptr + sample * tl.num_programs(0) + tl.program_id(0), tile_sum)


@triton.jit
def vf_loss_means(
    tile_sums_ptr, cos_sums_ptr, distmat_ptr, cos_ptr, num_tiles, num_cos, pairs, positions, BLOCK: tl.constexpr
):
    """distmat = Σ tile_sums / pairs and cos = Σ cos_sums / positions, always added in the same order."""
    tl.store(distmat_ptr, sum_vector(tile_sums_ptr, num_tiles, BLOCK) / pairs)
    tl.store(cos_ptr, sum_vector(cos_sums_ptr, num_cos, BLOCK) / positions)


@triton.jit
def vf_loss_gradient(
    z_ptr, f_ptr, z_norms_ptr, f_norms_ptr, products_ptr, d_distmat_ptr, d_cos_ptr, partial_ptr, dz_ptr,
    distmat_margin, cos_margin, pairs, positions, z_b, z_c, z_n, f_b, f_c, f_n, dz_b, dz_c, dz_n, C,
    N: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """The gradient of BI rows z_i. Both terms are symmetric in z and f: swap them for the gradient of f.

    With ẑ = z / |z|, d = cos(z_i, z_j) − cos(f_i, f_j) and G_ij = sign(d) · [|d| > margin], symmetric, the first term's
    gradient for ẑ_i is 2 / pairs · Σ_j G_ij ẑ_j. For z_i what points along ẑ_i goes, and the rest is divided by |z_i|:

        dz_i = 2 / (pairs · |z_i|) · (Σ_j G_ij ẑ_j − ẑ_i · Σ_j G_ij cos(z_i, z_j))

    The second term's, where 1 − cos_margin > cos(z_i, f_i), is −(f̂_i − ẑ_i · cos(z_i, f_i)) / (positions · |z_i|).

    Args:
        z_ptr, f_ptr [B, C, N]; z_norms_ptr, f_norms_ptr, products_ptr [B, N] float32, as forward left them;
        d_distmat_ptr, d_cos_ptr: the gradients of both terms, scalars.
        dz_ptr [B, C, N], result.
        partial_ptr [B, C, N] float32, laid out as dz: sums over the tiles of a row so far; unused if ONE_TILE.
    """
    sample = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BI + tl.arange(0, BI)  # [BI]
    z_ptr += sample * z_b
    f_ptr += sample * f_b
    z_norms_ptr += sample * N
    f_norms_ptr += sample * N
    z_norm, f_norm = load_vector(z_norms_ptr, i, N), load_vector(f_norms_ptr, i, N)  # [BI] each
    product = load_vector(products_ptr + sample * N, i, N)  # [BI]
    to_unit = inverse_norm(z_norm, FLOOR_DISTMAT)  # [BI]
    g_scale = to_unit * (tl.load(d_distmat_ptr) * 2 / pairs)  # [BI]

    # The second term's part is z_scale · z_i + f_scale · f_i.
    z_to_unit, f_to_unit = inverse_norm(z_norm, FLOOR_COS), inverse_norm(f_norm, FLOOR_COS)  # [BI] each
    cosine = product * z_to_unit * f_to_unit  # [BI]
    cos_scale = tl.where(1 - cos_margin - cosine > 0, tl.load(d_cos_ptr) / positions, 0.0) * z_to_unit  # [BI]
    f_scale = -cos_scale * f_to_unit  # [BI]
    z_scale = tl.where(z_norm >= FLOOR_COS, cos_scale * cosine * z_to_unit, 0.0)  # [BI]

    along = tl.zeros((BI,), tl.float32)  # [BI], |z_i| · Σ_j G_ij cos(z_i, z_j)
    for start in range(0, N, BJ):
        j = start + tl.arange(0, BJ)  # [BJ]
        zz, ff = dot_products(  # [BI, BJ] each
            z_ptr, f_ptr, i, j, z_c=z_c, z_n=z_n, f_c=f_c, f_n=f_n, C=C, N=N, BI=BI, BJ=BJ, BC=BC
        )
        z_norm_j, f_norm_j = load_vector(z_norms_ptr, j, N), load_vector(f_norms_ptr, j, N)  # [BJ] each
        difference = cosines(zz, z_norm, z_norm_j) - cosines(ff, f_norm, f_norm_j)  # [BI, BJ]
        # A vector of zeros contributes nothing: its weight must not be the one that the others are scaled by.
        weight = tl.where(z_norm_j > 0, inverse_norm(z_norm_j, FLOOR_DISTMAT), 0.0)  # [BJ]
        largest = tl.max(weight)
        unscale = tl.where(largest > 0, largest / MAX_WEIGHT, 1.0)
        g = tl.where(difference > 0, 1.0, -1.0) * (weight / unscale)[None, :]  # [BI, BJ], G_ij / |z_j|, scaled
        g = tl.where(tl.abs(difference) > distmat_margin, g, 0.0).to(z_ptr.dtype.element_ty)  # [BI, BJ]
        # With the weights as rounded for the product, so that their rounding is taken out with the rest along ẑ_i.
        along += tl.sum(g.to(tl.float32) * zz, 1) * unscale  # [BI]
        last = start + BJ >= N
        z_scale_now = z_scale - tl.where(z_norm >= FLOOR_DISTMAT, along * to_unit * to_unit * g_scale, 0.0)  # [BI]
        for first in range(0, C, BO):
            c = first + tl.arange(0, BO)  # [BO]
            mask_j = (j < N)[:, None] & (c < C)[None, :]  # [BJ, BO]
            mask_i = (i < N)[:, None] & (c < C)[None, :]  # [BI, BO]
            z_j = tl.load(z_ptr + j[:, None] * z_n + c[None, :] * z_c, mask_j, 0.0)  # [BJ, BO]
            acc = tl.dot(g, z_j, input_precision="ieee") * unscale  # [BI, BO], Σ_j G_ij ẑ_j
            offsets = sample * dz_b + i[:, None] * dz_n + c[None, :] * dz_c  # [BI, BO]
            if not ONE_TILE:
                acc += tl.load(partial_ptr + offsets, mask_i & (start > 0), 0.0)  # [BI, BO]
                tl.store(partial_ptr + offsets, acc, mask_i & (not last))
            z_i = tl.load(z_ptr + i[:, None] * z_n + c[None, :] * z_c, mask_i & last, 0.0).to(tl.float32)  # [BI, BO]
            f_i = tl.load(f_ptr + i[:, None] * f_n + c[None, :] * f_c, mask_i & last, 0.0).to(tl.float32)  # [BI, BO]
            dz = acc * g_scale[:, None] + z_i * z_scale_now[:, None] + f_i * f_scale[:, None]  # [BI, BO]
            tl.store(dz_ptr + offsets, dz.to(dz_ptr.dtype.element_ty), mask_i & last)
        if not ONE_TILE:
            tl.debug_barrier()  # other threads may load what these have stored


@triton.jit
def dot_products(
    z_ptr, f_ptr, i, j, z_c, z_n, f_c, f_n, C,
    N: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Σ_c z_ic z_jc and Σ_c f_ic f_jc, [BI, BJ] float32 each, of one sample's positions i [BI] and j [BJ]."""
    zz = tl.zeros((BI, BJ), tl.float32)  # [BI, BJ]
    ff = tl.zeros((BI, BJ), tl.float32)  # [BI, BJ]
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)  # [BC]
        mask_i = (i < N)[:, None] & (c < C)[None, :]  # [BI, BC]
        mask_j = (c < C)[:, None] & (j < N)[None, :]  # [BC, BJ]
        z_i = tl.load(z_ptr + i[:, None] * z_n + c[None, :] * z_c, mask_i, 0.0)  # [BI, BC]
        z_j = tl.load(z_ptr + c[:, None] * z_c + j[None, :] * z_n, mask_j, 0.0)  # [BC, BJ]
        f_i = tl.load(f_ptr + i[:, None] * f_n + c[None, :] * f_c, mask_i, 0.0)  # [BI, BC]
        f_j = tl.load(f_ptr + c[:, None] * f_c + j[None, :] * f_n, mask_j, 0.0)  # [BC, BJ]
        zz = tl.dot(z_i, z_j, zz, input_precision="ieee")  # [BI, BJ]
        ff = tl.dot(f_i, f_j, ff, input_precision="ieee")  # [BI, BJ]
    return zz, ff


@triton.jit
def cosines(products, norms_i, norms_j):
    """products [BI, BJ] divided by norms_i [BI] and norms_j [BJ]."""
    return products * inverse_norm(norms_i, FLOOR_DISTMAT)[:, None] * inverse_norm(norms_j, FLOOR_DISTMAT)[None, :]


@triton.jit
def inverse_norm(norm, FLOOR: tl.constexpr):
    """1 / max(norm, FLOOR), of any shape."""
    return 1 / tl.maximum(norm, FLOOR)


@triton.jit
def load_vector(ptr, n, N):
    """Load at n, of any shape, what is a vector [N]; 0 beyond."""
    return tl.load(ptr + n, n < N, 0.0)


@triton.jit
def relu(x):
    """max(x, 0), but NaN where x is, which a maximum would hide."""
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def sum_vector(ptr, count, BLOCK: tl.constexpr):
    """The sum of `count` float32."""
    acc = tl.zeros((BLOCK,), tl.float32)  # [BLOCK]
    for start in range(0, count, BLOCK):
        offsets = start + tl.arange(0, BLOCK)  # [BLOCK]
        acc += tl.load(ptr + offsets, offsets < count, 0.0)  # [BLOCK]
    return tl.sum(acc)
