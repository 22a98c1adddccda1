"""Time whole training steps on a GPU: loader, forward, backward, optimizer and moving average, on one GPU.

    python -m bench.step [--model NAME] [--batch N] [--variant NAME] [--quick] [--minutes M] [--out FILE]

The headline row is the variant "trainer": the loop that `python -m launch train` runs, with DeepSpeed, on the run file
of the 64 epochs. Its peers in the same run are the plain model, eager and under torch.compile. Ends with 1 if one of
our variants is wrong or fails, with 2 if there is no GPU.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import roofline
from bench.breakdown import breakdown, longest, profiled
from bench.rows import Log, Row, clocks
from bench.timing import CudaDevice, Device, Lap, Timing, interleave
from bench.training import STEPS, VARIANTS, Variant
from kernels.device import cuda_reasons
from lightningdit.config import MODEL_NAMES, ModelConfig, named_config
from lightningdit.cost import flops_per_image

PAPER = {"use_swiglu": True, "use_rope": True, "use_rmsnorm": True}
IMAGES = 64 * 1_281_167  # of 64 epochs of ImageNet
BATCHES = {"LightningDiT-XL/1": (128, 64), "LightningDiT-L/1": (128, 256), "LightningDiT-B/1": (256, 512)}
QUICK = ("trainer", "bare", "plain-compile", "plain-eager")
#: How far the loss of the first step may be from the plain model's in float32: bfloat16 keeps 8 bits.
LOSS_TOLERANCE = 0.02


@dataclass(frozen=True)
class Job:
    """One model and batch, to be trained in several ways by turns."""

    model: str
    config: ModelConfig
    batch: int
    variants: tuple[Variant, ...]


def jobs(models: list[str], batches: list[int], names: list[str]) -> Iterator[Job]:
    """The largest model first, each at its own batches unless some are given."""
    for model in models:
        config = named_config(model, input_size=16, in_channels=32, **PAPER)
        for batch in batches or BATCHES.get(model, (128,)):
            yield Job(model, config, batch, tuple(VARIANTS[name] for name in names))


@dataclass(frozen=True)
class Bench:
    """How rows are measured.

    Attributes:
        ceilings: None on a CPU, whose rows state no fraction of a limit.
        seconds: of steps that count, for each variant.
        rounds: bursts that these are cut into, alternating with the other variants'.
        make: variant, config, batch and device → a step to call.
    """

    device: Device
    log: Log
    ceilings: roofline.Ceilings | None
    seconds: float = 30.0
    rounds: int = 4
    make: Callable = lambda variant, *arguments: STEPS[variant.engine](variant, *arguments)

    def run(self, job: Job) -> list[Row]:
        """All rows of a job, written to the log; what cannot run is recorded with its reason."""
        steps, memory, losses, rows = {}, {}, {}, []
        for variant in job.variants:
            try:
                with self._peak(variant.name, memory):
                    step = self.make(variant, job.config, job.batch, self.device.kind)
                    losses[variant.name] = self._begin(step)
                steps[variant.name] = step
            except ImportError as error:
                rows.append(self._write(job, variant, "unavailable", f"not installed: {error}"))
            except Exception as error:
                rows.append(self._write(job, variant, "failed", f"{type(error).__name__}: {error}"[:300]))
        for name, why in wrong_losses(losses).items():
            rows.append(self._write(job, VARIANTS[name], "incorrect", why))
            del steps[name]
        timings = interleave({name: Lap(step) for name, step in steps.items()}, self.device, self.seconds, self.rounds)
        state = clocks() if self.device.kind == "cuda" else {}
        for variant in job.variants:
            if variant.name in timings:
                figures = self._figures(job, variant, timings) | {"peak_gb": memory[variant.name], "clocks": state}
                figures |= self._where(steps[variant.name])
                rows.append(self._write(job, variant, "ok", "", loss=losses[variant.name], **figures))
        steps.clear()
        self._tidy()  # not before: it forgets what was compiled
        return rows

    def _begin(self, step) -> float | None:
        """Compile, warm up, and the loss of the first step, where the step tells it."""
        first = step()
        for _ in range(2):
            step()
        return None if first is None else float(first)

    def _peak(self, name: str, memory: dict[str, float | None]):
        return _PeakMemory(name, memory, self.device.kind == "cuda")

    def _figures(self, job: Job, variant: Variant, timings: dict[str, Timing]) -> Row:
        mine = timings[variant.name]
        rate, flops = job.batch / mine.median, flops_per_image(job.config)[1]
        hours = IMAGES / (8 * rate) / 3600
        limits = {"mfu": None, "fraction": None}
        if self.ceilings is not None:
            sheet = roofline.SHEETS.get(torch.cuda.get_device_name())
            limits = {"mfu": rate * flops / sheet.bfloat16 if sheet else None,
                      "fraction": rate * flops / self.ceilings.matmul[torch.bfloat16]}  # fmt: skip
        return {
            **{f"p{q}_ms": mine.quantile(q / 100) * 1e3 for q in (20, 50, 80)},
            "spread": mine.spread, "samples": len(mine.samples), "images_per_second": rate,
            "flops": flops * job.batch, **limits,
            "extrapolated": {"gpus": 8, "epochs": 64, "hours": hours, "times_faster_than_10_hours": 10 / hours},
            "times_faster_than": {name: t.median / mine.median for name, t in timings.items() if name != variant.name},
        }  # fmt: skip

    def _where(self, step) -> Row:
        if self.device.kind != "cuda":
            return {}
        found = profiled(step)
        return {"breakdown_ms": breakdown(found, 3), "longest": longest(found, 3)}

    def _tidy(self) -> None:
        torch._dynamo.reset()
        gc.collect()
        if self.device.kind == "cuda":
            torch.cuda.empty_cache()

    def _write(self, job: Job, variant: Variant, status: str, why: str, **figures) -> Row:
        row = {"kind": "step", "model": job.model, "batch": job.batch, "variant": variant.name,
               "features": variant.features(), "status": status, "reason": why}  # fmt: skip
        row = self.log.write(row | figures)
        print(text(row), flush=True)
        return row


class _PeakMemory:
    """Puts gigabytes of device memory, at most at once within the context, under a name; None on a CPU."""

    def __init__(self, name: str, memory: dict[str, float | None], on_device: bool):
        self._name, self._memory, self._on_device = name, memory, on_device

    def __enter__(self):
        self._memory[self._name] = None
        if self._on_device:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()

    def __exit__(self, *exception):
        if self._on_device:
            self._memory[self._name] = (torch.cuda.max_memory_allocated() - self._before) / 1e9


def wrong_losses(losses: dict[str, float | None]) -> dict[str, str]:
    """Variant → what is wrong with its first loss, next to the plain model's; the trainer draws noise of its own."""
    plain = next((losses[name] for name in ("plain-eager", "plain-compile") if losses.get(name) is not None), None)
    if plain is None:
        return {}
    return {
        name: f"the first loss is {loss:.5f}, the plain model's {plain:.5f}"
        for name, loss in losses.items()
        if loss is not None and not abs(loss - plain) <= LOSS_TOLERANCE * abs(plain)
    }


