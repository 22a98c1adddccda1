from kernels.adaln_rms_norm.cases import CASES as PRIMAL
from kernels.adaln_rms_norm.cases import EPS
from kernels.testing.cases import Cost, nbytes, with_tangents

CASES = with_tangents(PRIMAL, ("x", "shift", "scale"), production=("B", "L", "XL", "1p6B", "XL_mixed"))


def cost(x, x_tangent, weight, shift, shift_tangent, scale, scale_tangent, eps=EPS, *, out_dtype=None) -> Cost:
    result = x.numel() * (out_dtype or x.dtype).itemsize
    tangents = nbytes(x_tangent, shift_tangent, scale_tangent)
    return Cost(
        forward_bytes=nbytes(x, weight, shift, scale) + tangents + 2 * result,
        backward_bytes=result + nbytes(x, weight, scale) + nbytes(x, weight, shift, scale),
    )
