from kernels.adaln_rms_norm.reference import adaln_rms_norm
from kernels.arguments import accumulation_dtype
from kernels.registry import Backend


def gated_residual_adaln_rms_norm(x, branch, gate, weight, shift, scale, eps, *, branch_bias=None):
    acc_dtype = accumulation_dtype(x, branch)
    added = branch.to(acc_dtype)
    if branch_bias is not None:
        added = added + branch_bias.to(acc_dtype)
    x_new = (x.to(acc_dtype) + gate.to(acc_dtype)[:, None] * added).to(x.dtype)
    return x_new, adaln_rms_norm(x_new, weight, shift, scale, eps, out_dtype=branch.dtype)


BACKEND = Backend("reference", gated_residual_adaln_rms_norm)
