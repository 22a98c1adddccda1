from kernels.stacked_linear.cases import CASES as PRIMAL
from kernels.testing.cases import Cost, nbytes, with_tangents

CASES = with_tangents(PRIMAL, ("x",), production=("B", "XL", "XL_apart"))


def cost(x, x_tangent, weights, biases) -> Cost:
    result = len(weights) * len(x) * weights[0].shape[0] * x.element_size()
    flops = 2 * x.numel() * weights[0].shape[0] * len(weights)
    return Cost(
        forward_bytes=nbytes(x, x_tangent, *weights, *biases) + 2 * result,
        backward_bytes=result + 2 * nbytes(x, *weights) + nbytes(*biases),
        forward_flops=2 * flops,
        backward_flops=2 * flops,
    )
