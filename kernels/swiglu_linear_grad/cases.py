from kernels.linear_swiglu.cases import cases
from kernels.testing.cases import Cost, Draw, nbytes


def _tensors(draw: Draw, rows: tuple[int, ...], width: int, hidden: int) -> dict:
    return {
        "d_output": draw.normal(*rows, width),
        "weight": draw.normal(width, hidden, mean=0.1, std=width**-0.5),
        "gate_up": draw.normal(*rows, 2 * hidden, mean=0.3, std=2.0),
    }


CASES = cases(_tensors, columns=256)


def cost(d_output, weight, gate_up, *, bias=None) -> Cost:
    tokens = d_output.numel() // d_output.shape[-1]
    return Cost(
        forward_bytes=nbytes(d_output, weight) + 2 * nbytes(gate_up, bias), forward_flops=2 * tokens * weight.numel()
    )