def text(row: Row) -> str:
    """A row as a line to read."""
    head = f"{row['model']} batch {row['batch']} {row['variant']:24}"
    if row["status"] != "ok":
        return f"{head} {row['status']}: {row['reason']}"
    share = f", {row['mfu']:.1%} MFU" if row["mfu"] else ""
    memory = f", {row['peak_gb']:.1f} GB" if row["peak_gb"] else ""
    others = "".join(f", {ratio:.2f}x {name}" for name, ratio in row["times_faster_than"].items())
    hours = row["extrapolated"]["hours"]
    return (f"{head} {row['images_per_second']:7.1f} images/s{share} ({row['p50_ms']:.1f} ms ±{row['spread'] / 2:.1%}"
            f"{memory}), 64 epochs on 8 GPUs: {hours:.1f} h (extrapolated){others}")


def work_through(bench: Bench, todo: list[Job], minutes: float, clock: Callable[[], float] = time.monotonic) -> int:
    """Run jobs until the time is up, judged by the longest so far; the exit status."""
    start, longest_job, rows = clock(), 0.0, []
    for number, job in enumerate(todo):
        begun = clock()
        if begun + longest_job > start + 60 * minutes:
            left = ", ".join(f"{job.model} batch {job.batch}" for job in todo[number:])
            print(f"time is up, not measured: {left}")
            break
        rows += bench.run(job)
        longest_job = max(longest_job, clock() - begun)
    return int(any(row["status"] in ("incorrect", "failed") for row in rows))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", action="append", choices=MODEL_NAMES, help="repeatable; default: XL/1, L/1, B/1")
    parser.add_argument("--batch", action="append", type=int, default=[], help="images per step; repeatable")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="repeatable; default: all")
    parser.add_argument("--quick", action="store_true", help=f"XL/1 at 128 alone, as {', '.join(QUICK)}")
    parser.add_argument("--seconds", type=float, default=30.0, help="of steps for each variant (default 30)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing that would end later")
    parser.add_argument("--out", type=Path, help="append rows to this file")
    options = parser.parse_args(argv)
    if reasons := cuda_reasons():
        print(f"bench.step needs a GPU: {'; '.join(reasons)}", file=sys.stderr)
        return 2
    torch._dynamo.config.recompile_limit = 64  # all variants compile the same functions, each for itself
    device = CudaDevice()
    log = Log(device.kind, options.out)
    ceilings, found = roofline.measure(device)
    for row in found:
        print(roofline.ceiling_text(log.write(row)), flush=True)
    models = options.model or (["LightningDiT-XL/1"] if options.quick else list(BATCHES))
    batches = options.batch or ([128] if options.quick else [])
    todo = list(jobs(models, batches, options.variant or list(QUICK if options.quick else VARIANTS)))
    return work_through(Bench(device, log, ceilings, options.seconds), todo, options.minutes)


if __name__ == "__main__":
    sys.exit(main())
