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
    has_shift=True,
    vector_dtype=None,
    out_dtype=None,
    x_layout=lambda x: x,
    vector_layout=lambda x: x,
    production=False,
) -> Case:
    """`vector_dtype` is the dtype of weight, shift and scale, where it is not that of `x`.

    `x_layout` and `vector_layout` lay out `x` and those three in memory.
    """

    def make(draw: Draw) -> dict:
        shift, scale = (vector_layout(part.to(vector_dtype or draw.dtype)) for part in draw.chunks(2, samples, width))
        return {
            "x": x_layout(rows(draw, samples, tokens, width)),
            "weight": vector_layout(draw.normal(width, mean=1.0, std=0.2, dtype=vector_dtype)),
            "shift": shift if has_shift else None,
            "scale": scale,
            "eps": EPS,
            "out_dtype": out_dtype,
        }

    return Case(name, make, production)


CASES = (
    _case("one_row", 1, 1, 8),
    _case("one_token", 3, 1, 8),
    _case("odd", 3, 5, 37),
    _case("odd_no_shift", 2, 7, 19, has_shift=False),
    _case("even_rows", 2, 16, 48, rows=Draw.normal),
    _case("XL_width", 2, 3, 1152),
    _case("long", 2, 37, 33),
    _case("three_blocks_of_columns", 2, 3, 440),
    _case("warps_and_steps", 2, 9, 520),  # rows of several warps, and several steps over tokens by each of them
    _case("strided", 2, 5, 24, x_layout=strided),
    _case("strided_vectors", 2, 5, 24, vector_layout=strided),
    _case("transposed", 2, 6, 24, x_layout=lambda x: x.mT.contiguous().mT),
    _case("float32_modulation", 2, 5, 40, vector_dtype=torch.float32),
    _case("to_bfloat16", 2, 5, 40, vector_dtype=torch.float32, out_dtype=torch.bfloat16),
    _case("to_float32", 2, 5, 40, out_dtype=torch.float32),
    _case("B", 32, 256, 768, rows=Draw.normal, production=True),
    _case("L", 32, 256, 1024, rows=Draw.normal, production=True),
    _case("XL", 128, 256, 1152, rows=Draw.normal, production=True),
    _case("1p6B", 32, 256, 1792, production=True),
    _case("XL_mixed", 32, 256, 1152, vector_dtype=torch.float32, production=True),
)


def cost(x, weight, shift, scale, eps=EPS, *, out_dtype=None) -> Cost:
    result = x.numel() * (out_dtype or x.dtype).itemsize
    return Cost(
        forward_bytes=nbytes(x, weight, shift, scale) + result,
        backward_bytes=result + nbytes(x, weight, scale) + nbytes(x, weight, shift, scale),
    )
