"""Time ops on a GPU: every production case, dtype and direction, against the device's limits and whoever else is there.

    python -m bench.ops [OP …] [--quick] [--minutes M] [--out FILE] …

No number without correctness: a provider whose results are wrong by the tests' rule is reported, not timed. The most
representative cases come first. Ends with 1 if one of our backends is wrong or fails, with 2 if there is no GPU.
"""

import argparse
import gc
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import kernels
from bench.baselines import Adapter, Provider
from bench.measure import program, timing
from bench.measure.ceilings import Ceilings
from bench.measure.rows import Log, Row, clocks, version
from bench.measure.timing import CudaDevice, Device, Timing
from bench.measure.work import DIRECTIONS, Reference, Sets
from bench.workloads.providers import Compiler, inductor, ours, providers_for
from kernels.backends.device import cuda_reasons
from kernels.registry import BackendUnavailable, Op
from kernels.testing.cases import Case

#: dtype → how late it comes; those of other cases come two places later.
DTYPES = {torch.bfloat16: 0, torch.float32: 1, torch.float16: 3}


@dataclass(frozen=True)
class OpJob:
    """One op, case and dtype: what its rows share."""

    op: Op
    case: Case
    dtype: torch.dtype

    @property
    def rank(self) -> int:
        """0 for the most representative."""
        return DTYPES[self.dtype] + (0 if self.case.id == representative(self.op) else 2)

    @property
    def names(self) -> dict[str, str]:
        return {"op": self.op.name, "case": self.case.id, "dtype": str(self.dtype).removeprefix("torch.")}

    def __str__(self) -> str:
        return " ".join(self.names.values())


def representative(op: Op) -> str:
    """The id of the production case that says most of an op: the headline model's, or else the first."""
    production = [case.id for case in op.cases if case.production]
    return "XL" if "XL" in production else production[0]


def jobs(ops: Iterable[Op], cases: Iterable[str] = (), dtypes: Iterable[torch.dtype] = DTYPES) -> list[OpJob]:
    """Every production case (of these ids, if any) and dtype, the most representative first."""
    wanted = set(cases)
    found = [OpJob(op, case, dtype) for op in ops for case in op.cases for dtype in dtypes
             if case.production and dtype in op.dtypes & case.dtypes and (not wanted or case.id in wanted)]  # fmt: skip
    return sorted(found, key=lambda job: job.rank)


