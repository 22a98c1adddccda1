"""Compile, without a GPU, every launch that the production cases of an op would make with its Triton backend.

    python -m tests.ahead_of_time OP …      one JSON line for each distinct launch, dtype and architecture

The launches are those of a real call, forward and backward, with tensors that have no memory; Triton compiles them as
it would at that moment on a device. A process of its own, because Triton decides at import whether it compiles.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import make_launcher
from triton.runtime.driver import driver

import kernels
from kernels.registry import Backend, Op
from tests.kernel_launches import launches

ARCHITECTURES = (90, 80)
CUOBJDUMP = Path(triton.backends.__path__[0]) / "nvidia" / "bin" / "cuobjdump"
LOAD = re.compile(r"ld\.global[.\w]*?(?:\.v(\d))?\.[bfus](\d+)\b")


class Offline:
    """The part of a Triton driver that compiling needs, for a device that is not there."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture  # keeps apart the kernels that Triton holds for each device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


def architectures(backend: Backend) -> list[int]:
    """Those of `ARCHITECTURES` that the backend is made for."""
    return [number for number in ARCHITECTURES if divmod(number, 10) >= backend.min_capability]


def compiled(op: Op) -> Iterator[dict]:
    """A row for each distinct compiled kernel of the op."""
    backend, seen = op.backend("triton"), set()
    for architecture in architectures(backend):
        driver.set_active(Offline(architecture))
        for case in op.cases:
            for dtype in sorted(op.dtypes & case.dtypes & backend.dtypes, key=str):
                if not case.production or (backend.unsupported and backend.unsupported(**case.inputs(dtype, "meta"))):
                    continue
                for launch in chain(*launches(op, case, dtype, architecture)):
                    kernel = launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **launch.options)
                    if (architecture, kernel.hash) not in seen:
                        seen.add((architecture, kernel.hash))
                        check_launcher(kernel)
                        row = {"op": op.name, "case": case.id, "dtype": str(dtype).removeprefix("torch.")}
                        yield row | {"architecture": architecture, "kernel": launch.kernel.__name__} | report(kernel)


def check_launcher(kernel) -> None:
    """Write, as a launch would, the C function that passes the arguments on; raises for those it does not know."""
    source = kernel.src
    constants = {
        (source.fn.arg_names.index(at),) if isinstance(at, str) else at: value for at, value in source.constants.items()
    }
    make_launcher(constants, source.signature, getattr(kernel.metadata, "tensordesc_meta", None))


def report(kernel) -> dict:
    """Resources as `cuobjdump` and the PTX state them; Triton uses a stack for spilled registers only."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    ptx = kernel.asm["ptx"]
    loads = Counter(int(count or 1) * int(bits) for count, bits in LOAD.findall(ptx))
    return {
        "registers": registers,
        "stack": stack,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "wgmma": "wgmma.mma_async" in ptx,
        "load_bits": dict(sorted(loads.items())),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.ahead_of_time", description=__doc__.partition("\n")[0])
    parser.add_argument("op", nargs="+", choices=kernels.OPS)
    for name in parser.parse_args().op:
        for row in compiled(kernels.OPS[name]):
            print(json.dumps(row), flush=True)
