"""What three more minutes are for, read from the rows of a first run."""

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from bench.measure.rows import Row
from bench.triage.parts import STEP_SECONDS, Part
from bench.triage.summary import slowest, worst_check
from bench.triage.tasks import Task, check, own, step

TOOLKIT = Path("/usr/local/cuda/bin")
#: Of the headline case under a sanitizer, which makes kernels ten to a hundred times slower.
SAMPLES = 2


def tool(name: str) -> str | None:
    """Its path, where it is installed."""
    return shutil.which(name) or shutil.which(name, path=str(TOOLKIT))


def parts(rows: Iterable[Row]) -> tuple[Part, ...]:
    """In the order of their worth: each begins where the ones before it have left time, or could not run.

    Who crashed or was wrong under compute-sanitizer; the op farthest from its limit under ncu; CUDA graphs.
    """
    rows, found = list(rows), []
    if (row := worst_check(rows)) is not None:
        tasks = tuple(sanitized(row["op"], row["backend"], name) for name in ("memcheck", "racecheck"))
        found.append(Part("sanitizer", 120, tasks, essential=True))
    if (row := slowest(rows)) is not None:
        found.append(Part("ncu", 60, (profiled(row["op"], row["provider"], row["direction"]),)))
    found.append(Part("graphs", 60, (replace(step("bare-cudagraphs", STEP_SECONDS), ceilings=False),)))
    return tuple(found)


def sanitized(op: str, backend: str, what: str) -> Task:
    sanitizer = tool("compute-sanitizer") or "compute-sanitizer"
    # Memory that torch keeps hides what lies just outside of a tensor.
    under = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", sanitizer, "--tool", what, "--error-exitcode", "9",
             "--print-limit", "20")  # fmt: skip
    task = replace(check(op, backend, "--samples", str(SAMPLES)), name=f"{what} {op} {backend}", under=under)
    return task if tool("compute-sanitizer") else replace(task, skip="compute-sanitizer is not installed")


def profiled(op: str, backend: str, direction: str) -> Task:
    # The clocks of a measurement, not the lower ones that ncu would fix.
    under = (tool("ncu") or "ncu", "--clock-control", "none", "--profile-from-start", "off", "--set", "full",
             "--target-processes", "all")  # fmt: skip
    task = own(f"{op} {backend} {direction}", "profile", op, backend, direction, under=under)
    task = replace(task, result=False)
    return task if tool("ncu") else replace(task, skip="ncu is not installed")
