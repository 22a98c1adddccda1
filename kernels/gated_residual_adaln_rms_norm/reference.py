from kernels.adaln_rms_norm.reference import adaln_rms_norm
from kernels.arguments import accumulation_dtype
from kernels.registry import Backend


def gated_residual_adaln_rms_norm(x, branch, gate, weight, shift, scale, eps, *, branch_bias=None):
    wide = accumulation_dtype(x, branch)
    added = branch.to(wide)
    if branch_bias is not None:
        added = added + branch_bias.to(wide)
    x_new = (x.to(wide) + gate.to(wide)[:, None] * added).to(x.dtype)
    return x_new, adaln_rms_norm(x_new, weight, shift, scale, eps, out_dtype=branch.dtype)


BACKEND = Backend("reference", gated_residual_adaln_rms_norm)
