"""The CUDA backend of `swiglu`, on csrc/swiglu.cu: operators and launch configurations."""

from dataclasses import dataclass

import torch

from kernels.backends.cuda_launch import backends, launch, unsupported_reasons
from kernels.backends.layout import contiguous
from kernels.backends.operators import operator
from kernels.swiglu.autograd import register_autograd


@dataclass(frozen=True)
class LaunchConfig:
    """Rows of a block."""

    rows_per_block: int


#: Without sums, blocks end soon and let others load; two steps of two rows amortise reading the bias.
ALONE = LaunchConfig(rows_per_block=4)


def summing(rows: int, width: int) -> LaunchConfig:
    """Rows for each partial sum of the bias gradient.

    A partial sum costs 8 bytes a column, written and read once more; a row moves 10 bytes a column in 16-bit dtypes. At
    32 rows that is 5 %. More rows are taken as long as 1056 blocks remain, 8 for each of 132 multiprocessors.
    """
    across = -(-width // 1024)
    rows_per_block = 32
    while rows_per_block < 128 and rows // (2 * rows_per_block) * across >= 1056:
        rows_per_block *= 2
    return LaunchConfig(rows_per_block)


@operator("swiglu_cuda_fwd")
def swiglu_fwd(gate_up: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
    launch("swiglu_fwd", gate_up.contiguous(), contiguous(bias), out, ALONE.rows_per_block)
    return out


@operator("swiglu_cuda_bwd")
def swiglu_bwd(
    d_out: torch.Tensor, gate_up: torch.Tensor, bias: torch.Tensor | None, summed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `gate_up` and of `bias`; the latter empty unless `summed`."""
    packed = gate_up.shape[-1]
    rows = gate_up.numel() // packed
    config = summing(rows, packed // 2) if summed else ALONE
    d_gate_up = gate_up.new_empty(gate_up.shape)
    d_bias, db_partial = gate_up.new_empty(0), None
    if summed and bias is not None:
        d_bias = bias.new_empty(packed)
        db_partial = gate_up.new_empty((-(-rows // config.rows_per_block), packed), dtype=torch.float32)
    launch(
        "swiglu_bwd",
        *(gate_up.contiguous(), contiguous(bias), d_out.contiguous(), d_gate_up, db_partial),
        *(d_bias if summed else None, config.rows_per_block),
    )
    return d_gate_up, d_bias


swiglu = register_autograd(swiglu_fwd, swiglu_bwd)


def unsupported(gate_up, *, bias=None):
    return unsupported_reasons(gate_up, bias)


BACKEND, EMULATED = backends(
    swiglu,
    unsupported,
    torch_ops=("ldit::swiglu_cuda_fwd", "ldit::swiglu_cuda_bwd"),
    configs={"alone": ALONE, "summing": summing(32_768, 3072)},
)
