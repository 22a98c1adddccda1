"""Builds `csrc` with a host compiler, so that its kernels run on a CPU; for tests and for work on a kernel.

    module = kernels.testing.emulation.module()          the launchers of csrc/ops.h, for CPU tensors
    kernels.testing.emulation.library([...], mode)       any kernels with a C interface, for ctypes

Objects are kept under `build/emulation`, named by what went into them: editing one .cu compiles that file only.
`LIGHTNINGDIT_EMULATION` names the mode of `module()`: `plain`, or `address` or `thread` for a process that runs under
that sanitizer (see csrc/README.md).
"""

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

CSRC = Path(__file__).resolve().parents[2] / "csrc"
CACHE = CSRC.parent / "build" / "emulation"
MODULE = "ldit_emulated"
COMMON = ("-std=c++17", "-g1", "-fPIC", "-fno-strict-aliasing", "-fvisibility=hidden", "-DLDIT_EMULATED")
#: Mode → what the kernels are compiled with besides. The runtime is not: it switches stacks under the sanitizers' feet.
MODES = {
    "plain": ("-O2",),
    "unoptimized": ("-O0",),  # compiled in a third of the time
    "address": ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"),
    "thread": ("-O1", "-fsanitize=thread"),
}


class BuildError(RuntimeError):
    """The host compiler refused a source; the message is the compiler's."""


def reasons() -> list[str]:
    """Why nothing can be built here; empty if it can."""
    found = []
    if not (CSRC / "binding.cpp").is_file():
        found.append(f"the CUDA sources are not at {CSRC}")
    if shutil.which(compiler()) is None:
        found.append(f"no host compiler ({compiler()}) is on the PATH")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        found.append("Python's headers are not installed")
    return found


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def mode() -> str:
    """The one that the environment names; raises ValueError if there is none of that name."""
    name = os.environ.get("LIGHTNINGDIT_EMULATION", "plain")
    if name not in MODES:
        raise ValueError(f"LIGHTNINGDIT_EMULATION is {name!r}; allowed: {', '.join(MODES)}")
    return name


@cache
def module() -> ModuleType:
    """The launchers, built if they are not; raises BuildError."""
    return load(library(module_sources(), mode()))


def module_sources() -> list[Path]:
    """The kernels and their Python module."""
    return [*sorted(CSRC.glob("*.cu")), CSRC / "binding.cpp"]


def load(path: Path) -> ModuleType:
    """The Python module in a library made from `binding.cpp`."""
    name = f"{path.stem}.{MODULE}"  # one name for each library: pybind11 hands out a module it knows again by name
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    found = importlib.util.module_from_spec(spec)
    loader.exec_module(found)
    return found


def library(sources: Sequence[Path], mode: str = "plain", plain: Sequence[Path] = ()) -> Path:
    """The shared library of these sources and the runtime, built if it is not.

    Args:
        sources: `.cu` and `.cpp` files; includes are looked up beside them, then in `csrc`.
        mode: a key of `MODES`.
        plain: more sources, whose mode is `plain`. What a header defines for several sources is taken from the first.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    modes = [*((source, mode) for source in sources), *((source, "plain") for source in plain)]
    jobs = [(CSRC / "emulation" / "runtime.cpp", ("-O2",)), *((source, MODES[mode]) for source, mode in modes)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: compiled(*job), jobs))
    target = CACHE / f"{MODULE}-{digest(*objects)}-{mode}.so"
    if not target.exists():
        build(target, [*map(str, objects), "-shared", *MODES[mode]])
    return target


def compiled(source: Path, extra: tuple[str, ...]) -> Path:
    """The object of one source, made if it is not there."""
    flags = [*COMMON, *extra, "-Wall", "-Wno-unknown-pragmas"]
    if source.suffix == ".cpp":
        torch_headers = Path(torch.__file__).parent / "include"  # DLPack, and pybind11
        flags += [f"-DLDIT_MODULE={MODULE}", f"-I{torch_headers}", f"-I{sysconfig.get_path('include')}"]
    text = " ".join([compiler(), *flags])
    target = CACHE / f"{source.stem}-{digest(*included(source, CSRC), text=text)}.o"
    if not target.exists():
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        build(target, [*flags, f"-I{CSRC}", "-c", *language, str(source)])
    return target


def included(source: Path, csrc: Path) -> list[Path]:
    """A source and every file that it includes by a name in quotes, itself or through another."""
    found = [source.resolve()]
    for file in found:  # grows as it goes
        for name in re.findall(r'^#include "(.+)"', file.read_text("utf-8"), re.MULTILINE):
            path = next(path for path in (file.parent / name, csrc / name) if path.is_file()).resolve()
            if path not in found:
                found.append(path)
    return found


def build(target: Path, arguments: list[str]) -> None:
    """Run the compiler, unless another process does so already; show `target` to others only when it is whole."""
    with target.with_suffix(".lock").open("w") as lock, tempfile.TemporaryDirectory(dir=target.parent) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return
        made = Path(folder, target.name)
        process = subprocess.run([compiler(), *arguments, "-o", str(made)], capture_output=True, text=True)
        if process.returncode:
            raise BuildError(f"{compiler()} failed on {target.name}:\n{process.stderr}")
        made.replace(target)


def digest(*files: Path, text: str = "") -> str:
    """Of the contents of files and of `text`."""
    total = hashlib.sha256(text.encode())
    for file in files:
        total.update(file.read_bytes())
    return total.hexdigest()[:20]