@dataclass(frozen=True)
class OpComparison:
    """How rows are measured.

    Attributes:
        ceilings: None on a CPU, whose rows state no fraction of a limit.
        seconds: of samples, for each provider and direction.
        invited: whether a provider of that name takes part.
        emulated: lets backends take part that run in an emulator, to test the bench.
    """

    device: Device
    log: Log
    ceilings: Ceilings | None
    seconds: float = 0.5
    directions: tuple[str, ...] = DIRECTIONS[:2]
    invited: Callable[[str], bool] = lambda name: True
    compiler: Compiler = inductor
    emulated: bool = False

    def run(self, job: OpJob) -> list[Row]:
        """All rows of a job, written to the log. Whatever fails is recorded in its row."""
        rows: list[Row] = []
        torch._dynamo.reset()  # it counts recompilations by function, and falls back to eager after a few
        with self.device.active():
            try:
                rows.extend(self._rows(job))
            except Exception as error:
                rows.append(self._write(job, None, "all", "failed", reason(error)))
        torch._dynamo.reset()
        gc.collect()
        if self.device.kind == "cuda":
            torch.cuda.empty_cache()
        return rows

    def _rows(self, job: OpJob) -> Iterator[Row]:
        inputs = job.case.inputs(job.dtype, self.device.kind)
        expected, cost = Reference(job.op, inputs), job.op.cost(**inputs)
        present = []
        for provider in providers_for(job.op, self.compiler, self.emulated):
            if self.invited(provider.name):
                adapter, status, why = ready(provider, inputs)
                if adapter is not None:
                    present.append((provider, adapter))
                else:
                    yield self._write(job, None, provider.name, status, why)
        for direction in self.directions if job.op.differentiable else ("forward",):
            yield from self._direction(job, expected, present, Work(cost, direction, job.dtype, self.ceilings))

    def _direction(self, job: OpJob, expected: Reference, present: list, work: "Work") -> Iterator[Row]:
        count, calls = timing.iteration_size(work.moved, self.device.l2_bytes)
        sets, iterations = Sets(expected, count, calls), {}
        for provider, adapter in present:
            status, why = "incorrect", ""
            try:
                why = "; ".join(expected.mismatches(adapter, work.direction))
                if not why:
                    iterations[provider.name] = sets.iteration(provider, adapter, work.direction, self.device)
            except Exception as error:
                status, why = "failed", reason(error)
            if why:
                yield self._write(job, work.direction, provider.name, status, why)
        timings = None
        while timings is None:
            try:
                timings = timing.interleave(iterations, self.device, self.seconds)
            except timing.IterationFailed as failure:  # the others start again, without it
                del iterations[failure.name]
                yield self._write(job, work.direction, failure.name, "failed", reason(failure.__cause__))
        state = clocks() if self.device.kind == "cuda" else {}
        for provider, _ in present:
            if provider.name in timings:
                told = {"includes": provider.includes, "version": version(provider.package), "clocks": state}
                size = {"sets": count, "footprint_mb": count * work.moved / 1e6}
                measured = work.figures(provider.name, timings)
                yield self._write(job, work.direction, provider.name, "ok", "", **told, **size, **measured)

    def _write(self, job: OpJob, direction: str | None, name: str, status: str, why: str, **figures: Any) -> Row:
        row = {"kind": "op", **job.names, "direction": direction, "provider": name, "status": status, "reason": why}
        row = self.log.write(row | figures)
        print(text(row), flush=True)
        return row


def ready(provider: Provider, inputs: dict) -> tuple[Adapter | None, str, str]:
    """Its adapter; or None, the status and the reason."""
    try:
        adapter = provider.load()
        reasons = provider.unsupported(**inputs)
    except BackendUnavailable as error:
        return None, "unavailable", "; ".join(error.reasons)
    except (ImportError, OSError) as error:
        return None, "unavailable", f"not installed: {reason(error)}"
    except Exception as error:
        return None, "failed", reason(error)
    return (None, "unsupported", "; ".join(reasons)) if reasons else (adapter, "ok", "")


def reason(error: Exception) -> str:
    first = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first}"[:300]


@dataclass(frozen=True)
class Work:
    """What one call in one direction has to do at least, and how its times are stated."""

    cost: kernels.testing.cases.Cost
    direction: str
    dtype: torch.dtype
    ceilings: Ceilings | None
    moved: int = field(init=False)
    flops: int = field(init=False)

    def __post_init__(self) -> None:
        parts = ("forward", "backward") if self.direction == "both" else (self.direction,)
        for name, unit in (("moved", "bytes"), ("flops", "flops")):
            object.__setattr__(self, name, sum(getattr(self.cost, f"{part}_{unit}") for part in parts))

    def figures(self, name: str, timings: dict[str, Timing]) -> Row:
        """The numbers of a row, those of `name` among all that were timed with it."""
        mine = timings[name]
        microseconds = {f"p{q}_us": mine.quantile(q / 100) * 1e6 for q in (20, 50, 80)}
        limit = {"limit_us": None, "bound": None, "fraction": None}
        if self.ceilings is not None:
            seconds, bound = self.ceilings.limit(self.moved, self.flops, self.dtype)
            limit = {"limit_us": seconds * 1e6, "bound": bound, "fraction": seconds / mine.median}
        return {
            **microseconds, "spread": mine.spread, "samples": len(mine.samples), "calls": mine.calls,
            "method": mine.method, "bytes": self.moved, "flops": self.flops, **limit,
            "times_faster_than": {other: t.median / mine.median for other, t in timings.items() if other != name},
        }  # fmt: skip


