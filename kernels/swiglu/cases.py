from kernels.cases import Case, Cost, Draw, nbytes, strided


def _case(name: str, *shape: int, layout=lambda x: x, production=False) -> Case:
    """`shape` is that of the result."""

    def make(draw: Draw) -> dict:
        # The mean keeps the slope of silu away from being the same for both halves.
        return {"gate_up": layout(draw.normal(*shape[:-1], 2 * shape[-1], mean=0.3, std=2.0))}

    return Case(name, make, production)


CASES = (
    _case("one_number", 1),
    _case("one_row", 1, 1, 8),
    _case("one_dimension", 37),
    _case("odd", 3, 5, 37),
    _case("four_dimensions", 2, 3, 2, 9),
    _case("strided", 3, 5, 11, layout=strided),
    _case("transposed", 3, 4, 10, layout=lambda x: x.mT.contiguous().mT),
    _case("L_width", 2, 2, 2730),
    _case("1p6B_width", 1, 3, 4778),
    _case("B", 32, 256, 2048, production=True),
    _case("L", 32, 256, 2730, production=True),
    _case("XL", 128, 256, 3072, production=True),
    _case("1p6B", 32, 256, 4778, production=True),
)


def cost(gate_up) -> Cost:
    size = nbytes(gate_up)
    return Cost(forward_bytes=size + size // 2, backward_bytes=size // 2 + 2 * size)
