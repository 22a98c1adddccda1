from collections.abc import Callable

import torch

from kernels.testing.cases import Case, Cost, Draw, nbytes, strided


def cases(tensors: Callable[..., dict], columns: int) -> tuple[Case, ...]:
    """The cases of a linear layer on either side of SwiGLU.

    Args:
        tensors: (draw, rows, width of the layer's other side, hidden width) → the arguments but for the bias.
        columns: of the hidden width in a tile.
    """

    def case(
        name: str,
        rows: tuple[int, ...],
        width: int,
        hidden: int,
        *,
        bias=True,
        bias_dtype=None,
        layout=lambda x: x,
        production=False,
    ) -> Case:
        def make(draw: Draw) -> dict:
            vector = draw.normal(2 * hidden, mean=-0.4, dtype=bias_dtype) if bias else None
            drawn = tensors(draw, rows, width, hidden)
            return {name: layout(tensor) for name, tensor in drawn.items()} | {"bias": vector}

        return Case(name, make, production)

    return (
        case("one_row", (1,), 8, 8),
        case("odd", (3, 5), 7, 11),
        case("no_bias", (20,), 16, 24, bias=False),
        case("last_tiles", (2, 70), 72, columns + 8),  # more than one tile each way, and more than one step
        case("bias_float32", (33,), 40, 16, bias_dtype=torch.float32),
        case("strided", (4, 6), 16, 8, layout=strided),
        case("transposed", (24,), 16, 16, layout=lambda x: x.t().contiguous().t()),
        case("L_width", (9,), 16, 2730),
        case("many_tiles", (1300,), 8, columns * 25 // 2),  # 143 of them: more than programs
        case("B", (128, 256), 768, 2048, production=True),
        case("L", (128, 256), 1024, 2730, production=True),
        case("XL", (128, 256), 1152, 3072, production=True),
    )


def _tensors(draw: Draw, rows: tuple[int, ...], width: int, hidden: int) -> dict:
    return {
        "x": draw.normal(*rows, width, mean=0.1),
        "weight": draw.normal(2 * hidden, width, std=1.5 * width**-0.5),
    }


CASES = cases(_tensors, columns=128)


def cost(x, weight, *, bias=None) -> Cost:
    tokens = x.numel() // x.shape[-1]
    results = tokens * weight.shape[0] * 3 // 2 * x.element_size()
    return Cost(forward_bytes=nbytes(x, weight, bias) + results, forward_flops=2 * tokens * weight.numel())
