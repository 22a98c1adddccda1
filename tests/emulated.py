"""Test kernels of `tests/csrc`, in the emulation or on a device, and processes that run under a sanitizer."""

import ctypes
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

from kernels.testing import emulation

ROOT = Path(__file__).parents[1]
SOURCES = Path(__file__).parent / "csrc"
ORDERS = ("ascending", "descending", "shuffled")
SANITIZERS = {"address": "libasan.so", "thread": "libtsan.so"}


class Library:
    """The functions of one test source; a call with tensors and numbers raises RuntimeError with what it returns."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))

    def __call__(self, name: str, *args) -> None:
        function = getattr(self._library, f"run_{name}")
        function.restype = ctypes.c_char_p
        message = function(*map(as_c, args))
        if message is not None:
            raise RuntimeError(message.decode())

    def set_order(self, order: str, seed: int = 0) -> None:
        self._library.set_order(ORDERS.index(order), ctypes.c_uint64(seed))


def as_c(value):
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return (ctypes.c_bool if isinstance(value, bool) else ctypes.c_int64)(value)


@cache
def emulated(name: str, mode: str = "plain") -> Library:
    """`tests/csrc/<name>.cu` in the emulation."""
    return Library(emulation.library([SOURCES / f"{name}.cu"], mode))


@cache
def on_device(name: str) -> Library:
    """The same, compiled by nvcc for the current device."""
    major, minor = torch.cuda.get_device_capability()
    sources = emulation.digest(*emulation.included(SOURCES / f"{name}.cu", emulation.CSRC))
    target = emulation.CACHE / f"{name}-{sources}-sm_{major}{minor}.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    flags = ["-std=c++17", "--expt-relaxed-constexpr", f"-arch=sm_{major}{minor}", "-Xcompiler", "-fPIC", "-shared"]
    made = target.with_suffix(f".{os.getpid()}.so")  # others may be at it too, or have it open
    command = [nvcc, *flags, f"-I{emulation.CSRC}", "-o", str(made), str(SOURCES / f"{name}.cu")]
    subprocess.run(command, check=True)
    made.replace(target)
    return Library(target)


def under(mode: str, *arguments: str, halt: bool) -> subprocess.CompletedProcess:
    """Run Python with these arguments as a process of that sanitizer, which ends it at the first finding or goes on.

    The sanitizer has to be loaded before everything else.
    """
    sanitizer = subprocess.run(
        [emulation.compiler(), f"-print-file-name={SANITIZERS[mode]}"], capture_output=True, text=True, check=True
    )
    environment = os.environ | {
        "LD_PRELOAD": sanitizer.stdout.strip(),
        "LIGHTNINGDIT_EMULATION": mode,
        "OMP_NUM_THREADS": "1",
        # Python and torch are not compiled for it: no leaks, and no races, are looked for in them.
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": f"ignore_noninstrumented_modules=1 suppress_equal_addresses=0 halt_on_error={int(halt)}",
    }
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
