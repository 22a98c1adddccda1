"""One AdamW update, the moving average of the weights and their bfloat16 copy, in place.

    adamw_ema_(param, grad, exp_avg, exp_avg_sq, ema, *, step, lr, betas, eps, weight_decay, ema_decay, grad_scale,
               skip, bf16_param=None) → None

    g          = grad · grad_scale
    exp_avg    = β1 · exp_avg    + (1 − β1) · g
    exp_avg_sq = β2 · exp_avg_sq + (1 − β2) · g²
    m̂, v̂       = exp_avg / (1 − β1^step), exp_avg_sq / (1 − β2^step)
    param      = param · (1 − lr · weight_decay) − lr · m̂ / (sqrt(v̂) + eps)
    ema        = ema_decay · ema + (1 − ema_decay) · param
    bf16_param = param, rounded

With `skip` not zero nothing changes, bit for bit, whatever the gradients hold. Nothing is read by the host.

Args:
    param, exp_avg, exp_avg_sq, ema: `[n]`, float32 (or all float64), changed in place.
    grad: `[n]`, the dtype of `param`, or bfloat16; read only.
    step: scalar tensor, the number of this update among those not skipped, from 1.
    lr: scalar tensor, learning rate.
    betas: `(β1, β2)`, each in [0, 1).
    eps: added to the root; not negative.
    weight_decay: decoupled from the gradient; not negative.
    ema_decay: in [0, 1].
    grad_scale: scalar tensor that multiplies the gradient: the clip factor, the inverse of a loss scale.
    skip: scalar tensor, bool or a number; not zero leaves everything as it is.
    bf16_param: `[n]` bfloat16, changed in place, or None.

The scalar tensors have one element and lie on the device of `param`.

Raises:
    ValueError: a shape, dtype or device that does not fit, an empty `param`, or a number outside its range.

AdamW is arXiv 1711.05101, as in `torch.optim.AdamW`, which has no moving average.
"""

import torch

from kernels.arguments import check_device, check_dtype, check_rank, check_shape, refuse
from kernels.registry import Op


def check(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    ema: torch.Tensor,
    *,
    step: torch.Tensor,
    lr: torch.Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_decay: float,
    grad_scale: torch.Tensor,
    skip: torch.Tensor,
    bf16_param: torch.Tensor | None = None,
) -> None:
    check_rank(NAME, "param", param, "n")
    check_dtype(NAME, "param", param, {torch.float32, torch.float64})
    check_dtype(NAME, "grad", grad, {param.dtype, torch.bfloat16})
    for argument, tensor in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq), ("ema", ema)):
        check_shape(NAME, argument, tensor, param.shape, "n")
        check_dtype(NAME, argument, tensor, {param.dtype})
    check_shape(NAME, "grad", grad, param.shape, "n")
    if bf16_param is not None:
        check_shape(NAME, "bf16_param", bf16_param, param.shape, "n")
        check_dtype(NAME, "bf16_param", bf16_param, {torch.bfloat16})
    for argument, tensor in (("step", step), ("lr", lr), ("grad_scale", grad_scale), ("skip", skip)):
        if not isinstance(tensor, torch.Tensor) or tensor.numel() != 1:
            refuse(NAME, argument, tensor, "a tensor of one element, on the device")
    check_device(
        NAME,
        param,
        grad=grad,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        ema=ema,
        bf16_param=bf16_param,
        step=step,
        lr=lr,
        grad_scale=grad_scale,
        skip=skip,
    )
    _check_numbers(betas, eps, weight_decay, ema_decay)


def _check_numbers(betas: tuple[float, float], eps: float, weight_decay: float, ema_decay: float) -> None:
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        refuse(NAME, "betas", betas, "two numbers in [0, 1)")
    for argument, number in (("eps", eps), ("weight_decay", weight_decay)):
        if not number >= 0:
            refuse(NAME, argument, number, "a number that is not negative")
    if not 0 <= ema_decay <= 1:
        refuse(NAME, "ema_decay", ema_decay, "a number in [0, 1]")


NAME = "adamw_ema_"
OP = Op(
    NAME,
    check,
    mutates=("param", "exp_avg", "exp_avg_sq", "ema", "bf16_param"),
    dtypes=frozenset({torch.float64, torch.float32, torch.bfloat16}),
)
