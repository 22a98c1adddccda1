"""What a device could do: data sheets beside ceilings measured in the same run, and the least an op has to do.

    python -m bench.roofline [--out FILE]    the table, every production case's bytes and FLOPs, and the ceilings here

Other programs of the bench measure the ceilings too, or read them from such a FILE with `--ceilings FILE`.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import kernels
from bench.measure.rows import Log, Row, machine, read
from bench.measure.timing import CudaDevice, Device, Iteration, Timing, interleave
from kernels.backends.device import cuda_reasons
from kernels.testing.cases import Cost
from lightningdit.config import named_config
from lightningdit.cost import flops_per_image


@dataclass(frozen=True)
class Sheet:
    """Rates a vendor states: dense (without sparsity), FLOP/s and bytes/s; `source` says where."""

    bfloat16: float
    float8: float | None
    bandwidth: float
    source: str


#: The device's name as its driver gives it → its sheet. Parts of other forms (PCIe, NVL) have other rates.
SHEETS: dict[str, Sheet] = {
    "NVIDIA A100-SXM4-80GB": Sheet(
        312e12, None, 2.039e12, "NVIDIA A100 data sheet, SXM 80 GB: bf16 312 TFLOP/s dense, no fp8; 2,039 GB/s"
    ),
    "NVIDIA H100 80GB HBM3": Sheet(
        989e12, 1979e12, 3.35e12,
        "NVIDIA H100 data sheet, SXM5: bf16 1,979 and fp8 3,958 TFLOP/s with sparsity, half of it dense; 3.35 TB/s",
    ),
    "NVIDIA H800": Sheet(
        989e12, 1979e12, 3.35e12,
        "resellers' data sheets of the H800 SXM5 (NVIDIA publishes none): the H100's rates and memory, NVLink 400 GB/s",
    ),
    "NVIDIA H200": Sheet(
        989e12, 1979e12, 4.8e12,
        "NVIDIA H200 data sheet, SXM: bf16 1,979 and fp8 3,958 TFLOP/s with sparsity, half of it dense; 4.8 TB/s",
    ),
    "NVIDIA B200": Sheet(
        2250e12, 4500e12, 8.0e12,
        "NVIDIA Blackwell Architecture Technical Brief, HGX B200 at 1,000 W: dense bf16 2.25, fp8 4.5 PFLOP/s; 8 TB/s",
    ),
}  # fmt: skip

MATMUL = 8192
COPIED = 2 << 30  # bytes; a copy reads and writes them
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SECONDS = 0.5


@dataclass(frozen=True)
class Ceilings:
    """What this device was seen to do in this run: bytes/s of a large copy, FLOP/s of a large matmul by dtype."""

    bandwidth: float
    matmul: dict[torch.dtype, float]

    def limit(self, moved: int, flops: int, dtype: torch.dtype) -> tuple[float, str]:
        """The least seconds for so many bytes and FLOPs, and which of them binds: "memory" or "compute".

        Products of float32 are IEEE, so their ceiling is that of a float32 matmul.
        """
        memory, compute = moved / self.bandwidth, flops / self.matmul[dtype] if flops else 0.0
        return (memory, "memory") if memory >= compute else (compute, "compute")


def measure(
    device: Device, seconds: float = SECONDS, size: int = MATMUL, copied: int = COPIED
) -> tuple[Ceilings, list[Row]]:
    """The ceilings, from copies of `copied` bytes and products of `size` × `size`, and a row for each."""
    timings = {"copy": _copy(device, seconds, copied)}
    for dtype in DTYPES:
        timings[str(dtype)] = _matmul(device, seconds, size, dtype)
    work = {"copy": 2 * copied} | dict.fromkeys([name for name in timings if name != "copy"], 2 * size**3)
    rates = {name: work[name] / timing.median for name, timing in timings.items()}
    matmul = {getattr(torch, name.removeprefix("torch.")): rate for name, rate in rates.items() if name != "copy"}
    sheet = SHEETS.get(torch.cuda.get_device_name()) if device.kind == "cuda" else None
    rows = [_row(name, rates[name], timing, sheet) for name, timing in timings.items()]
    return Ceilings(rates["copy"], matmul), rows


def read_ceilings(path: Path, kind: str) -> Ceilings:
    """The ceilings that were measured before on the device here, of that kind, and written to a file of rows.

    Raises:
        ValueError: a line is no row, a ceiling is missing, or it is another GPU's; names the file.
        OSError: there is no such file.
    """
    found = {row["ceiling"]: row for row in read(path, kind) if row["kind"] == "ceiling"}
    names = {dtype: _named(str(dtype)) for dtype in DTYPES}
    if missing := [name for name in ("copy", *names.values()) if name not in found]:
        raise ValueError(f"{path} lacks ceilings: {', '.join(missing)}; python -m bench.roofline --out FILE writes all")
    here, there = machine(kind)["gpu"], {row["gpu"] for row in found.values()}
    if there != {here}:
        raise ValueError(f"{path} has ceilings of {', '.join(sorted(map(str, there)))}; this GPU is {here}")
    rates = {name: row["rate"] * 1e12 for name, row in found.items()}
    return Ceilings(rates["copy"], {dtype: rates[name] for dtype, name in names.items()})


def obtain(device: Device, log: Log, path: Path | None = None) -> Ceilings:
    """Those of a file of rows, or else measured now, with a row for each.

    Raises:
        ValueError, OSError: as `read_ceilings`.
    """
    if path is not None:
        return read_ceilings(path, device.kind)
    ceilings, rows = measure(device)
    for row in rows:
        print(ceiling_text(log.write(row)), flush=True)
    return ceilings


def _named(name: str) -> str:
    return name if name == "copy" else f"matmul {name.removeprefix('torch.')}"


def _row(name: str, rate: float, timing: Timing, sheet: Sheet | None) -> Row:
    copy, half = name == "copy", name in ("torch.bfloat16", "torch.float16")
    stated = None if sheet is None else sheet.bandwidth if copy else sheet.bfloat16 if half else None
    return {
        "kind": "ceiling", "ceiling": _named(name),
        "rate": rate / 1e12, "unit": "TB/s" if copy else "TFLOP/s", "spread": timing.spread, "method": timing.method,
        "sheet": stated and stated / 1e12, "source": sheet.source if stated else None,
    }  # fmt: skip


def _copy(device: Device, seconds: float, copied: int) -> Timing:
    with device.active():
        source = torch.randn(copied // 4, device=device.kind)
        target = torch.empty_like(source)
        run, method = device.replayable(lambda: target.copy_(source))
        return interleave({"copy": Iteration(run, method=method)}, device, seconds)["copy"]


def _matmul(device: Device, seconds: float, size: int, dtype: torch.dtype) -> Timing:
    """Random numbers: a product of zeros draws less power and so runs faster."""
    assert not torch.backends.cuda.matmul.allow_tf32
    with device.active():
        a, b = (torch.randn(size, size, device=device.kind).to(dtype) for _ in "ab")
        out = torch.empty_like(a)
        run, method = device.replayable(lambda: torch.mm(a, b, out=out))
        return interleave({"matmul": Iteration(run, method=method)}, device, seconds)["matmul"]


def op_costs(dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, str, Cost]]:
    """Op, case and `Cost` of every production case; nothing is allocated."""
    for op in kernels.OPS.values():
        for case in op.cases:
            if case.production and dtype in op.dtypes & case.dtypes:
                yield op.name, case.id, op.cost(**case.inputs(dtype, "meta"))


def optimizer_bytes_per_parameter() -> float:
    """Those of one pass of AdamW, moving average and bfloat16 copy, with float32 gradients."""
    op = kernels.OPS["adamw_ema_"]
    inputs = next(case for case in op.cases if case.production).inputs(torch.float32, "meta")
    return op.cost(**inputs).forward_bytes / inputs["param"].numel()


def model_flops(name: str = "LightningDiT-XL/1") -> tuple[int, int]:
    """(forward, training) FLOPs of one image by the published model of that name, on 16 × 16 × 32 latents."""
    published = dict(use_swiglu=True, use_rope=True, use_rmsnorm=True)
    return flops_per_image(named_config(name, input_size=16, in_channels=32, **published))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of samples of a ceiling (default {SECONDS:g})")
    parser.add_argument("--out", type=Path, help="append a row for each ceiling to this file")
    options = parser.parse_args(argv)
    for name, sheet in SHEETS.items():
        fp8 = f"{sheet.float8 / 1e12:.0f}" if sheet.float8 else "no"
        print(
            f"{name:22} {sheet.bfloat16 / 1e12:6.0f} bf16 {fp8:>5} fp8 TFLOP/s {sheet.bandwidth / 1e12:6.2f} TB/s"
            f"   {sheet.source}"
        )
    for op, case, cost in op_costs():
        print(
            f"{op:30} {case:24} forward {cost.forward_bytes / 1e6:8.1f} MB {cost.forward_flops / 1e9:7.1f} GFLOP, "
            f"backward {cost.backward_bytes / 1e6:8.1f} MB {cost.backward_flops / 1e9:7.1f} GFLOP"
        )
    forward, training = (flops / 1e9 for flops in model_flops())
    print(f"LightningDiT-XL/1, one image: forward {forward:.2f} GFLOP, training {training:.2f}")
    print(f"optimizer: {optimizer_bytes_per_parameter():.0f} bytes for a parameter")
    if reasons := cuda_reasons():
        print(f"ceilings not measured: {'; '.join(reasons)}")
        return 0
    device = CudaDevice()
    log = Log(device.kind, options.out)
    for row in measure(device, options.seconds)[1]:
        print(ceiling_text(log.write(row)), flush=True)
    return 0


def ceiling_text(row: Row) -> str:
    stated = f", {row['rate'] / row['sheet']:.0%} of the data sheet's {row['sheet']:.4g}" if row["sheet"] else ""
    return f"{row['ceiling']:16} {row['rate']:8.2f} {row['unit']} (spread {row['spread']:.1%}{stated})"


if __name__ == "__main__":
    sys.exit(main())
