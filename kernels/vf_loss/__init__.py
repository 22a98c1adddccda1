"""The two terms of the VF loss, which aligns latents with the features of a vision foundation model.

    vf_loss(z, f, distmat_margin, cos_margin) → (distmat, cos)

    distmat = mean over i, j of relu(|cos(z_i, z_j) − cos(f_i, f_j)| − distmat_margin)     over all pairs, i = j too
    cos     = mean over i    of relu(1 − cos_margin − cos(z_i, f_i))

over the N = h·w positions of each sample, then over the samples. `cos` of two C-vectors is their product over their
norms; a norm below a floor counts as the floor: 1e-12 in the first term, 1e-8 in the second.

Args:
    z: `[B, C, h, w]`, latents brought to the width of the features; float64, float32, float16 or bfloat16.
    f: `[B, C, h, w]`, features; the dtype of `z` or another of these.
    distmat_margin, cos_margin: differences that cost nothing; not negative (the paper uses 0.25 and 0.5).

Returns:
    Two scalars, float32 (float64 if `z` or `f` is float64), to be weighted by the caller.

Gradients flow to `z` and `f`, each in its own dtype. Where a relu or an absolute value has a kink, its derivative is 0.

Raises:
    ValueError: a shape, dtype or device that does not fit, an empty `z`, or a negative margin.

The terms are equations 1 to 5 of arXiv 2501.01423.
"""

import torch

from kernels.arguments import check_device, check_dtype, check_rank, check_shape, refuse
from kernels.registry import Op


def check(z: torch.Tensor, f: torch.Tensor, distmat_margin: float, cos_margin: float) -> None:
    check_rank(NAME, "z", z, "B, C, h, w")
    check_shape(NAME, "f", f, z.shape, "B, C, h, w, as z")
    check_dtype(NAME, "z", z)
    check_dtype(NAME, "f", f)
    check_device(NAME, z, f=f)
    for argument, margin in (("distmat_margin", distmat_margin), ("cos_margin", cos_margin)):
        if not margin >= 0:
            refuse(NAME, argument, margin, "a number that is not negative")


NAME = "vf_loss"
OP = Op(NAME, check, differentiable=("z", "f"))
