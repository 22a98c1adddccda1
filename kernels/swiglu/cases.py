import torch

from kernels.testing.cases import Case, Cost, Draw, nbytes, strided


def _case(name: str, *shape: int, layout=lambda x: x, bias=False, bias_dtype=None, production=False) -> Case:
    """`shape` is that of the result."""

    def make(draw: Draw) -> dict:
        # The mean keeps the derivative of silu away from being the same for both halves.
        gate_up = layout(draw.normal(*shape[:-1], 2 * shape[-1], mean=0.3, std=2.0))
        vector = layout(draw.normal(2 * shape[-1], mean=-0.4, dtype=bias_dtype)) if bias else None
        return {"gate_up": gate_up, "bias": vector}

    return Case(name, make, production)


CASES = (
    _case("one_number", 1),
    _case("one_row", 1, 1, 8),
    _case("bias", 3, 5, 37, bias=True),
    _case("one_dimension", 37),
    _case("odd", 3, 5, 37),
    _case("four_dimensions", 2, 3, 2, 9),
    _case("strided", 3, 5, 11, layout=strided),
    _case("transposed", 3, 4, 10, layout=lambda x: x.mT.contiguous().mT),
    _case("L_width", 2, 2, 2730),
    _case("1p6B_width", 1, 3, 4778),
    _case("bias_strided", 4, 6, layout=strided, bias=True, bias_dtype=torch.float32),
    _case("bias_L_width", 3, 2730, bias=True),
    _case("bias_many_rows", 1107, 40, bias=True),  # many partial sums, the last of them of few rows
    _case("B", 32, 256, 2048, production=True),
    _case("L", 32, 256, 2730, production=True),
    _case("XL", 128, 256, 3072, production=True),
    _case("1p6B", 32, 256, 4778, production=True),
    _case("L_bias", 32, 256, 2730, bias=True, production=True),
    _case("XL_bias", 128, 256, 3072, bias=True, production=True),
)


def cost(gate_up, *, bias=None) -> Cost:
    size, extra = nbytes(gate_up), nbytes(bias)
    return Cost(forward_bytes=size + size // 2 + extra, backward_bytes=size // 2 + 2 * size + 2 * extra)
