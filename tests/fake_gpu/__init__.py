"""An H100 that is not there: torch believes in it, so that its compilers do for it what they would do for a real one.

`run("tests.fake_gpu.step", …)` runs a module in a process with that device. Tensors on it are fake (shapes without
numbers), Triton compiles for sm_90, and whatever would launch a kernel fails.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("runtime.c")
COMPILER = shlex.split(os.environ.get("CC", "")) or ["gcc"]
LIBRARY = ROOT / "build" / "fake_gpu" / "libcuda.so.1"


def reasons() -> list[str]:
    """Why the device cannot be made up here; empty if it can."""
    if sys.platform != "linux":
        return [f"the dynamic linker of {sys.platform} takes no LD_PRELOAD"]
    lacking = [name for name in ("cuda.h", "cuda_runtime_api.h") if not any((at / name).exists() for at in headers())]
    found = [f"no {name} beside torch and Triton, whose builds for CUDA 13 bring it" for name in lacking]
    return found + ([] if shutil.which(COMPILER[0]) else [f"no C compiler: {COMPILER[0]} is not on the PATH"])


def headers() -> list[Path]:
    """Folders of CUDA's headers: those of torch's own wheels and of Triton's."""
    places = (("nvidia", ("cu13", "include")), ("triton", ("backends", "nvidia", "include")))
    specs = [(find_spec(package), path) for package, path in places]
    return [Path(folder, *path) for spec, path in specs if spec for folder in spec.submodule_search_locations]


def library() -> Path:
    """`runtime.c`, compiled where it has changed."""
    if not LIBRARY.exists() or LIBRARY.stat().st_mtime < SOURCE.stat().st_mtime:
        LIBRARY.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=LIBRARY.parent) as folder:  # another process may build it too
            made = Path(folder) / LIBRARY.name
            command = [
                *COMPILER,
                "-shared",
                "-fPIC",
                "-O1",
                f"-Wl,-soname,{LIBRARY.name}",
                *(f"-I{folder}" for folder in headers()),
                "-o",
                made,
                SOURCE,
            ]
            subprocess.run(command, check=True)
            os.replace(made, LIBRARY)
    return LIBRARY


def run(module: str, *arguments: str, timeout: float) -> list[dict]:
    """Run `python -m module arguments …` with the device; the JSON objects that it prints, one a line.

    Raises:
        AssertionError: it failed, or had not ended after `timeout` seconds of wall time.
    """
    # One device, whatever the machine has: NVML would tell of others.
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library()),
        "CUDA_VISIBLE_DEVICES": "0",
        "TRITON_INTERPRET": "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired as expired:
        raise AssertionError(f"{module} {' '.join(arguments)} had not ended after {timeout:.0f} s") from expired
    assert done.returncode == 0, f"{module} {' '.join(arguments)}: {done.stderr[-4000:]}"
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
