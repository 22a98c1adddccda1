"""A child on a CPU: the same module, with stand-ins for the device and tiny sizes.

    python -m bench.triage.rehearsal MODULE [ARGUMENT …]

Triton runs in its interpreter, CUDA's kernels in their emulation, nothing is compiled. Rehearsed is that children
start, write, end and are read; their figures mean nothing, and their rows say "cpu".
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

import importlib
import runpy
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench import gemms, ops, roofline, sampling, step, tokenizer
from bench.measure import ceilings, program, timing
from bench.measure.timing import HostDevice
from bench.workloads import training, variants
from bench.workloads.providers import providers_for
from lightningdit.config import ModelConfig
from vavae.config import AutoencoderConfig

TINY = ModelConfig(
    input_size=4,
    patch_size=1,
    in_channels=4,
    hidden_size=16,
    depth=2,
    num_heads=2,
    num_classes=5,
    use_swiglu=True,
    use_rope=True,
    use_rmsnorm=True,
)
TOKENIZER = AutoencoderConfig(
    embed_dim=4, z_channels=4, ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), resolution=16
)
BATCH = 4
SECONDS = 0.02


def small(module: str, arguments: list[str]) -> list[str]:
    """The arguments of a child, with fewer images and seconds, and the emulation for CUDA's kernels."""
    words = list(arguments)
    for name, value in (("--batch", BATCH), ("--seconds", SECONDS), ("--workers", 1)):
        for place in (i for i, word in enumerate(words) if word == name):
            words[place + 1] = str(value)
    if module == "bench.triage.check":
        words[1] = "emulated" if words[1] == "cuda" else words[1]
        words += ["--samples", "0"]
    if module == "bench.data":
        words += ["--samples", "16", "--batch-size", str(BATCH), "--device", "cpu"]
    if module in ("bench.step", "bench.sampling"):
        words = ["reference" if word == "cuda" else word.replace("=cuda", "=reference") for word in words]
    return [*words, "--device", "cpu"] if module.startswith("bench.triage.") else words


def stand_in() -> None:
    """Put the stand-ins where the programs of the bench look for their device, their sizes and their compiler."""
    for module in (program, roofline):
        module.cuda_reasons = lambda min_capability=None: []
        module.CudaDevice = HostDevice
    torch.cuda.get_device_name = lambda device=None: "a CPU"
    timing.WARM_UP = 0.0
    timing.iteration_size = gemms.iteration_size = lambda moved, l2_bytes: (2, 2)
    ceilings.measure = partial(ceilings.measure, size=64, copied=1 << 16)
    for module in (step, gemms, sampling):
        module.published_config = lambda name: TINY
    for name, variant in variants.TRAINING.items():
        variants.TRAINING[name] = replace(variant, compile="none", graph_passes=())
    training.STEPS["trainer"] = partial(training.TrainerStep, images=8 * BATCH, workers=0)
    ops.providers_for = lambda op, compiler, emulated: providers_for(op, lambda function: function, emulated=True)
    ops.plan = planned
    sampling.jobs = fewer(sampling.jobs, tokenizer=TOKENIZER, batch=BATCH)
    tokenizer.jobs = fewer(tokenizer.jobs, config=TOKENIZER, batch=BATCH, size=16)


def planned(options: Any) -> list[ops.OpJob]:
    """A small case of each op that was asked for, in 16 bits where the interpreter has them."""
    found = [ops.kernels.OPS[name] for name in options.op]
    dtypes = [torch.float16 if torch.float16 in op.dtypes else torch.float32 for op in found]
    cases = [next(case for case in op.cases if not case.production) for op in found]
    return [ops.OpJob(*job) for job in zip(found, cases, dtypes, strict=True)]


def fewer(jobs: Callable[..., Iterable], **sizes: Any) -> Callable[..., Iterator]:
    return lambda *arguments: (replace(job, **sizes) for job in jobs(*arguments))


def main() -> int:
    module, arguments = sys.argv[1], small(sys.argv[1], sys.argv[2:])
    if module == "setup":
        print("the extension is not built in a rehearsal")
        return 0
    sys.argv = [module, *arguments]
    if module.startswith("bench.triage."):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return 0
    torch.set_num_threads(1)
    stand_in()
    return importlib.import_module(module).main(arguments)


if __name__ == "__main__":
    sys.exit(main())