def text(row: Row) -> str:
    """A row as a line to read."""
    head = f"{row['op']} {row['case']} {row['dtype']} {row['direction'] or '':8} {row['provider']:20}"
    if row["status"] != "ok":
        return f"{head} {row['status']}: {row['reason']}"
    part = "" if row["fraction"] is None else f" {row['fraction']:6.1%} of the {row['bound']} limit"
    rates = f" {row['bytes'] / row['p50_us'] / 1e6:5.2f} TB/s" + (
        f" {row['flops'] / row['p50_us'] / 1e6:6.1f} TFLOP/s" if row["flops"] else ""
    )
    others = "".join(f", {ratio:.2f}x {name}" for name, ratio in row["times_faster_than"].items())
    return f"{head} {row['p50_us']:9.1f} µs ±{row['spread'] / 2:.1%}{part}{rates}{others}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    names = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("op", nargs="*", help=f"default: all of {', '.join(kernels.OPS)}")
    parser.add_argument("--case", action="append", default=[], help="a production case's id; repeatable")
    parser.add_argument("--dtype", action="append", choices=names, help="repeatable")
    parser.add_argument("--direction", action="append", choices=DIRECTIONS, help="default: forward and backward")
    parser.add_argument("--only", action="append", default=[], help="a provider's name; repeatable")
    parser.add_argument("--without", action="append", default=[], help="a provider's name; repeatable")
    parser.add_argument("--seconds", type=float, default=0.5, help="of samples for each provider (default 0.5)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing that would end later")
    parser.add_argument("--quick", action="store_true", help="the representative case of each op, in bfloat16")
    parser.add_argument("--after-quick", action="store_true", help="everything that --quick leaves out")
    parser.add_argument("--out", type=Path, help="append rows to this file")
    program.add_ceilings(parser)
    options = parser.parse_args(argv)
    known = {case.id for op in kernels.OPS.values() for case in op.cases if case.production}
    for kind, given, allowed in (("op", options.op, kernels.OPS), ("case", options.case, known)):
        for name in given:
            if name not in allowed:
                parser.error(f"no {kind} is called {name!r}; known: {', '.join(sorted(allowed))}")
    options.dtypes = [names[name] for name in options.dtype or names]
    return options


def plan(options: argparse.Namespace) -> list[OpJob]:
    found = jobs([kernels.OPS[name] for name in options.op or kernels.OPS], options.case, options.dtypes)
    return [job for job in found if not ((options.quick and job.rank) or (options.after_quick and not job.rank))]


def work_through(
    bench: OpComparison, todo: list[OpJob], minutes: float, clock: Callable[[], float] = time.monotonic
) -> int:
    """Run jobs until the time is up, estimated by the longest so far; the exit status."""
    start, longest, rows = clock(), 0.0, []
    for number, job in enumerate(todo):
        begun = clock()
        if begun + longest > start + 60 * minutes:
            print(f"time is up, not measured: {', '.join(map(str, todo[number:]))}")
            break
        rows += bench.run(job)
        longest = max(longest, clock() - begun)
    print("rows: " + ", ".join(f"{count} {status}" for status, count in Counter(r["status"] for r in rows).items()))
    return int(any(map(alarming, rows)))


def alarming(row: Row) -> bool:
    """Whether one of our backends, or a job as a whole, is wrong or failed."""
    mine = row["provider"] in ("all", *ours(kernels.OPS[row["op"]]))
    return mine and row["status"] in ("incorrect", "failed")


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if reasons := cuda_reasons():
        print(f"bench.ops needs a GPU: {'; '.join(reasons)}", file=sys.stderr)
        return 2
    device = CudaDevice()
    log = Log(device.kind, options.out)
    ceilings = program.ceilings_of("bench.ops", options, device, log)
    bench = OpComparison(
        device,
        log,
        ceilings,
        options.seconds,
        tuple(options.direction or DIRECTIONS[:2]),
        lambda name: name not in options.without and (not options.only or name in options.only),
    )
    return work_through(bench, plan(options), options.minutes)


if __name__ == "__main__":
    sys.exit(main())
