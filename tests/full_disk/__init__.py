"""A disk that is full from a chosen call on, under every program at every call that needs room.

    python -m tests.full_disk [--every N] [PROGRAM …]        train, extract, sample; minutes with --every 1 (default)

Each program starts where it has something to lose. It must end with a status that is not 0 and one line that names a
file below its output directory, without a traceback; the same command, when there is room again, must end as if there
had been room all along.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests import fake_gpu

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("disk.c")
PROGRAMS = ("train", "extract", "sample")


def reasons() -> list[str]:
    """Why no disk can be made up here; empty if one can."""
    if sys.platform != "linux":
        return [f"the dynamic linker of {sys.platform} takes no LD_PRELOAD"]
    compiler = fake_gpu.COMPILER[0]
    return [] if shutil.which(compiler) else [f"no C compiler: {compiler} is not on the PATH"]


def faults(program: str, directory: Path, every: int = 1, timeout: float = 3600) -> tuple[list[dict], list[dict]]:
    """Run `program` below `directory`, the disk full from every `every`-th call on → all tries, and those that failed.

    A try is {"call", "status", "said", "wrong"}, `wrong` a sentence or "".
    """
    library = directory / "libdisk.so"
    subprocess.run([*fake_gpu.COMPILER, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "tests.full_disk.tries", program, str(directory), str(every)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    tries = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return tries, [each for each in tries if each["wrong"]]
