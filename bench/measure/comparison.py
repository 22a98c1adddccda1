"""Providers of one job, checked, then timed by turns, and a row for each, also where the run is cut off.

`bench.step`, `bench.sampling`, `bench.tokenizer` and `bench.gemms` are such comparisons: each says how a provider is
made, when it is wrong, and what its row states. A provider is timed for a moment as soon as it has started, later all
of them by turns, or one after the other where memory cannot hold them together. Whoever has been timed has a row in the
file from then on, which says what it covers and is replaced when there is more: what ends the process loses nothing.
"""

import gc
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from bench.measure import timing
from bench.measure.ceilings import Ceilings
from bench.measure.cutoff import NEVER, CutOff, Deadline
from bench.measure.data_sheets import SHEETS
from bench.measure.failures import status_of
from bench.measure.progress import ENDED, PeakMemory, Progress, Ready, Timed
from bench.measure.rows import Log, Row, clocks
from bench.measure.timing import Device

#: Most seconds of iterations right after a provider has started: all that its row covers until the rounds begin.
EARLY = 1.0
TIME_IS_UP = "the time is up"


class Job(Protocol):
    """What the rows of a comparison share; its text says what is measured."""

    names: tuple[str, ...]


class Varied:
    """A job whose providers are named variants."""

    variants: tuple[Any, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(variant.name for variant in self.variants)

    def variant(self, name: str) -> Any:
        return next(variant for variant in self.variants if variant.name == name)


@dataclass(frozen=True)
class Comparison(ABC):
    """How rows are measured.

    Attributes:
        ceilings: None on a CPU, whose rows state no fraction of a limit.
        seconds: of samples, for each part of each provider.
        rounds: rounds that these are cut into, alternating with the others'.
        until: when to stop, in the middle of a job if need be.
    """

    device: Device
    log: Log
    ceilings: Ceilings | None
    seconds: float = 30.0
    rounds: int = 4
    until: Deadline = NEVER

    kind: ClassVar[str]
    #: Whether all providers are held and timed by turns; else the memory of each is given back before the next starts,
    #: and what `prepare` gives as its value has to be small.
    interleaved: ClassVar[bool] = True

    # What a bench says of itself.

    @abstractmethod
    def named(self, job: Any, name: str) -> Row:
        """The keys that name a row, and what else is known of a provider before it starts."""

    def set_up(self, job: Any) -> Any:
        """What the providers of a job share; given to `prepare` and `wrong`."""
        return None

    def order(self, job: Any) -> Iterable[str]:
        """In which order providers start: those the others are checked against first."""
        return job.names

    @abstractmethod
    def prepare(self, job: Any, name: str, shared: Any) -> Ready:
        """Make a provider and warm it up. ImportError: it is not installed here."""

    def wrong(self, job: Any, values: Mapping[str, Any], shared: Any) -> dict[str, str]:
        """Provider → what is wrong with its value."""
        return {}

    @abstractmethod
    def figures(self, job: Any, timed: Timed) -> Row:
        """The numbers of a row beside those that all rows have."""

    def afterwards(self, job: Any, ready: Ready) -> Row:
        """What is looked at when all that is held has been timed; left out where the run is cut off by a signal."""
        return {}

    @abstractmethod
    def text(self, row: Row) -> str:
        """A row as a line to read."""

    def conclude(self, rows: list[Row]) -> None:
        """Print what the rows of all jobs come to."""
        return None

    # The course of a job.

    def run(self, job: Any) -> list[Row]:
        """All rows of a job, written to the log; what cannot run is recorded with its reason.

        A row is written when its provider has been timed for a moment, and again when there is more to say.

        Raises:
            CutOff: a signal came; the rows of whoever had been timed are written.
        """
        progress, cut = Progress(), None
        self._free()  # what was measured before
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
        for name in list(progress.ready):
            _give_back(progress.drop(name))
        self._tidy()
        return list(progress.rows.values())

    def _measure(self, job: Any, progress: Progress) -> None:
        try:
            progress.shared = self.set_up(job)
        except Exception as error:
            for name in job.names:
                self._say(self._write(job, progress, name, *status_of(error)))
            return
        left = list(self.order(job))
        while left and not self.until.passed():
            self._enter(job, left.pop(0), progress)
            if not self.interleaved:
                self._time(job, progress)
                self._let_go(job, progress)
        if left:
            progress.stopped = TIME_IS_UP
            print(f"{TIME_IS_UP}, not measured: {job} {', '.join(left)}", flush=True)
        self._time(job, progress)

    def _enter(self, job: Any, name: str, progress: Progress) -> None:
        """Start a provider, and write its first row."""
        failed = self._start(job, name, progress)
        if failed is not None:
            self._drop(job, progress, name, *failed)
        elif name in progress.ready:
            self._report(job, progress, name)

    def _start(self, job: Any, name: str, progress: Progress) -> tuple[str, str] | None:
        """Make, check and time a provider for a moment; status and reason where that fails.

        No error outlives this: its frames hold the memory that ran out.
        """
        try:
            with PeakMemory(self.device.kind == "cuda") as peak:
                ready = self.prepare(job, name, progress.shared)
            ready.peak_gb = peak.gigabytes
            progress.ready[name] = ready
            for other, why in self.wrong(job, progress.values(), progress.shared).items():
                self._drop(job, progress, other, "incorrect", why)
            if name in progress.ready:
                seconds = min(EARLY, self.seconds / self.rounds)
                progress.early[name] = timing.interleave(ready.iterations, self.device, seconds, rounds=1)
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
        """Fill `progress.late` until the time is up; name, status and reason of a provider that failed."""
        iterations = {
            (name, part): iteration
            for name, ready in progress.held().items()
            for part, iteration in ready.iterations.items()
        }
        try:
            for timings in timing.time_rounds(iterations, self.device, self.seconds, self.rounds):
                progress.late |= timings
                if self.until.passed():
                    progress.stopped = TIME_IS_UP
                    break
        except timing.IterationFailed as failure:
            return failure.name[0], *status_of(failure)
        return None

    def _drop(self, job: Any, progress: Progress, name: str, status: str, why: str) -> None:
        """Take a provider out that is wrong or has failed, and give back its memory."""
        ready = progress.drop(name)
        self._say(self._write(job, progress, name, status, why))
        if ready is not None:
            _give_back(ready)
        self._free()

    def _let_go(self, job: Any, progress: Progress) -> None:
        """Write the rows of those that are held, and give back their memory."""
        for name, ready in progress.held().items():
            self._look(job, ready)
            self._report(job, progress, name)
            _give_back(ready)
        self._tidy()

    def _last_rows(self, job: Any, progress: Progress, look: bool) -> None:
        """Write the last rows of all that was timed; look: there is time for what is looked at afterwards."""
        for name, timed in sorted(progress.timed().items(), key=lambda item: job.names.index(item[0])):
            if look and timed.ready.iterations:
                self._look(job, timed.ready)
            self._report(job, progress, name, last=True)

    def _look(self, job: Any, ready: Ready) -> None:
        ready.about["clocks"] = clocks() if self.device.kind == "cuda" else {}
        try:
            ready.about |= self.afterwards(job, ready)
        except Exception as error:
            ready.about["afterwards"] = ": ".join(status_of(error))

    def _report(self, job: Any, progress: Progress, name: str, last: bool = False) -> None:
        """Write the row of a provider that was timed, unless it is written as it is."""
        everybody = progress.timed()
        mine = everybody[name]
        told = self._figures(job, mine, everybody) | {"coverage": self._coverage(mine, progress)}
        told |= {"peak_gb": mine.ready.peak_gb, "clocks": {}, **mine.ready.about}
        if told != progress.told.get(name):
            self._write(job, progress, name, "ok", "", **told)
            progress.told[name] = told
        self._say(progress.rows[name], last)

    def _figures(self, job: Any, mine: Timed, everybody: dict[str, Timed]) -> Row:
        low, middle, high = (mine.seconds(q / 100) for q in (20, 50, 80))
        others = {name: timed.seconds() for name, timed in everybody.items() if timed is not mine}
        return {
            "p20_ms": low * 1e3, "p50_ms": middle * 1e3, "p80_ms": high * 1e3, "spread": (high - low) / middle,
            "samples": min(len(part.samples) for part in mine.parts.values()),
            "times_faster_than": {name: seconds / middle for name, seconds in others.items()},
            **self.figures(job, mine),
        }  # fmt: skip

    def _coverage(self, timed: Timed, progress: Progress) -> Row:
        whole = not timed.early and timed.rounds == self.rounds
        return {"rounds": timed.rounds, "of": self.rounds, "interleaved": self.interleaved and not timed.early,
                "cut_off": None if whole else progress.stopped or ENDED}  # fmt: skip

    def limits(self, flops_per_second: float, dtype: torch.dtype = torch.bfloat16) -> Row:
        """`mfu` of the data sheet and `fraction` of the large matmul in this run; None on a CPU."""
        if self.ceilings is None:
            return {"mfu": None, "fraction": None}
        sheet = SHEETS.get(torch.cuda.get_device_name())
        stated = sheet.bfloat16 if sheet and dtype == torch.bfloat16 else None
        return {"mfu": flops_per_second / stated if stated else None,
                "fraction": flops_per_second / self.ceilings.matmul[dtype]}  # fmt: skip

    def _tidy(self) -> None:
        """Forget what was compiled, too: only when nobody is held who goes on."""
        torch._dynamo.reset()
        self._free()

    def _free(self) -> None:
        gc.collect()
        if self.device.kind == "cuda":
            torch.cuda.empty_cache()

    def _write(self, job: Any, progress: Progress, name: str, status: str, why: str, **figures: Any) -> Row:
        row = {"kind": self.kind, **self.named(job, name), "status": status, "reason": why}
        progress.rows.pop(name, None)
        progress.rows[name] = self.log.write(row | figures)
        return progress.rows[name]

    def _say(self, row: Row, last: bool = True) -> None:
        text = self.text(row)
        print("; ".join(filter(None, (text, coverage_text(row)))) if last else f"so far: {text}", flush=True)


def coverage_text(row: Row) -> str:
    """In words, what a row rests on whose run was cut off; empty for others."""
    rests = row.get("coverage") or {}
    if not rests.get("cut_off"):
        return ""
    turns = "" if rests["interleaved"] else ", not by turns"
    return f"{rests['rounds']} of {rests['of']} rounds{turns}, cut off: {rests['cut_off']}"


def _give_back(ready: Ready) -> None:
    try:
        ready.release()
    except Exception as error:  # on a device that is lost, say
        print(f"its memory was not given back: {': '.join(status_of(error))}", flush=True)
