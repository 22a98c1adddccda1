"""Reasons why CUDA kernels, the built extension or Triton cannot run on this machine or in this process."""

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

EXTENSION = "kernels._cuda"
SOURCES = Path(__file__).resolve().parents[2] / "csrc"


def cuda_reasons(min_capability: tuple[int, int] = (8, 0)) -> list[str]:
    """Why kernels for CUDA devices of at least that compute capability cannot run here; empty if they can."""
    if torch.version.cuda is None:
        return [f"torch {torch.__version__} is built without CUDA"]
    if not torch.cuda.is_available():
        return ["no CUDA device is visible"]
    found = torch.cuda.get_device_capability()
    if found < min_capability:
        return [
            f"compute capability {_dotted(found)} of {torch.cuda.get_device_name()} is below {_dotted(min_capability)}"
        ]
    return []


def extension_reasons() -> list[str]:
    """Why the kernels of `csrc` cannot run on a device here; empty if they can."""
    if find_spec(EXTENSION) is None:
        how = "python setup.py build_ext --inplace" if SOURCES.is_dir() else "this installation has none"
        return [f"the CUDA extension is not built ({how}; see the doctor)"]
    try:
        extension()
    except ImportError as error:
        return [f"the CUDA extension does not load: {error}"]
    return cuda_reasons()


@cache
def extension() -> ModuleType:
    """The launchers of `csrc/ops.h`, compiled for devices; raises ImportError where they are not built."""
    return import_module(EXTENSION)


def triton_reasons(min_capability: tuple[int, int] = (8, 0)) -> list[str]:
    """Why Triton kernels cannot run here: neither for a device of that compute capability nor in the interpreter."""
    if find_spec("triton") is None:
        return ["triton is not installed"]
    return [] if triton_interpreted() else cuda_reasons(min_capability)


def triton_interpreted() -> bool:
    """Whether Triton kernels of this process run in its interpreter on the CPU (`TRITON_INTERPRET=1`; for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
