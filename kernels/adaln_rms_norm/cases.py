import torch

from kernels.testing.cases import Case, Cost, Draw, nbytes, strided

EPS = 1e-6


def _case(
    name: str,
    samples: int,
    tokens: int,
    width: int,
    *,
    rows=Draw.rows,
    shifted=True,
    small=None,
    out_dtype=None,
    layout=lambda x: x,
    vectors=lambda x: x,
    production=False,
) -> Case:
    """`small` is the dtype of weight, shift and scale where it is not that of `x`, `vectors` their layout."""

    def make(draw: Draw) -> dict:
        shift, scale = (vectors(part.to(small or draw.dtype)) for part in draw.chunks(2, samples, width))
        return {
            "x": layout(rows(draw, samples, tokens, width)),
            "weight": vectors(draw.normal(width, mean=1.0, std=0.2, dtype=small)),
            "shift": shift if shifted else None,
            "scale": scale,
            "eps": EPS,
            "out_dtype": out_dtype,
        }

    return Case(name, make, production)


CASES = (
    _case("one_row", 1, 1, 8),
    _case("one_token", 3, 1, 8),
    _case("odd", 3, 5, 37),
    _case("odd_no_shift", 2, 7, 19, shifted=False),
    _case("even_rows", 2, 16, 48, rows=Draw.normal),
    _case("XL_width", 2, 3, 1152),
    _case("long", 2, 37, 33),
    _case("three_blocks_of_columns", 2, 3, 440),
    _case("warps_and_steps", 2, 9, 520),  # rows of several warps, and several steps over tokens by each of them
    _case("strided", 2, 5, 24, layout=strided),
    _case("strided_vectors", 2, 5, 24, vectors=strided),
    _case("transposed", 2, 6, 24, layout=lambda x: x.mT.contiguous().mT),
    _case("float32_modulation", 2, 5, 40, small=torch.float32),
    _case("to_bfloat16", 2, 5, 40, small=torch.float32, out_dtype=torch.bfloat16),
    _case("to_float32", 2, 5, 40, out_dtype=torch.float32),
    _case("B", 32, 256, 768, rows=Draw.normal, production=True),
    _case("L", 32, 256, 1024, rows=Draw.normal, production=True),
    _case("XL", 128, 256, 1152, rows=Draw.normal, production=True),
    _case("1p6B", 32, 256, 1792, production=True),
    _case("XL_mixed", 32, 256, 1152, small=torch.float32, production=True),
)


def cost(x, weight, shift, scale, eps=EPS, *, out_dtype=None) -> Cost:
    result = x.numel() * (out_dtype or x.dtype).itemsize
    return Cost(
        forward_bytes=nbytes(x, weight, shift, scale) + result,
        backward_bytes=result + nbytes(x, weight, scale) + nbytes(x, weight, shift, scale),
    )
