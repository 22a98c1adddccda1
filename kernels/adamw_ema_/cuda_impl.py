"""AdamW, moving average and bfloat16 copy on the kernel of csrc/adamw_ema.cu; operator and launch configuration."""

from dataclasses import dataclass

import torch

from kernels.cuda_launch import backends, launch, refusals
from kernels.operators import operator

DTYPES = frozenset({torch.float32, torch.bfloat16})


@dataclass(frozen=True)
class Config:
    """How many elements a block updates."""

    numbers_per_block: int


#: Two rounds of 2048: the bias corrections, as many instructions as three elements, are made once for 16 of a thread.
#: The production shard keeps 20,608 blocks, 52 for each of the three that 132 multiprocessors hold at a time.
UPDATE = Config(numbers_per_block=4096)


@operator("adamw_ema_cuda_", mutates=("param", "exp_avg", "exp_avg_sq", "ema", "bf16_param"))
def update_(
    param: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, ema: torch.Tensor,
    bf16_param: torch.Tensor | None, step: torch.Tensor, lr: torch.Tensor, grad_scale: torch.Tensor,
    skip: torch.Tensor, beta1: float, beta2: float, eps: float, weight_decay: float, ema_decay: float,
) -> None:  # fmt: skip
    launch(
        "adamw_ema_", param, grad.contiguous(), exp_avg, exp_avg_sq, ema, bf16_param, step, lr, grad_scale, skip,
        beta1, beta2, eps, weight_decay, ema_decay, UPDATE.numbers_per_block,
    )  # fmt: skip


def adamw_ema_(param, grad, exp_avg, exp_avg_sq, ema, *, step, lr, betas, eps, weight_decay, ema_decay, grad_scale,
               skip, bf16_param=None):
    update_(param, grad, exp_avg, exp_avg_sq, ema, bf16_param, step, lr, grad_scale, skip, *betas, eps, weight_decay,
            ema_decay)  # fmt: skip


def unsupported(param, grad, exp_avg, exp_avg_sq, ema, *, bf16_param=None, **scalars):
    changed = {"param": param, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "ema": ema, "bf16_param": bf16_param}
    gaps = [name for name, tensor in changed.items() if tensor is not None and not tensor.is_contiguous()]
    reasons = [f"{name} is not contiguous" for name in gaps]
    return reasons + refusals(param, grad, exp_avg, exp_avg_sq, ema, bf16_param, dtypes=DTYPES)


BACKEND, EMULATED = backends(
    adamw_ema_, unsupported, torch_ops=("ldit::adamw_ema_cuda_",), configs={"update": UPDATE}, dtypes=DTYPES
)
