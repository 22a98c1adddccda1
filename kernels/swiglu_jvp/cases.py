from kernels.swiglu.cases import CASES as PRIMAL
from kernels.testing.cases import Cost, nbytes, with_tangents

CASES = with_tangents(PRIMAL, ("gate_up",), production=("B", "XL", "L_bias", "XL_bias"))


def cost(gate_up, gate_up_tangent, *, bias=None) -> Cost:
    size, extra = nbytes(gate_up), nbytes(bias)
    return Cost(forward_bytes=2 * size + size + extra, backward_bytes=size // 2 + 2 * size + 2 * extra)
