"""Ceilings of the device in the same run: bandwidth of a large copy, and FLOP/s of a large matmul in each dtype."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.measure.rows import Log, Row, machine, read
from bench.measure.timing import Device, Iteration, Timing, interleave
from common.data_sheets import SHEETS

MATMUL = 8192
COPIED = 2 << 30  # bytes; a copy reads and writes them
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: dtype → how rows call its ceiling.
MATMULS = {dtype: f"matmul {str(dtype).removeprefix('torch.')}" for dtype in DTYPES}
SECONDS = 0.5


@dataclass(frozen=True)
class Ceilings:
    """Bytes/s of a large copy, and FLOP/s of a large matmul by dtype."""

    bandwidth: float
    matmul: dict[torch.dtype, float]

    def limit(self, moved: int, flops: int, dtype: torch.dtype) -> tuple[float, str]:
        """The least seconds for so many bytes and FLOPs, and which of them binds: "memory" or "compute".

        Products of float32 are IEEE, so their ceiling is that of a float32 matmul.
        """
        memory, compute = moved / self.bandwidth, flops / self.matmul[dtype] if flops else 0.0
        return (memory, "memory") if memory >= compute else (compute, "compute")


def measure(device: Device, log: Log, seconds: float = SECONDS, size: int = MATMUL, copied: int = COPIED) -> Ceilings:
    """Measure copies of `copied` bytes and products of `size` × `size`; a row of each is logged and printed."""
    sheet = SHEETS.get(torch.cuda.get_device_name()) if device.kind == "cuda" else None
    rates = {}

    def state(name: str, work: int, timing: Timing, stated: float | None) -> None:
        rates[name] = work / timing.median
        row = {
            "kind": "ceiling",
            "ceiling": name,
            "rate": rates[name] / 1e12,
            "unit": "TB/s" if name == "copy" else "TFLOP/s",
            "spread": timing.spread,
            "method": timing.method,
            "sheet": stated and stated / 1e12,
            "source": sheet.source if sheet and stated else None,
        }
        print(text(log.write(row)), flush=True)

    state("copy", 2 * copied, _copy(device, seconds, copied), sheet.bandwidth if sheet else None)
    for dtype, name in MATMULS.items():
        stated = sheet.bfloat16 if sheet and dtype != torch.float32 else None
        state(name, 2 * size**3, _matmul(device, seconds, size, dtype), stated)
    return _of(rates)


def read_ceilings(path: Path, kind: str) -> Ceilings:
    """The ceilings that were measured before on the device here, of that kind, and written to a file of rows.

    Raises:
        ValueError: a line is no row, a ceiling is missing, or it is another GPU's; names the file.
        OSError: there is no such file.
    """
    found = {row["ceiling"]: row for row in read(path, kind) if row["kind"] == "ceiling"}
    if missing := [name for name in ("copy", *MATMULS.values()) if name not in found]:
        raise ValueError(f"{path} lacks ceilings: {', '.join(missing)}; python -m bench.roofline --out FILE writes all")
    here, there = machine(kind)["gpu"], {row["gpu"] for row in found.values()}
    if there != {here}:
        raise ValueError(f"{path} has ceilings of {', '.join(sorted(map(str, there)))}; this GPU is {here}")
    return _of({name: row["rate"] * 1e12 for name, row in found.items()})


def _of(rates: dict[str, float]) -> Ceilings:
    return Ceilings(rates["copy"], {dtype: rates[name] for dtype, name in MATMULS.items()})


def _copy(device: Device, seconds: float, copied: int) -> Timing:
    """By a kernel that reads and writes each number once; it negates them.

    `copy_` would be a memcpy node in a CUDA graph, which is no limit: on an H200 SwiGLU moved 1.5 × its bytes a second.
    """
    with device.active():
        source = torch.randn(copied // 4, device=device.kind)
        target = torch.empty_like(source)
        return _timed(lambda: torch.neg(source, out=target), device, seconds)


def _matmul(device: Device, seconds: float, size: int, dtype: torch.dtype) -> Timing:
    """Random numbers: a product of zeros draws less power and so runs faster."""
    assert not torch.backends.cuda.matmul.allow_tf32
    with device.active():
        a, b = (torch.randn(size, size, device=device.kind).to(dtype) for _ in "ab")
        out = torch.empty_like(a)
        return _timed(lambda: torch.mm(a, b, out=out), device, seconds)


def _timed(function: Callable[[], torch.Tensor], device: Device, seconds: float) -> Timing:
    run, method = device.replayable(function)
    return interleave({"": Iteration(run, method=method)}, device, seconds)[""]


def text(row: Row) -> str:
    """A row as a line to read."""
    stated = f", {row['rate'] / row['sheet']:.0%} of the data sheet's {row['sheet']:.4g}" if row["sheet"] else ""
    return f"{row['ceiling']:16} {row['rate']:8.2f} {row['unit']} (spread {row['spread']:.1%}{stated})"
