import torch

from kernels.arguments import accumulation_dtype
from kernels.registry import Backend


def adaln_rms_norm_jvp(x, x_tangent, weight, shift, shift_tangent, scale, scale_tangent, eps, *, out_dtype=None):
    acc_dtype = accumulation_dtype(x)
    x, gain = x.to(acc_dtype), weight.to(acc_dtype)
    r = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    x_hat = x * r
    factor = 1 + scale.to(acc_dtype)[:, None]
    y = x_hat * gain * factor
    with torch.no_grad():
        x_t, scale_t = x_tangent.to(acc_dtype), scale_tangent.to(acc_dtype)[:, None]
        x_hat_t = r * (x_t - x_hat * (x_hat * x_t).mean(dim=-1, keepdim=True))
        y_t = (x_hat_t * factor + x_hat * scale_t) * gain
    if shift is not None:
        y = y + shift.to(acc_dtype)[:, None]
        y_t = y_t + shift_tangent.to(acc_dtype)[:, None]
    dtype = out_dtype or x_tangent.dtype
    return y.to(dtype), y_t.detach().to(dtype)


BACKEND = Backend("reference", adaln_rms_norm_jvp)
