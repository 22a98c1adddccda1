"""Time ops on a GPU: every production case, dtype and direction, against the device's limits and other providers.

    python -m bench.ops [OP …] [--quick] [--minutes M] [--out FILE] …

No number without correctness: a provider whose results are wrong by the tests' rule is reported and not timed. The
representative cases come first. Ends with 1 if one of our backends is wrong or fails, with 2 if there is no GPU.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

import kernels
from bench.baselines import Adapter, Provider
from bench.measure import program, timing
from bench.measure.comparison import Comparison
from bench.measure.failures import status_of
from bench.measure.progress import Ready
from bench.measure.rows import Row, version
from bench.measure.work import DIRECTIONS, Reference, Sets
from bench.workloads.providers import Compiler, inductor, ours, providers_for
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
    found = [
        OpJob(op, case, dtype)
        for op in ops
        for case in op.cases
        for dtype in dtypes
        if case.production and dtype in op.dtypes & case.dtypes and (not wanted or case.id in wanted)
    ]
    return sorted(found, key=lambda job: job.rank)


@dataclass(frozen=True)
class DirectionJob:
    """An `OpJob` in one direction, with the providers that can serve it.

    Attributes:
        present: name → provider and its adapter.
        moved, flops: what one call has to do at least, bytes and floating-point operations.
    """

    job: OpJob
    direction: str
    reference: Reference
    present: Mapping[str, tuple[Provider, Adapter]]
    moved: int
    flops: int

    @property
    def names(self) -> Row:
        return self.job.names | {"direction": self.direction}

    @property
    def providers(self) -> tuple[str, ...]:
        return tuple(self.present)

    def __str__(self) -> str:
        return f"{self.job} {self.direction}"


@dataclass(frozen=True)
class OpComparison(Comparison):
    """Every provider of an op, by turns, in each direction.

    Attributes:
        directions: those of ops that have gradients; the others have "forward" alone.
        invited: whether a provider of that name takes part.
        emulated: lets backends take part that run in an emulator, to test the bench.
    """

    seconds: float = 0.5
    rounds: int = 8
    directions: tuple[str, ...] = DIRECTIONS[:2]
    invited: Callable[[str], bool] = lambda name: True
    compiler: Compiler = inductor
    emulated: bool = False

    kind: ClassVar[str] = "op"
    unit: ClassVar[tuple[str, float]] = ("us", 1e6)
    early: ClassVar[bool] = False

    def named(self, job: OpJob | DirectionJob, name: str) -> Row:
        return {"direction": None, **job.names, "provider": name}

    def run(self, job: OpJob) -> list[Row]:
        """All rows of a case: of each direction, and of providers that cannot serve it."""
        rows: list[Row] = []
        with self.device.active():
            try:
                directions, absent = self.by_direction(job)
                rows += [self.write(job, name, *why) for name, why in absent.items()]
                for direction in directions:
                    rows += super().run(direction)
            except Exception as error:
                rows.append(self.write(job, "all", *status_of(error)))
        torch._dynamo.reset()
        return rows

    def by_direction(self, job: OpJob) -> tuple[list[DirectionJob], dict[str, tuple[str, str]]]:
        """The job in each direction, and the providers that cannot serve it, with status and reason."""
        torch._dynamo.reset()  # it counts recompilations by function, and falls back to eager after a few
        inputs = job.case.inputs(job.dtype, self.device.kind)
        reference, cost = Reference(job.op, inputs), job.op.cost(**inputs)
        present, absent = {}, {}
        for provider in providers_for(job.op, self.compiler, self.emulated):
            if self.invited(provider.name):
                adapter, status, why = ready(provider, inputs)
                if adapter is not None:
                    present[provider.name] = provider, adapter
                else:
                    absent[provider.name] = status, why
        found = []
        for direction in self.directions if job.op.differentiable else ("forward",):
            parts = ("forward", "backward") if direction == "both" else (direction,)
            moved, flops = (sum(getattr(cost, f"{part}_{unit}") for part in parts) for unit in ("bytes", "flops"))
            found.append(DirectionJob(job, direction, reference, present, moved, flops))
        return found, absent

    def tidy(self) -> None:
        """Compiled code is kept: it serves the other direction too."""
        self.free()

    def set_up(self, job: DirectionJob) -> Sets:
        return Sets(job.reference, *timing.iteration_size(job.moved, self.device.l2_bytes))

    def prepare(self, job: DirectionJob, name: str, shared: Sets) -> Ready:
        """Its value says what is wrong with its results; then nothing of it is ready."""
        provider, adapter = job.present[name]
        if wrong := "; ".join(job.reference.mismatches(adapter, job.direction)):
            return Ready({}, wrong)
        iteration = shared.iteration(provider, adapter, job.direction, self.device)
        about = {
            "includes": provider.includes,
            "version": version(provider.package),
            "sets": shared.count,
            "footprint_mb": shared.count * job.moved / 1e6,
            "calls": iteration.calls,
            "method": iteration.method,
        }
        return Ready({"": iteration}, "", about)

    def wrong(self, job: DirectionJob, values: Mapping[str, str], shared: Sets) -> dict[str, str]:
        return {name: why for name, why in values.items() if why}

    def figures(self, job: DirectionJob, ready: Ready) -> Row:
        limit: Row = {"limit_us": None, "bound": None, "fraction": None}
        if self.ceilings is not None:
            seconds, bound = self.ceilings.limit(job.moved, job.flops, job.job.dtype)
            limit = {"limit_us": seconds * 1e6, "bound": bound, "fraction": seconds / ready.seconds()}
        return {"bytes": job.moved, "flops": job.flops, **limit}

    def label(self, row: Row) -> str:
        return f"{row['op']} {row['case']} {row['dtype']} {row['direction'] or '':8} {row['provider']:20}"

    def measured(self, row: Row) -> str:
        part = "" if row["fraction"] is None else f" {row['fraction']:6.1%} of the {row['bound']} limit"
        rates = f" {row['bytes'] / row['p50_us'] / 1e6:5.2f} TB/s"
        rates += f" {row['flops'] / row['p50_us'] / 1e6:6.1f} TFLOP/s" if row["flops"] else ""
        return f"{row['p50_us']:9.1f} µs ±{row['spread'] / 2:.1%}{part}{rates}"

    def alarming(self, row: Row) -> bool:
        """Whether one of our backends, or a job as a whole, is wrong or failed."""
        return super().alarming(row) and row["provider"] in ("all", *ours(kernels.OPS[row["op"]]))


def ready(provider: Provider, inputs: dict) -> tuple[Adapter | None, str, str]:
    """Its adapter; or None, the status and the reason."""
    try:
        adapter = provider.load()
        reasons = provider.unsupported(**inputs)
    except BackendUnavailable as error:
        return None, "unavailable", "; ".join(error.reasons)
    except OSError as error:  # a library of a package that is there
        return None, "unavailable", f"not installed: {error}"
    except Exception as error:
        return None, *status_of(error)
    return (None, "unsupported", "; ".join(reasons)) if reasons else (adapter, "ok", "")


def parse(argv: list[str] | None) -> argparse.Namespace:
    names = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    parser = program.parser("bench.ops", __doc__, seconds=0.5)
    parser.add_argument("op", nargs="*", help=f"default: all of {', '.join(kernels.OPS)}")
    parser.add_argument("--case", action="append", default=[], help="a production case's id; repeatable")
    parser.add_argument("--dtype", action="append", choices=names, help="repeatable")
    parser.add_argument("--direction", action="append", choices=DIRECTIONS, help="default: forward and backward")
    parser.add_argument("--only", action="append", default=[], help="a provider's name; repeatable")
    parser.add_argument("--without", action="append", default=[], help="a provider's name; repeatable")
    parser.add_argument("--quick", action="store_true", help="the representative case of each op, in bfloat16")
    parser.add_argument("--after-quick", action="store_true", help="everything that --quick leaves out")
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


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    make = partial(
        OpComparison,
        directions=tuple(options.direction or DIRECTIONS[:2]),
        invited=lambda name: name not in options.without and (not options.only or name in options.only),
    )
    return program.run("bench.ops", options, make, plan(options))


if __name__ == "__main__":
    sys.exit(main())
