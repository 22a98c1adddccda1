"""Print the roofline: data sheets, the least bytes and FLOPs of every production case, and the ceilings of this GPU.

    python -m bench.roofline [--out FILE]

Other programs of the bench measure the ceilings too, or read them from such a FILE with `--ceilings FILE`.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import kernels
from bench.measure import ceilings
from bench.measure.rows import Log
from bench.measure.timing import CudaDevice
from bench.workloads.published import published_config
from common.data_sheets import SHEETS
from kernels.backends.device import cuda_reasons
from kernels.testing.cases import Cost
from lightningdit.cost import flops_per_image


def op_costs(dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, str, Cost]]:
    """Op, case and `Cost` of every production case; nothing is allocated."""
    for op in kernels.OPS.values():
        for case in op.cases:
            if case.production and dtype in op.dtypes & case.dtypes:
                yield op.name, case.id, op.cost(**case.inputs(dtype, "meta"))


def optimizer_bytes_per_parameter() -> float:
    """Those of one pass of AdamW, moving average and bfloat16 copy, with float32 gradients."""
    op = kernels.OPS["adamw_ema_"]
    inputs = next(case for case in op.cases if case.production).inputs(torch.float32, "meta")
    return op.cost(**inputs).forward_bytes / inputs["param"].numel()


def model_flops(name: str = "LightningDiT-XL/1") -> tuple[int, int]:
    """(forward, training) FLOPs of one image by the published model of that name, on 16 × 16 × 32 latents."""
    return flops_per_image(published_config(name))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__)
    parser.add_argument(
        "--seconds",
        type=float,
        default=ceilings.SECONDS,
        help=f"of samples of a ceiling (default {ceilings.SECONDS:g})",
    )
    parser.add_argument("--out", type=Path, help="append a row for each ceiling to this file")
    options = parser.parse_args(argv)
    for name, sheet in SHEETS.items():
        fp8 = f"{sheet.float8 / 1e12:.0f}" if sheet.float8 else "no"
        print(
            f"{name:22} {sheet.bfloat16 / 1e12:6.0f} bf16 {fp8:>5} fp8 TFLOP/s {sheet.bandwidth / 1e12:6.2f} TB/s"
            f"   {sheet.source}"
        )
    for op, case, cost in op_costs():
        print(
            f"{op:30} {case:24} forward {cost.forward_bytes / 1e6:8.1f} MB {cost.forward_flops / 1e9:7.1f} GFLOP, "
            f"backward {cost.backward_bytes / 1e6:8.1f} MB {cost.backward_flops / 1e9:7.1f} GFLOP"
        )
    forward, training = (flops / 1e9 for flops in model_flops())
    print(f"LightningDiT-XL/1, one image: forward {forward:.2f} GFLOP, training {training:.2f}")
    print(f"optimizer: {optimizer_bytes_per_parameter():.0f} bytes for a parameter")
    if reasons := cuda_reasons():
        print(f"ceilings not measured: {'; '.join(reasons)}")
        return 0
    device = CudaDevice()
    ceilings.measure(device, Log(device.kind, options.out), options.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
