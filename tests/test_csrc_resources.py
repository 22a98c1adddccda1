"""Every CUDA kernel compiled for sm_80 and sm_90a, without a GPU: registers, spills, shared memory, instructions."""

import re
import shutil
import subprocess
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
import triton

import kernels
from kernels.testing import emulation

#: Kernel → its limits, from the folders of the ops.
LIMITS = {name: limits for op in kernels.OPS.values() for name, limits in op.expectations.cuda.items()}
SOURCES = sorted(source.stem for source in emulation.CSRC.glob("*.cu") if source.stem != "device")
#: Architecture → bytes of shared memory that the system keeps of each block, which cuobjdump counts as the kernel's.
ARCHITECTURES = {"sm_80": 0, "sm_90a": 1024}
CUOBJDUMP = Path(triton.backends.__path__[0]) / "nvidia" / "bin" / "cuobjdump"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")

pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")


def kernel(mangled: str) -> str:
    """The one of `LIMITS` that a symbol is an instance of; the symbol itself if there is none."""
    plain = {name for name in LIMITS if f"{len(name)}{name}" in mangled}
    return max(plain, key=len, default=mangled)


def compiled(name: str, architecture: str) -> Path:
    """The machine code of a source: of the extension where that is built for the architecture, else compiled here."""
    source = emulation.CSRC / f"{name}.cu"
    included = emulation.included(source, emulation.CSRC)
    for built in emulation.CSRC.parent.glob(f"build/temp.*/csrc/{name}.o"):
        newest = max(file.stat().st_mtime_ns for file in [*included, emulation.CSRC.parent / "setup.py"])
        if built.stat().st_mtime_ns > newest and listing(built, architecture, "-res-usage").count("Function"):
            return built
    return cubin(source, included, architecture)


def cubin(source: Path, included: list[Path], architecture: str) -> Path:
    """The compiled source; kept under the digest of what went in."""
    command = [NVCC, "-O3", "-std=c++17", "--expt-relaxed-constexpr", f"-arch={architecture}", "-cubin"]
    digest = emulation.digest(*included, text=" ".join(command))
    target = emulation.CACHE / f"{source.stem}-{architecture}-{digest}.cubin"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(".tmp")
        done = subprocess.run([*command, "-o", str(unfinished), str(source)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        unfinished.replace(target)
    return target


@cache
def listing(path: Path, architecture: str, what: str) -> str:
    """What cuobjdump says of the code for that architecture."""
    command = [CUOBJDUMP, what, "-arch", architecture, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def usage(name: str, architecture: str) -> list[tuple[str, int, int, int]]:
    """Symbol, registers, bytes of stack and of static shared memory of each kernel."""
    found = USAGE.findall(listing(compiled(name, architecture), architecture, "-res-usage"))
    kept = ARCHITECTURES[architecture]
    return [(symbol, int(registers), int(stack), int(shared) - kept) for symbol, registers, stack, shared in found]


def instructions(name: str, architecture: str) -> dict[str, list[set[str]]]:
    """Kernel → the instructions of each of its instances."""
    found = defaultdict(list)
    for part in listing(compiled(name, architecture), architecture, "-sass").split("Function : ")[1:]:
        used = re.findall(r"^\s+/\*\w+\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", part, re.MULTILINE)
        found[kernel(part.split()[0])].append(set(used))
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", SOURCES)
def test_kernels_stay_within_their_limits(name, architecture):
    entries = usage(name, architecture)
    assert entries
    for symbol, registers, stack, shared in entries:
        limit = LIMITS.get(kernel(symbol))
        assert limit is not None, f"no limits for {symbol}"
        assert stack == 0, f"{symbol} spills into {stack} bytes of stack"
        assert registers <= limit.registers, f"{symbol}: {registers} registers"
        assert shared <= limit.shared_bytes, f"{symbol}: {shared} bytes of shared memory"
    for which, instances in instructions(name, architecture).items():
        wide = sum(any("LDG" in each and ".128" in each for each in used) for used in instances)
        products = sum(any(each.startswith("HMMA") for each in used) for used in instances)
        assert wide >= LIMITS[which].instances_loading_128_bits, (
            f"{which}: {wide} of {len(instances)} instances load 128 bits"
        )
        assert products >= LIMITS[which].instances_with_mma, (
            f"{which}: {products} of {len(instances)} instances use HMMA"
        )


def test_every_limit_belongs_to_a_kernel():
    found = {kernel(symbol) for name in SOURCES for symbol, *_ in usage(name, "sm_80")}
    assert found == set(LIMITS)


def test_a_kernel_of_several_ops_has_the_same_limits_in_each():
    for op in kernels.OPS.values():
        assert {name: LIMITS[name] for name in op.expectations.cuda} == op.expectations.cuda
