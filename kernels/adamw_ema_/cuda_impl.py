"""The CUDA backend of `adamw_ema_`: launch configuration and launch of the kernel of csrc/adamw_ema.cu."""

from dataclasses import dataclass
from functools import partial

from kernels.adamw_ema_.operator import DTYPES, reasons, register_op
from kernels.backends.cuda_launch import backends, launch, unsupported_reasons


@dataclass(frozen=True)
class LaunchConfig:
    """Launch configuration of the update: elements of a block."""

    elements_per_block: int


#: Two rounds of 2048: the bias corrections, as many instructions as three elements, are made once for 16 of a thread.
#: The production shard keeps 20,608 blocks, 52 for each of the three that 132 multiprocessors hold at a time.
UPDATE = LaunchConfig(elements_per_block=4096)


def update(param, *tensors_and_numbers):
    launch("adamw_ema_", param, *tensors_and_numbers, UPDATE.elements_per_block)


adamw_ema_ = register_op("adamw_ema_cuda_", update)
unsupported = partial(reasons, unsupported_reasons)

BACKEND, EMULATED = backends(
    adamw_ema_, unsupported, torch_ops=("ldit::adamw_ema_cuda_",), configs={"update": UPDATE}, dtypes=DTYPES
)
