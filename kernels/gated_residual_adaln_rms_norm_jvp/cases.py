from kernels.gated_residual_adaln_rms_norm.cases import CASES as PRIMAL
from kernels.gated_residual_adaln_rms_norm.cases import EPS
from kernels.testing.cases import Cost, nbytes, with_tangents

CASES = with_tangents(
    PRIMAL,
    ("x", "branch", "gate", "shift", "scale"),
    production=("B", "1p6B", "XL", "XL_float32_stream", "XL_bias", "XL_float32_stream_bias"),
)


def cost(
    x,
    x_tangent,
    branch,
    branch_tangent,
    gate,
    gate_tangent,
    weight,
    shift,
    shift_tangent,
    scale,
    scale_tangent,
    eps=EPS,
    *,
    branch_bias=None,
) -> Cost:
    inputs = nbytes(x, branch, gate, weight, shift, scale, branch_bias)
    tangents = nbytes(x_tangent, branch_tangent, gate_tangent, shift_tangent, scale_tangent)
    return Cost(
        forward_bytes=inputs + tangents + 2 * nbytes(x, branch),
        backward_bytes=nbytes(x, branch) + inputs - nbytes(shift) + inputs,
    )
