"""A child that reports what this machine has, and whether the least of it works.

    python -m bench.triage.machine --result FILE [--device cpu]

Packages, driver, the CUDA extension on a small call, NCCL on one process. The file is written after each of them: a
check that hangs does not lose the results of the others.
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.measure.rows import machine, version
from bench.triage.verdicts import FAILED, OK
from common.files import write_json
from kernels import OPS
from kernels.backends.device import EXTENSION, cuda_reasons, extension_reasons

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "pydantic",
    "deepspeed",
    "torchvision",
    "torchdiffeq",
    "timm",
    "lpips",
    "pillow",
    "nvidia-dali-cuda130",
    "scikit-image",
    "PyYAML",
    "pytest",
    "pytest-xdist",
    "pybind11",
    "ninja",
    "liger-kernel",
    "quack-kernels",
    "flash-attn",
)


def extension_faults(device: str) -> list[str]:
    """Why CUDA kernels do not run here: not built, not loaded, not for this GPU, or wrong on a small call."""
    name = "emulated" if device == "cpu" else "cuda"
    if reasons := extension_reasons() if device == "cuda" else OPS["swiglu"].reasons(name):
        return reasons
    x = torch.arange(16.0, device=device).view(1, 16).sub(8)
    try:
        got = OPS["swiglu"].bind(OPS["swiglu"].backend(name))(x)
        error = float((got - torch.nn.functional.silu(x[:, :8]) * x[:, 8:]).abs().max())
    except RuntimeError as failure:  # such as: no kernel image is available for execution on the device
        return [f"{EXTENSION} does not run on this device: {str(failure).splitlines()[0]}"]
    return [] if error < 1e-4 else [f"{EXTENSION}: swiglu of 8 numbers is {error:.2e} away from torch's"]


def collective_faults(device: str) -> list[str]:
    """Why a sum over one process fails, as every training step makes it."""
    try:
        dist.init_process_group("gloo" if device == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1)
        ones = torch.ones(4, device=device)
        dist.all_reduce(ones)
        total = float(ones.sum())
        dist.destroy_process_group()
    except (RuntimeError, ValueError) as failure:
        return [str(failure).splitlines()[0]]
    return [] if total == 4 else [f"four ones summed over one process give {total}"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.triage.machine", description=__doc__)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(argv)
    report: dict[str, Any] = {"packages": {name: version(name) for name in PACKAGES}}
    lacking = [] if options.device == "cpu" else cuda_reasons()
    report |= {"no_device": lacking} if lacking else machine(options.device)
    write_json(options.result, report)
    if not lacking:
        for name, find in (("extension", extension_faults), ("collectives", collective_faults)):
            report[name] = find(options.device)
            write_json(options.result, report)
    faults = {name: report[name] for name in ("no_device", "extension", "collectives") if report.get(name)}
    reason = "; ".join(f"{name.replace('_', ' ')}: {', '.join(texts)}" for name, texts in faults.items())
    failed = faults.keys() - {"extension"}  # the extension is built next
    write_json(options.result, report | {"verdict": FAILED if failed else OK, "reason": reason})
    print(reason or "the device, the extension and collectives work")
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
