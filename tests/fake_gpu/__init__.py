"""An H100 that is not there: torch believes in it, so that its compilers do for it what they would do for a real one.

`run("tests.fake_gpu.step", …)` runs a module in a process with that device. Tensors on it are fake (shapes without
numbers), Triton compiles for sm_90, and whatever would launch a kernel fails.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("runtime.c")
COMPILER = os.environ.get("CC", "gcc")
LIBRARY = ROOT / "build" / "fake_gpu" / "libcuda.so.1"


def reasons() -> list[str]:
    """Why the device cannot be made up here; empty if it can."""
    if sys.platform != "linux":
        return [f"the dynamic linker of {sys.platform} takes no LD_PRELOAD"]
    return [] if shutil.which(COMPILER) else [f"no C compiler: {COMPILER} is not on the PATH (CC names another)"]


def library() -> Path:
    """`runtime.c`, compiled where it has changed; the headers come with torch's and Triton's own wheels."""
    if not LIBRARY.exists() or LIBRARY.stat().st_mtime < SOURCE.stat().st_mtime:
        packages = Path(sysconfig.get_path("purelib"))
        headers = (packages / "nvidia" / "cu13" / "include", packages / "triton" / "backends" / "nvidia" / "include")
        LIBRARY.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=LIBRARY.parent) as folder:  # another process may build it too
            made = Path(folder) / LIBRARY.name
            command = [COMPILER, "-shared", "-fPIC", "-O1", f"-Wl,-soname,{LIBRARY.name}",
                       *(f"-I{folder}" for folder in headers), "-o", made, SOURCE]  # fmt: skip
            subprocess.run(command, check=True)
            os.replace(made, LIBRARY)
    return LIBRARY


def run(module: str, *arguments: str, timeout: float) -> list[dict]:
    """Run `python -m module arguments …` with the device; the JSON objects that it prints, one a line.

    Raises:
        AssertionError: it failed, or had not ended after `timeout` seconds of wall time.
    """
    environment = {**os.environ, "LD_PRELOAD": str(library()), "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired as expired:
        raise AssertionError(f"{module} {' '.join(arguments)} had not ended after {timeout:.0f} s") from expired
    assert done.returncode == 0, f"{module} {' '.join(arguments)}: {done.stderr[-4000:]}"
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
