"""Group norm, then SiLU: `silu((x − mean) / sqrt(var + eps) · weight + bias)`.

    group_norm_silu(x, weight, bias, groups, eps) → y

Mean and (biased) variance are over the C / groups neighbouring channels and all positions of a sample.

Args:
    x: `[B, C, H, W]`, float64, float32, float16 or bfloat16.
    weight, bias: `[C]`, any of these dtypes.
    groups: divides C.
    eps: positive, inside the root.

Returns:
    `[B, C, H, W]` in the dtype of `x`; channels-last in memory if `x` is. The arithmetic is float32 (float64 for
    float64 `x`), rounded once.

Gradients flow to `x`, `weight` and `bias`, each in its own dtype.

Raises:
    ValueError: a shape, dtype or device that does not fit, an empty `x`, `groups` that does not divide C, or `eps` ≤ 0.

Group norm is arXiv 1803.08494; the pair is the one of the autoencoder of arXiv 2112.10752.
"""

import torch

from kernels.arguments import check_device, check_dtype, check_eps, check_rank, check_shape, refuse
from kernels.registry import Op


def check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float) -> None:
    check_rank(NAME, "x", x, "B, C, H, W")
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        refuse(NAME, "groups", groups, f"a divisor of C = {channels}")
    check_dtype(NAME, "x", x)
    for argument, tensor in (("weight", weight), ("bias", bias)):
        check_shape(NAME, argument, tensor, (channels,), "C")
        check_dtype(NAME, argument, tensor)
    check_device(NAME, x, weight=weight, bias=bias)
    check_eps(NAME, eps)


NAME = "group_norm_silu"
OP = Op(NAME, check, differentiable=("x", "weight", "bias"))
