"""Stacked linear layers and their tangent by the library's batched matrix product: one, of twice as many rows.

Shapes: B samples, D inputs, L layers, K outputs of a layer. Weights that lie at equal distances are not copied.
"""

import torch
from torch import Tensor

from kernels.backends.operators import is_fake_call, operator
from kernels.registry import Backend
from kernels.stacked_linear.library_impl import evenly_spaced, stacked_linear_bwd


@operator("stacked_linear_jvp_fwd")
def stacked_linear_jvp_fwd(x: Tensor, x_tangent: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """y and its tangent, [L, 2, B, K]."""
    samples, layers, outputs = x.shape[0], len(weights), weights[0].shape[0]
    y = x.new_empty(layers, 2, samples, outputs)
    if is_fake_call():
        return y
    # The products add to what is there: the bias to x's rows, 0 to those of its tangent.
    bias = evenly_spaced(biases)  # [L, K]
    y[:, 0], y[:, 1] = (torch.stack(biases) if bias is None else bias)[:, None], 0
    both, sums = torch.cat((x, x_tangent)), y.view(layers, 2 * samples, outputs)  # [2B, D], [L, 2B, K]
    weight = evenly_spaced(weights)  # [L, K, D]
    if weight is None:
        for sums_of_layer, weight_of_layer in zip(sums, weights, strict=True):
            torch.addmm(sums_of_layer, both, weight_of_layer.t(), out=sums_of_layer)
    else:
        torch.baddbmm(sums, both.expand(layers, -1, -1), weight.mT, out=sums)
    return y


def save(ctx, inputs, output) -> None:
    x, _, weights, _ = inputs
    ctx.save_for_backward(x, *weights)


def gradients(ctx, dy: Tensor):
    x, *weights = ctx.saved_tensors
    dx, dweight, dbias = stacked_linear_bwd(dy[:, 0], x, weights)
    return dx, None, list(dweight.unbind()), list(dbias.unbind())


stacked_linear_jvp_fwd.register_autograd(gradients, setup_context=save)


def stacked_linear_jvp(x, x_tangent, weights, biases):
    y, tangent = stacked_linear_jvp_fwd(x, x_tangent, weights, biases).unbind(1)  # [L, B, K] both
    return y, tangent.detach()


BACKEND = Backend(
    "library",
    stacked_linear_jvp,
    torch_ops=("ldit::stacked_linear_jvp_fwd", "ldit::stacked_linear_bwd"),
)
