"""The harness of the bench: providers of one job are checked, timed in interleaved rounds, and have a row each.

A program is a `Comparison`, which says how a provider is made, when it is wrong, and what its row states. A provider is
timed for a moment as soon as it has started, later all of them by turns, or one after the other where memory cannot
hold them together. Whoever has been timed has a row in the file from then on, which says what it covers and is replaced
when there is more: what ends the process loses nothing.
"""

import gc
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from bench.measure import timing
from bench.measure.ceilings import Ceilings
from bench.measure.cutoff import NEVER, CutOff, Deadline
from bench.measure.failures import status_of
from bench.measure.progress import ENDED, PeakMemory, Progress, Ready
from bench.measure.rows import Log, Row, clocks
from bench.measure.timing import Device
from common.data_sheets import SHEETS
from kernels.testing.tolerance import mismatch

#: Most seconds of iterations right after a provider has started: all that its row covers until the rounds begin.
EARLY = 1.0
TIME_IS_UP = "the time is up"


class Job(Protocol):
    """A group of providers that are compared with each other; its text names the group."""

    @property
    def providers(self) -> tuple[str, ...]: ...


class Varied:
    """A job whose providers are named variants."""

    variants: tuple[Any, ...]

    @property
    def providers(self) -> tuple[str, ...]:
        return tuple(variant.name for variant in self.variants)

    def variant(self, name: str) -> Any:
        return next(variant for variant in self.variants if variant.name == name)


