"""Command line of the comparisons: common options, the GPU they need, ceilings, exit statuses, and signals."""

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
from bench.measure.timing import CudaDevice
from kernels.backends.device import cuda_reasons

#: Variants compile the same functions, each for itself.
RECOMPILE_LIMIT = 64
#: Exit status of a program that was asked wrongly, where 2 says that there is no GPU.
USAGE = 64


def whole_number(least: int) -> Callable[[str], int]:
    """The type of an option that takes whole numbers from `least`."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least}")
        return int(text)

    return read


def parser(module: str, description: str, seconds: float, gpu: bool = True) -> argparse.ArgumentParser:
    """With the options of every comparison; seconds: the default of samples; gpu: for `run`."""
    formatter = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=description, formatter_class=formatter)
    made.add_argument("--seconds", type=float, default=seconds, help=f"of samples of a provider (default {seconds:g})")
    made.add_argument("--out", type=Path, help="append rows to this file")
    if gpu:
        made.add_argument("--minutes", type=float, default=float("inf"), help="stop then, with rows of what there is")
        ceilings_help = "rows of bench.roofline on this GPU, to be read instead of measured again"
        made.add_argument("--ceilings", type=Path, metavar="FILE", help=ceilings_help)
    return made


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
            try:
                path = options.ceilings
                found = ceilings.read_ceilings(path, device.kind) if path else ceilings.measure(device, log)
            except (ValueError, OSError) as error:
                print(f"{module}: --ceilings: {error}", file=sys.stderr)
                sys.exit(USAGE)
            return work_through(make(device, log, found, seconds=options.seconds, until=until), todo)
    except CutOff as cut:
        print(f"cut off by {cut}; whoever had been measured has a row", file=sys.stderr)
        return 128 + cut.number


def work_through(comparison: Comparison, todo: list[Any]) -> int:
    """Run jobs until the time is up, by the longest so far; the exit status: 1 if a row is alarming."""
    clock, longest, rows = comparison.until.clock, 0.0, []
    for number, job in enumerate(todo):
        begun = clock()
        if comparison.until.passed(longest):
            print(f"time is up, not measured: {', '.join(map(str, todo[number:]))}")
            break
        rows += comparison.run(job)
        longest = max(longest, clock() - begun)
    comparison.conclude(rows)
    return int(any(map(comparison.alarming, rows)))
