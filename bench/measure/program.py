"""What the programs of comparisons share: their options, the GPU they need, ceilings, and an end in order."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.measure import ceilings
from bench.measure.comparison import Comparison
from bench.measure.cutoff import CutOff, Deadline, stoppable
from bench.measure.rows import Log
from bench.measure.timing import CudaDevice, Device
from kernels.backends.device import cuda_reasons

#: Kinds of providers compile the same functions, each for itself.
RECOMPILE_LIMIT = 64
#: Exit status of a program that was asked wrongly, where 2 says that there is no GPU.
USAGE = 64


def parser(module: str, description: str, seconds: float) -> argparse.ArgumentParser:
    """With the options of every comparison; seconds: the default of samples."""
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=description,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    made.add_argument("--seconds", type=float, default=seconds, help=f"of samples (default {seconds:g})")
    made.add_argument("--minutes", type=float, default=float("inf"), help="stop then, with rows of what was measured")
    made.add_argument("--out", type=Path, help="append rows to this file")
    add_ceilings(made)
    return made


def add_ceilings(parser: argparse.ArgumentParser) -> None:
    """The option that `ceilings_of` reads."""
    parser.add_argument("--ceilings", type=Path, metavar="FILE",
                        help="rows of bench.roofline on this GPU, to be read instead of measured again")  # fmt: skip


def ceilings_of(module: str, options: argparse.Namespace, device: Device, log: Log) -> ceilings.Ceilings:
    """As the option says; a file that does not have them ends the program."""
    try:
        if options.ceilings is None:
            return ceilings.measure(device, log)
        return ceilings.read_ceilings(options.ceilings, device.kind)
    except (ValueError, OSError) as error:
        print(f"{module}: --ceilings: {error}", file=sys.stderr)
        sys.exit(USAGE)


def run(module: str, options: argparse.Namespace, make: Callable[..., Comparison], todo: list[Any]) -> int:
    """Measure or read the ceilings, then measure the jobs; the exit status.

    Args:
        make: of device, log, ceilings, seconds and `until`, the comparison.

    Returns:
        1 if a provider is wrong or fails, 2 if there is no GPU, 128 and its number after a signal. A wrong
        `--ceilings` ends the program with `USAGE`.
    """
    if reasons := cuda_reasons():
        print(f"{module} needs a GPU: {'; '.join(reasons)}", file=sys.stderr)
        return 2
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    until = Deadline.after(options.minutes)
    try:
        with stoppable():
            device = CudaDevice()
            log = Log(device.kind, options.out)
            found = ceilings_of(module, options, device, log)
            return work_through(make(device, log, found, seconds=options.seconds, until=until), todo)
    except CutOff as cut:
        print(f"cut off by {cut}; whoever had been measured has a row", file=sys.stderr)
        return 128 + cut.number


def work_through(comparison: Comparison, todo: list[Any]) -> int:
    """Run jobs until the time is up, by the longest so far; the exit status: 1 if a provider was wrong or failed."""
    clock, longest, rows = comparison.until.clock, 0.0, []
    for number, job in enumerate(todo):
        begun = clock()
        if comparison.until.passed(longest):
            print(f"time is up, not measured: {', '.join(map(str, todo[number:]))}")
            break
        rows += comparison.run(job)
        longest = max(longest, clock() - begun)
    comparison.conclude(rows)
    return int(any(row["status"] in ("incorrect", "failed") for row in rows))
