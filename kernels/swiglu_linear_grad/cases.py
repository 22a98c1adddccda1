import torch

from kernels.cases import Case, Cost, Draw, nbytes, strided


def _case(name: str, rows: tuple[int, ...], width: int, hidden: int, *, bias=True, bias_dtype=None,
          layout=lambda x: x, production=False) -> Case:  # fmt: skip
    def make(draw: Draw) -> dict:
        vector = draw.normal(2 * hidden, mean=-0.4, dtype=bias_dtype) if bias else None
        return {
            "d_output": layout(draw.normal(*rows, width)),
            "weight": layout(draw.normal(width, hidden, mean=0.1, std=width**-0.5)),
            "gate_up": layout(draw.normal(*rows, 2 * hidden, mean=0.3, std=2.0)),
            "bias": vector,
        }

    return Case(name, make, production)


CASES = (
    _case("one_row", (1,), 8, 8),
    _case("odd", (3, 5), 7, 11),
    _case("no_bias", (20,), 16, 24, bias=False),
    _case("last_tiles", (2, 70), 72, 264),  # more than one tile each way, and more than one step
    _case("bias_float32", (33,), 40, 16, bias_dtype=torch.float32),
    _case("strided", (4, 6), 16, 8, layout=strided),
    _case("transposed", (24,), 16, 16, layout=lambda x: x.t().contiguous().t()),
    _case("L_width", (9,), 16, 2730),
    _case("many_tiles", (1300,), 8, 3200),  # 143 of them: more than programs
    _case("B", (128, 256), 768, 2048, production=True),
    _case("L", (128, 256), 1024, 2730, production=True),
    _case("XL", (128, 256), 1152, 3072, production=True),
)


def cost(d_output, weight, gate_up, *, bias=None) -> Cost:
    tokens = d_output.numel() // d_output.shape[-1]
    return Cost(
        forward_bytes=nbytes(d_output, weight) + 2 * nbytes(gate_up, bias), forward_flops=2 * tokens * weight.numel()
    )
