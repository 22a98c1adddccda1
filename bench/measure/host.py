"""The machine beside the GPU, as rows of loaders state it."""

import os
import platform
from functools import cache
from pathlib import Path

from bench.measure.rows import Row


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


@cache
def host() -> Row:
    """The CPU, how many of its cores this process may use, and how many processes wanted one in the last minute."""
    model = platform.processor() or None
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text("utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
        model = names[0] if names else model
    return {"cpu": model, "cores": cores(), "load": round(os.getloadavg()[0], 2)}
