import torch

from kernels.registry import Backend

#: Numbers that a CPU updates at once: few enough for all that is made on the way to stay in its caches.
BLOCK = 2**18


@torch.no_grad()
def adamw_ema_(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    ema,
    *,
    step,
    lr,
    betas,
    eps,
    weight_decay,
    ema_decay,
    grad_scale,
    skip,
    bf16_param=None,
):
    scalars = (step, lr, betas, eps, weight_decay, ema_decay, grad_scale, skip)
    tensors = [param, grad, exp_avg, exp_avg_sq, ema, *([] if bf16_param is None else [bf16_param])]
    size = BLOCK if param.device.type == "cpu" else max(param.numel(), 1)
    for blocks in zip(*(tensor.split(size) for tensor in tensors), strict=True):
        update(*scalars, *blocks)


def update(
    step,
    lr,
    betas,
    eps,
    weight_decay,
    ema_decay,
    grad_scale,
    skip,
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    ema,
    bf16_param=None,
):
    acc_dtype = param.dtype
    g = grad.to(acc_dtype) * grad_scale.to(acc_dtype)
    m = betas[0] * exp_avg + (1 - betas[0]) * g
    v = betas[1] * exp_avg_sq + (1 - betas[1]) * g.square()
    # One number each, so in float64: 1 − 0.999¹ has only four digits left in float32.
    m_scale, v_scale = ((1 / (1 - beta ** step.double())).to(acc_dtype) for beta in betas)
    update = m * m_scale / ((v * v_scale).sqrt() + eps)
    p = param * (1 - lr.double() * weight_decay).to(acc_dtype) - lr.to(acc_dtype) * update
    e = ema_decay * ema + (1 - ema_decay) * p
    for tensor, new in ((param, p), (exp_avg, m), (exp_avg_sq, v), (ema, e), (bf16_param, p)):
        if tensor is not None:
            tensor.copy_(torch.where(skip != 0, tensor, new.to(tensor.dtype)))


BACKEND = Backend("reference", adamw_ema_)
