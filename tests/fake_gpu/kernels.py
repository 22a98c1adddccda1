"""Compile generated kernels for sm_90: each in the first of the launch configurations that Inductor would try.

    python -m tests.fake_gpu.kernels DIR      DIR: what `tests.fake_gpu.step --sources DIR` wrote

A JSON line for each: registers, bytes of stack (where spilled registers go) and whether its PTX has an atomic.
"""

import json
import re
import sys
from pathlib import Path

from torch._inductor import config
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_helpers
from triton.runtime.driver import driver

from tests.ahead_of_time import report
from tests.fake_gpu.device import Offline

NAME = re.compile(r"def (triton_\w+)\(")
ATOMIC = re.compile(r"\b(atom|red)\.global")


def compiled(source: str):
    """The compiled kernel of Triton in a source that Inductor wrote."""
    name = NAME.search(source)[1]
    tuner = getattr(PyCodeCache.load(source), name)
    if not tuner.compile_results:  # sources that differ in their comments alone share what was compiled
        del tuner.configs[1:]
        tuner.precompile(warm_cache_only=True)
    (result,) = tuner.compile_results
    return name, result.kernel


if __name__ == "__main__":
    triton_helpers.set_driver_to_gpu = lambda: driver.set_active(Offline())  # what each source does first
    config.force_disable_caches, config.use_static_triton_launcher = True, False
    for path in sorted(Path(sys.argv[1]).glob("*.py")):
        name, kernel = compiled(path.read_text())
        row = report(kernel) | {"kernel": name, "atomic": bool(ATOMIC.search(kernel.asm["ptx"]))}
        print(json.dumps(row), flush=True)
