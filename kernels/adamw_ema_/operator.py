"""The operator of `adamw_ema_`, and the checks of its arguments, shared by the Triton and CUDA backends."""

from collections.abc import Callable

import torch

from kernels.adamw_ema_ import OP
from kernels.backends.operators import operator

#: Dtypes of `grad`; the other tensors `[n]` are float32, but for the bfloat16 copy.
DTYPES = frozenset({torch.float32, torch.bfloat16})


def register_op(name: str, update: Callable[..., None]) -> Callable[..., None]:
    """Register `update` as the operator `ldit::<name>`; returns the op that calls it.

    `update` launches the kernel; it is given, in this order:

    param, grad (contiguous), exp_avg, exp_avg_sq, ema, bf16_param or None, step, lr, grad_scale, skip, β1, β2, eps,
    weight_decay, ema_decay.
    """

    @operator(name, mutates=OP.mutates)
    def update_(
        param: torch.Tensor,
        grad: torch.Tensor,
        exp_avg: torch.Tensor,
        exp_avg_sq: torch.Tensor,
        ema: torch.Tensor,
        bf16_param: torch.Tensor | None,
        step: torch.Tensor,
        lr: torch.Tensor,
        grad_scale: torch.Tensor,
        skip: torch.Tensor,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        ema_decay: float,
    ) -> None:
        update(
            *(param, grad.contiguous(), exp_avg, exp_avg_sq, ema, bf16_param),
            *(step, lr, grad_scale, skip),
            *(beta1, beta2, eps, weight_decay, ema_decay),
        )

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
        update_(
            *(param, grad, exp_avg, exp_avg_sq, ema, bf16_param),
            *(step, lr, grad_scale, skip),
            *(*betas, eps, weight_decay, ema_decay),
        )

    return adamw_ema_


def reasons(unsupported_reasons, param, grad, exp_avg, exp_avg_sq, ema, *, bf16_param=None, **scalars) -> list[str]:
    """Reasons against a call: gaps in a tensor that is changed, and its backend's `unsupported_reasons`."""
    changed = {"param": param, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "ema": ema, "bf16_param": bf16_param}
    gaps = [name for name, tensor in changed.items() if tensor is not None and not tensor.is_contiguous()]
    found = [f"{name} is not contiguous" for name in gaps]
    return found + unsupported_reasons(grad, *changed.values(), dtypes=DTYPES)