@dataclass(frozen=True)
class Comparison(ABC):
    """One kind of measurement: how its jobs are run, checked and written.

    Attributes:
        ceilings: None on a CPU, whose rows state no fraction of a limit.
        seconds: of samples, for each part of each provider.
        rounds: how many these are cut into, alternating with the others'.
        until: when to stop, in the middle of a job if need be.
    """

    device: Device
    log: Log
    ceilings: Ceilings | None
    seconds: float = 30.0
    rounds: int = 4
    until: Deadline = NEVER

    kind: ClassVar[str]
    #: Unit of the times in rows, and how many of it are a second.
    unit: ClassVar[tuple[str, float]] = ("ms", 1e3)
    #: Whether a provider is timed for a moment as soon as it has started.
    early: ClassVar[bool] = True
    #: Whether all providers are held and timed by turns; else the memory of each is given back before the next starts,
    #: and what `prepare` gives as its value has to be small.
    interleaved: ClassVar[bool] = True

    # What a program says of itself.

    @abstractmethod
    def named(self, job: Any, name: str) -> Row:
        """The keys that name a row, and what else is known of a provider before it starts."""

    def set_up(self, job: Any) -> Any:
        """State that the providers of a job share; given to `prepare` and `wrong`."""
        return None

    def order(self, job: Any) -> Iterable[str]:
        """In which order providers start: those the others are checked against first."""
        return job.providers

    @abstractmethod
    def prepare(self, job: Any, name: str, shared: Any) -> Ready:
        """Make a provider and warm it up. ImportError: it is not installed here."""

    def wrong(self, job: Any, values: Mapping[str, Any], shared: Any) -> dict[str, str]:
        """Provider → what is wrong with its value."""
        return {}

    @abstractmethod
    def figures(self, job: Any, ready: Ready) -> Row:
        """The numbers of a row beside those that all rows have."""

    def afterwards(self, job: Any, ready: Ready) -> Row:
        """Further keys of a row, found when all that is held has been timed; left out after a signal."""
        return {}

    @abstractmethod
    def label(self, row: Row) -> str:
        """Names of a row, to begin a line with."""

    @abstractmethod
    def measured(self, row: Row) -> str:
        """The numbers of a row as part of a line."""

    def alarming(self, row: Row) -> bool:
        """Whether a row makes the program end with 1."""
        return row["status"] in ("incorrect", "failed")

    def conclude(self, rows: list[Row]) -> None:
        """Print what the rows of all jobs come to."""
        print("rows: " + ", ".join(f"{n} {status}" for status, n in Counter(row["status"] for row in rows).items()))

    # The course of a job.

    def run(self, job: Any) -> list[Row]:
        """All rows of a job, written to the log; what cannot run is recorded with its reason.

        A row is written when its provider has been timed for a moment, and again when there is more to say.

        Raises:
            CutOff: a signal came; the rows of whoever had been timed are written.
        """
        progress, cut = Progress(), None
        self.free()  # what was measured before
        try:
            self._measure(job, progress)
        except CutOff as signal:
            cut = signal
        progress.stopped = str(cut) if cut else progress.stopped or TIME_IS_UP
        try:
            self._last_rows(job, progress, look=cut is None)
        except CutOff as signal:  # there is one at most
            cut = signal
            self._last_rows(job, progress, look=False)
        if cut is not None:
            raise cut
        for ready in progress.ready.values():
            _give_back(ready)
        progress.ready.clear()
        self.tidy()
        return list(progress.rows.values())

    def _measure(self, job: Any, progress: Progress) -> None:
        try:
            progress.shared = self.set_up(job)
        except Exception as error:
            for name in job.providers:
                self._write(job, progress, name, *status_of(error))
            return
        left = list(self.order(job))
        while left and not self.until.passed():
            name = left.pop(0)
            if failed := self._start(job, name, progress):
                self._drop(job, progress, name, *failed)
            elif name in progress.timed():
                self._report(job, progress, name)
            if not self.interleaved:
                self._time(job, progress)
                for ready in progress.held().values():
                    self._look(job, ready, self._clocks())
                    self._report(job, progress, name)
                    _give_back(ready)
                self.tidy()
        if left:
            progress.stopped = TIME_IS_UP
            print(f"{TIME_IS_UP}, not measured: {job} {', '.join(left)}", flush=True)
        self._time(job, progress)

    def _start(self, job: Any, name: str, progress: Progress) -> tuple[str, str] | None:
        """Make, check and time a provider for a moment; status and reason where that fails.

        No error outlives this: its frames hold the memory that ran out.
        """
        try:
            with PeakMemory(self.device.kind == "cuda") as peak:
                ready = self.prepare(job, name, progress.shared)
            ready.peak_gb = peak.gigabytes
            progress.ready[name] = ready
            values = {name: ready.value for name, ready in progress.ready.items()}
            for other, why in self.wrong(job, values, progress.shared).items():
                self._drop(job, progress, other, "incorrect", why)
            if self.early and name in progress.ready:
                seconds = min(EARLY, self.seconds / self.rounds)
                ready.early = timing.interleave(ready.iterations, self.device, seconds, rounds=1)
        except Exception as error:
            return status_of(error)
        return None

    def _time(self, job: Any, progress: Progress) -> None:
        """Time all that are held; where one of them fails, the others begin anew, without it."""
        while progress.held() and not self.until.passed():
            failed = self._all_rounds(progress)
            if failed is None:
                return
            self._drop(job, progress, *failed)

    def _all_rounds(self, progress: Progress) -> tuple[str, str, str] | None:
        """Time rounds until the time is up; name, status and reason of a provider that failed."""
        held = progress.held()
        iterations = {(name, part): run for name, ready in held.items() for part, run in ready.iterations.items()}
        try:
            for timings in timing.time_rounds(iterations, self.device, self.seconds, self.rounds):
                for (name, part), found in timings.items():
                    held[name].late[part] = found
                if self.until.passed():
                    progress.stopped = TIME_IS_UP
                    break
        except timing.IterationFailed as failure:
            return failure.name[0], *status_of(failure)
        return None

    def _drop(self, job: Any, progress: Progress, name: str, status: str, why: str) -> None:
        """Take a provider out that is wrong or has failed, and give back its memory."""
        ready = progress.ready.pop(name, None)
        self._write(job, progress, name, status, why)
        if ready is not None:
            _give_back(ready)
        self.free()

    def _last_rows(self, job: Any, progress: Progress, look: bool) -> None:
        """Write the last rows of all that was timed; look: there is time for what is looked at afterwards."""
        state = self._clocks() if look else {}
        for name in sorted(progress.timed(), key=job.providers.index):
            ready = progress.ready[name]
            if look and ready.iterations:
                self._look(job, ready, state)
            self._report(job, progress, name, last=True)

    def _look(self, job: Any, ready: Ready, state: Row) -> None:
        ready.about["clocks"] = state
        try:
            ready.about |= self.afterwards(job, ready)
        except Exception as error:
            ready.about["afterwards"] = ": ".join(status_of(error))

    def _report(self, job: Any, progress: Progress, name: str, last: bool = False) -> None:
        """Write the row of a provider that was timed, unless it is written as it is."""
        mine = progress.ready[name]
        low, middle, high = (mine.seconds(q / 100) for q in (20, 50, 80))
        unit, many = self.unit
        rounds, late = min(part.rounds for part in mine.parts.values()), mine.parts is mine.late
        figures = {
            **{f"p{q}_{unit}": seconds * many for q, seconds in ((20, low), (50, middle), (80, high))},
            "spread": (high - low) / middle,
            "samples": min(len(part.samples) for part in mine.parts.values()),
            "times_faster_than": {
                other: ready.seconds() / middle for other, ready in progress.timed().items() if other != name
            },
            **self.figures(job, mine),
            "coverage": {
                "rounds": rounds,
                "of": self.rounds,
                "interleaved": self.interleaved and late,
                "cut_off": None if late and rounds == self.rounds else progress.stopped or ENDED,
            },
            "peak_gb": mine.peak_gb,
            "clocks": {},
            **mine.about,
        }
        if figures == progress.figures.get(name):
            self._say(progress.rows[name], last)
        else:
            progress.figures[name] = figures
            self._write(job, progress, name, "ok", "", last, **figures)

    def limits(self, flops_per_second: float, dtype: torch.dtype = torch.bfloat16) -> Row:
        """`mfu` of the data sheet and `fraction` of the large matmul in this run; None on a CPU."""
        if self.ceilings is None:
            return {"mfu": None, "fraction": None}
        sheet = SHEETS.get(torch.cuda.get_device_name())
        stated = sheet.bfloat16 if sheet and dtype == torch.bfloat16 else None
        return {
            "mfu": flops_per_second / stated if stated else None,
            "fraction": flops_per_second / self.ceilings.matmul[dtype],
        }

    def _clocks(self) -> Row:
        return clocks() if self.device.kind == "cuda" else {}

    def tidy(self) -> None:
        """Forget what was compiled, too: only when nobody is held who goes on."""
        torch._dynamo.reset()
        self.free()

    def free(self) -> None:
        gc.collect()
        if self.device.kind == "cuda":
            torch.cuda.empty_cache()

    def _write(
        self, job: Any, progress: Progress, name: str, status: str, why: str, last: bool = True, **figures: Any
    ) -> None:
        progress.rows.pop(name, None)
        progress.rows[name] = self.write(job, name, status, why, last, **figures)

    def write(self, job: Any, name: str, status: str, why: str, last: bool = True, **figures: Any) -> Row:
        """Log and print a row."""
        row = {"kind": self.kind, **self.named(job, name), "status": status, "reason": why}
        row = self.log.write(row | figures)
        self._say(row, last)
        return row

    def text(self, row: Row) -> str:
        """A row as a line to read."""
        if row["status"] != "ok":
            return f"{self.label(row)} {row['status']}: {row['reason']}"
        others = "".join(f", {ratio:.2f}x {name}" for name, ratio in row["times_faster_than"].items())
        return f"{self.label(row)} {self.measured(row)}{others}"

    def _say(self, row: Row, last: bool = True) -> None:
        text = self.text(row)
        print("; ".join(filter(None, (text, coverage_text(row)))) if last else f"so far: {text}", flush=True)


def mismatches(what: str, values: Mapping[str, torch.Tensor], eager: Any, fp64: Any) -> dict[str, str]:
    """Provider → how its value breaks the tests' rule: an error at most twice that of `eager`, beside float64."""
    found = {name: mismatch(what, value, eager, fp64) for name, value in values.items()}
    return {name: why for name, why in found.items() if why}


def coverage_text(row: Row) -> str:
    """In words, what a row covers whose run was cut off; empty for others."""
    covered = row.get("coverage") or {}
    if not covered.get("cut_off"):
        return ""
    turns = "" if covered["interleaved"] else ", not by turns"
    return f"{covered['rounds']} of {covered['of']} rounds{turns}, cut off: {covered['cut_off']}"


def _give_back(ready: Ready) -> None:
    try:
        ready.release()
    except Exception as error:  # on a device that is lost, say
        print(f"its memory was not given back: {': '.join(status_of(error))}", flush=True)
