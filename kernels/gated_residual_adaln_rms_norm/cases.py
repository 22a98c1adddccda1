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
    x_dtype=None,
    vector_dtype=None,
    bias_mean=None,
    token_layout=lambda x: x,
    vector_layout=lambda x: x,
    production=False,
) -> Case:
    """`x_dtype` is the dtype of `x`, `vector_dtype` that of the modulation, where they are not that of `branch`.

    `token_layout` lays out `x` and `branch` in memory, `vector_layout` the others; `bias_mean` is the mean of a bias of
    the branch, None for no bias.
    """

    def make(draw: Draw) -> dict:
        gate, shift, scale = (
            vector_layout(part.to(vector_dtype or draw.dtype)) for part in draw.chunks(3, samples, width)
        )
        inputs = {
            "x": token_layout(rows(draw, samples, tokens, width, dtype=x_dtype)),
            "branch": token_layout(rows(draw, samples, tokens, width)),
            "gate": gate,
            "weight": vector_layout(draw.normal(width, mean=1.0, std=0.2, dtype=vector_dtype)),
            "shift": shift if has_shift else None,
            "scale": scale,
            "eps": EPS,
            "branch_bias": None,
        }
        if bias_mean is not None:
            inputs["branch_bias"] = vector_layout(draw.normal(width, mean=bias_mean, std=0.5, dtype=vector_dtype))
        return inputs

    return Case(name, make, production)


CASES = (
    _case("one_row", 1, 1, 8),
    _case("one_token", 3, 1, 8),
    _case("odd", 3, 5, 37),
    _case("odd_no_shift", 2, 7, 19, has_shift=False),
    _case("even_rows", 2, 16, 48, rows=Draw.normal),
    _case("XL_width", 2, 3, 1152),
    _case("three_blocks_of_columns", 2, 3, 440),
    _case("strided", 2, 5, 24, token_layout=strided),
    _case("strided_vectors", 2, 5, 24, vector_layout=strided, bias_mean=0.7),
    _case("transposed", 2, 6, 24, token_layout=lambda x: x.mT.contiguous().mT),
    _case("float32_stream", 2, 5, 40, x_dtype=torch.float32),
    _case("float32_stream_and_modulation", 2, 37, 33, x_dtype=torch.float32, vector_dtype=torch.float32),
    _case("bias", 3, 20, 37, bias_mean=0.7),
    _case("bias_no_shift", 2, 7, 19, has_shift=False, bias_mean=-0.7),
    _case("float32_stream_and_bias", 2, 18, 40, x_dtype=torch.float32, vector_dtype=torch.float32, bias_mean=0.7),
    _case("B", 32, 256, 768, rows=Draw.normal, production=True),
    _case("L", 32, 256, 1024, rows=Draw.normal, production=True),
    _case("XL", 128, 256, 1152, rows=Draw.normal, production=True),
    _case("1p6B", 32, 256, 1792, production=True),
    _case("XL_float32_stream", 128, 256, 1152, rows=Draw.normal, x_dtype=torch.float32, production=True),
    _case("XL_bias", 128, 256, 1152, rows=Draw.normal, bias_mean=0.7, production=True),
    _case("XL_float32_stream_bias", 32, 256, 1152, x_dtype=torch.float32, bias_mean=0.7, production=True),
)


def cost(x, branch, gate, weight, shift, scale, eps=EPS, *, branch_bias=None) -> Cost:
    inputs = nbytes(x, branch, gate, weight, shift, scale, branch_bias)
    return Cost(
        forward_bytes=inputs + nbytes(x, branch),
        # Read: the gradients of the results, x' in place of x, the other inputs but shift. Written: all gradients.
        backward_bytes=nbytes(x, branch) + inputs - nbytes(shift) + inputs,
    )
