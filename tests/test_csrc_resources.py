"""Every CUDA kernel compiled for sm_80 and sm_90a, without a GPU: registers, spills, shared memory, instructions."""

import re
import shutil
import subprocess
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
import triton

from kernels import emulation
from tests.cuda_ceilings import CEILINGS

SOURCES = sorted(source.stem for source in emulation.CSRC.glob("*.cu") if source.stem != "device")
ARCHITECTURES = ("sm_80", "sm_90a")
CUOBJDUMP = Path(triton.backends.__path__[0]) / "nvidia" / "bin" / "cuobjdump"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
USAGE = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)

pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")


def kernel(mangled: str) -> str:
    """The one of `CEILINGS` that a symbol is an instance of; the symbol itself if there is none."""
    plain = {name for name in CEILINGS if f"{len(name)}{name}" in mangled}
    return max(plain, key=len, default=mangled)


@cache
def cubin(name: str, architecture: str) -> tuple[Path, str]:
    """The compiled source and what ptxas said; kept under the digest of what went in."""
    source = emulation.CSRC / f"{name}.cu"
    flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", f"-arch={architecture}", "-Xptxas", "-v"]
    command = [NVCC, *flags, "-cubin"]
    text = emulation.digest(*emulation.included(source, emulation.CSRC), text=" ".join(command))
    target = emulation.CACHE / f"{name}-{architecture}-{text}.cubin"
    log = target.with_suffix(".log")
    if not log.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run([*command, "-o", str(target), str(source)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        log.write_text(done.stderr)
    return target, log.read_text()


def instructions(path: Path) -> dict[str, list[set[str]]]:
    """Kernel → the instructions of each of its instances."""
    listing = subprocess.run([CUOBJDUMP, "-sass", str(path)], capture_output=True, text=True, check=True).stdout
    found = defaultdict(list)
    for part in listing.split("Function : ")[1:]:
        used = re.findall(r"^\s+/\*\w+\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", part, re.MULTILINE)
        found[kernel(part.split()[0])].append(set(used))
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", SOURCES)
def test_kernels_stay_below_their_ceilings(name, architecture):
    path, log = cubin(name, architecture)
    entries = USAGE.findall(log)
    assert len(entries) == log.count("Compiling entry function") > 0
    for mangled, stores, loads, registers, rest in entries:
        ceiling = CEILINGS.get(kernel(mangled))
        assert ceiling is not None, f"no ceiling for {mangled}"
        shared = re.search(r"(\d+) bytes smem", rest)
        spilling = any(part in mangled for part in ceiling.spilling)
        assert spilling or max(int(stores), int(loads)) <= ceiling.spills, f"{mangled} spills"
        assert int(registers) <= ceiling.registers, f"{mangled}: {registers} registers"
        assert int(shared[1] if shared else 0) <= ceiling.shared, f"{mangled}: {rest}"
    for which, instances in instructions(path).items():
        wide = sum(any("LDG" in each and ".128" in each for each in used) for used in instances)
        products = sum(any(each.startswith("HMMA") for each in used) for used in instances)
        assert wide >= CEILINGS[which].wide_loads, f"{which}: {wide} of {len(instances)} instances load 128 bits"
        assert products >= CEILINGS[which].hmma, f"{which}: {products} of {len(instances)} instances use HMMA"


def test_every_ceiling_belongs_to_a_kernel():
    found = {kernel(entry[0]) for name in SOURCES for entry in USAGE.findall(cubin(name, ARCHITECTURES[0])[1])}
    assert found == set(CEILINGS)
