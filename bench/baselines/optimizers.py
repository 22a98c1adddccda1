"""AdamW as libraries have it, then the moving average and the bfloat16 copy as passes of their own."""

from functools import partial
from typing import Any

import torch
from torch.optim.adamw import adamw

from bench.baselines.interface import Adapter, Provider
from kernels.testing.tolerance import Inputs


def torch_fused() -> Adapter:
    """The functional form of `torch.optim.AdamW(fused=True)`. Writes the gradient back, divided by its scale."""

    def arrange(*, step, grad_scale, skip, **rest) -> Inputs:
        return {"steps": (step - 1).float(), "inverse_scale": grad_scale.float().reciprocal(), **rest}

    @torch.no_grad()
    def run(param, grad, exp_avg, exp_avg_sq, ema, *, steps, betas, ema_decay, inverse_scale, bf16_param=None, **rest):
        states = [exp_avg], [exp_avg_sq], [], [steps]
        scaled = {"fused": True, "grad_scale": inverse_scale, "amsgrad": False, "maximize": False}
        adamw([param], [grad.to(param.dtype)], *states, beta1=betas[0], beta2=betas[1], **scaled, **rest)
        _average_and_copy(param, ema, ema_decay, bf16_param)

    return Adapter(run, arrange)


def apex_adam() -> Adapter:
    from apex.optimizers import FusedAdam

    return _optimizer(FusedAdam)


def deepspeed_adam() -> Adapter:
    from deepspeed.ops.adam import FusedAdam

    return _optimizer(FusedAdam)


def _optimizer(FusedAdam: type) -> Adapter:
    """An optimizer object that holds these states; learning rate and step are the host's, as it has them."""

    def arrange(param, grad, exp_avg, exp_avg_sq, *, step, lr, betas, eps, weight_decay, skip, **rest) -> Inputs:
        settings = {"lr": float(lr), "betas": betas, "eps": eps, "weight_decay": weight_decay}
        optimizer = FusedAdam([param], bias_correction=True, adam_w_mode=True, **settings)
        done = int(step) - 1
        optimizer.param_groups[0]["step"] = done  # apex counts here, DeepSpeed in the state
        optimizer.state[param] = {"step": done, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        param.grad = grad if grad.dtype == param.dtype else torch.empty_like(param)
        return {"optimizer": optimizer, "param": param, "grad": grad, **rest}

    @torch.no_grad()
    def run(optimizer: Any, param, grad, ema, *, ema_decay, grad_scale, bf16_param=None):
        if param.grad is not grad:
            param.grad.copy_(grad)
        param.grad.mul_(grad_scale)
        optimizer.step()
        _average_and_copy(param, ema, ema_decay, bf16_param)

    return Adapter(run, arrange)


def _average_and_copy(param, ema, ema_decay: float, bf16_param) -> None:
    torch._foreach_lerp_([ema], [param], 1 - ema_decay)
    if bf16_param is not None:
        torch._foreach_copy_([bf16_param], [param])


def _never_skips(skip, **rest) -> list[str]:
    """Reads the flag, as these libraries' users do on the host."""
    return ["the averages would be updated in a skipped step too"] if bool(skip) else []


_THREE = "AdamW, moving average and bfloat16 copy, each a pass"
_provider = partial(Provider, unsupported=_never_skips, overwrites=True)
OPTIMIZERS = (
    _provider(
        "torch-fused",
        torch_fused,
        includes=f"{_THREE}; the scaled gradient is written back; a bfloat16 gradient is cast first",
    ),
    *(
        _provider(f"{package}-fused-adam", load, includes=f"{_THREE}; one more to scale the gradient", package=package)
        for package, load in (("apex", apex_adam), ("deepspeed", deepspeed_adam))
    ),
)
