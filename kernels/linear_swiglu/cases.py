import torch

from kernels.cases import Case, Cost, Draw, nbytes, strided


def _case(name: str, rows: tuple[int, ...], width: int, hidden: int, *, bias=True, bias_dtype=None,
          layout=lambda x: x, production=False) -> Case:  # fmt: skip
    def make(draw: Draw) -> dict:
        vector = draw.normal(2 * hidden, mean=-0.4, dtype=bias_dtype) if bias else None
        return {
            "x": layout(draw.normal(*rows, width, mean=0.1)),
            "weight": layout(draw.normal(2 * hidden, width, std=1.5 * width**-0.5)),
            "bias": vector,
        }

    return Case(name, make, production)


CASES = (
    _case("one_row", (1,), 8, 8),
    _case("odd", (3, 5), 7, 11),
    _case("no_bias", (20,), 16, 24, bias=False),
    _case("last_tiles", (2, 70), 72, 136),  # more than one tile each way, and more than one step
    _case("bias_float32", (33,), 40, 16, bias_dtype=torch.float32),
    _case("strided", (4, 6), 16, 8, layout=strided),
    _case("transposed", (24,), 16, 16, layout=lambda x: x.t().contiguous().t()),
    _case("L_width", (9,), 16, 2730),
    _case("many_tiles", (1300,), 8, 1600),  # 143 of them: more than programs
    _case("B", (128, 256), 768, 2048, production=True),
    _case("L", (128, 256), 1024, 2730, production=True),
    _case("XL", (128, 256), 1152, 3072, production=True),
)


def cost(x, weight, *, bias=None) -> Cost:
    tokens = x.numel() // x.shape[-1]
    results = tokens * weight.shape[0] * 3 // 2 * x.element_size()
    return Cost(forward_bytes=nbytes(x, weight, bias) + results, forward_flops=2 * tokens * weight.numel())
