"""Contenders of one job, judged, then timed by turns, and a row for each, also where the run is cut off.

`bench.step`, `bench.sampling`, `bench.tokenizer` and `bench.gemms` are such contests: each says how a contender is
made, when it is wrong, and what its row states. A contender is timed for a moment as soon as it has started, later all
of them by turns. When the time is up, or when a signal comes, everybody timed by then has a row that says what it
rests on.
"""

import gc
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from bench import roofline
from bench.measure import timing
from bench.measure.cutoff import NEVER, CutOff, Deadline
from bench.measure.progress import Parts, PeakMemory, Progress, Ready, Timed
from bench.measure.rows import Log, Row, clocks
from bench.measure.timing import Device, Lap

#: Most seconds of laps right after a contender has started: its row rests on them until all are timed by turns.
EARLY = 1.0
TIME_IS_UP = "the time is up"


class Job(Protocol):
    """What the rows of a contest share; its text says what is measured."""

    names: tuple[str, ...]


class Varied:
    """A job whose contenders are named variants."""

    variants: tuple[Any, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(variant.name for variant in self.variants)

    def variant(self, name: str) -> Any:
        return next(variant for variant in self.variants if variant.name == name)


@dataclass(frozen=True)
class Contest(ABC):
    """How rows are measured.

    Attributes:
        ceilings: None on a CPU, whose rows state no fraction of a limit.
        seconds: of samples, for each part of each contender.
        rounds: bursts that these are cut into, alternating with the others'.
        until: when to stop, in the middle of a job if need be.
    """

    device: Device
    log: Log
    ceilings: roofline.Ceilings | None
    seconds: float = 30.0
    rounds: int = 4
    until: Deadline = NEVER

    kind: ClassVar[str]

    # What a bench says of itself.

    @abstractmethod
    def named(self, job: Any, name: str) -> Row:
        """The keys that name a row, and what else is known of a contender before it starts."""

    def set_up(self, job: Any) -> Any:
        """What the contenders of a job share; given to `prepare` and `wrong`."""
        return None

    def order(self, job: Any) -> Iterable[str]:
        """In which order contenders start: those the others are judged by first."""
        return job.names

    @abstractmethod
    def prepare(self, job: Any, name: str, shared: Any) -> Ready:
        """Make a contender and warm it up. ImportError: it is not installed here."""

    def wrong(self, job: Any, values: Mapping[str, Any], shared: Any) -> dict[str, str]:
        """Contender → what is wrong with its value."""
        return {}

    @abstractmethod
    def figures(self, job: Any, timed: Timed) -> Row:
        """The numbers of a row beside those that all rows have."""

    def afterwards(self, job: Any, ready: Ready) -> Row:
        """What is looked at when everything has been timed; left out where the run is cut off by a signal."""
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

        Raises:
            CutOff: a signal came; the rows of whoever had been timed are written.
        """
        rows, progress, cut = [], Progress(), None
        try:
            self._measure(job, progress, rows)
        except CutOff as signal:
            cut, progress.stopped = signal, str(signal)
        while progress.unreported(job.names):
            try:
                self._report(job, progress, rows, look=cut is None)
            except CutOff as signal:  # there is one at most
                cut, progress.stopped = signal, progress.stopped or str(signal)
        progress.ready.clear()
        if cut is not None:
            raise cut
        self._tidy()  # not before: it forgets what was compiled
        return rows

    def _measure(self, job: Any, progress: Progress, rows: list[Row]) -> None:
        try:
            shared = progress.shared = self.set_up(job)
        except Exception as error:
            rows += [self._write(job, name, *_status(error)) for name in job.names]
            return
        left = list(self.order(job))
        while left and not self.until.passed():
            self._enter(job, left.pop(0), shared, progress, rows)
        if left:
            progress.stopped = TIME_IS_UP
            print(f"{TIME_IS_UP}, not measured: {job} {', '.join(left)}", flush=True)
        while progress.ready and not progress.turns and not self.until.passed():
            self._take_turns(job, progress, rows)

    def _enter(self, job: Any, name: str, shared: Any, progress: Progress, rows: list[Row]) -> None:
        try:
            with PeakMemory(self.device.kind == "cuda") as peak:
                ready = self.prepare(job, name, shared)
        except Exception as error:
            rows.append(self._write(job, name, *_status(error)))
            return
        ready.peak_gb = peak.gigabytes
        progress.ready[name] = ready
        try:
            for other, why in self.wrong(job, {n: r.value for n, r in progress.ready.items()}, shared).items():
                progress.drop(other)
                rows.append(self._write(job, other, "incorrect", why))
            if name in progress.ready:
                progress.early[name] = self._glance(ready.laps)
        except Exception as error:
            progress.drop(name)
            cause = error.__cause__ if isinstance(error, timing.LapFailed) else error
            rows.append(self._write(job, name, *_status(cause)))

    def _glance(self, laps: dict[str, Lap]) -> Parts:
        return timing.interleave(laps, self.device, min(EARLY, self.seconds / self.rounds), rounds=1)

    def _take_turns(self, job: Any, progress: Progress, rows: list[Row]) -> None:
        """Fill `progress.turns`; without anything in it where a lap has failed: the others begin anew, without it."""
        laps = {(name, part): lap for name, ready in progress.ready.items() for part, lap in ready.laps.items()}
        try:
            for progress.turns in timing.bursts(laps, self.device, self.seconds, self.rounds):
                if self.until.passed():
                    progress.stopped = TIME_IS_UP
                    break
        except timing.LapFailed as failure:
            progress.turns = {}
            progress.drop(failure.name[0])
            rows.append(self._write(job, failure.name[0], *_status(failure.__cause__)))

    def _report(self, job: Any, progress: Progress, rows: list[Row], look: bool) -> None:
        """Write the rows of all that was timed; look: there is time for what is looked at afterwards."""
        timed = progress.timed()
        state = clocks() if self.device.kind == "cuda" and look else {}
        for name in progress.unreported(job.names):
            ready = timed[name].ready
            told = self._figures(job, timed[name], timed) | {"rests_on": self._rests_on(timed[name].parts, progress)}
            told |= {"peak_gb": ready.peak_gb, "clocks": state, **ready.about}
            if look:
                try:
                    told |= self.afterwards(job, ready)
                except Exception as error:
                    told["afterwards"] = ": ".join(_status(error))
            rows.append(self._write(job, name, "ok", "", **told))
            progress.reported.add(name)

    def _figures(self, job: Any, mine: Timed, everybody: dict[str, Timed]) -> Row:
        low, middle, high = (mine.seconds(q / 100) for q in (20, 50, 80))
        others = {name: timed.seconds() for name, timed in everybody.items() if timed is not mine}
        return {
            "p20_ms": low * 1e3, "p50_ms": middle * 1e3, "p80_ms": high * 1e3, "spread": (high - low) / middle,
            "samples": min(len(part.samples) for part in mine.parts.values()),
            "times_faster_than": {name: seconds / middle for name, seconds in others.items()},
            **self.figures(job, mine),
        }  # fmt: skip

    def _rests_on(self, parts: Parts, progress: Progress) -> Row:
        bursts, by_turns = min(part.bursts for part in parts.values()), progress.by_turns(parts)
        whole = by_turns and bursts == self.rounds
        return {"bursts": bursts, "of": self.rounds, "by_turns": by_turns,
                "cut_off": None if whole else progress.stopped or TIME_IS_UP}  # fmt: skip

    def limits(self, flops_per_second: float, dtype: torch.dtype = torch.bfloat16) -> Row:
        """`mfu` of the data sheet and `fraction` of the large matmul in this run; None on a CPU."""
        if self.ceilings is None:
            return {"mfu": None, "fraction": None}
        sheet = roofline.SHEETS.get(torch.cuda.get_device_name())
        stated = sheet.bfloat16 if sheet and dtype == torch.bfloat16 else None
        return {"mfu": flops_per_second / stated if stated else None,
                "fraction": flops_per_second / self.ceilings.matmul[dtype]}  # fmt: skip

    def _tidy(self) -> None:
        torch._dynamo.reset()
        gc.collect()
        if self.device.kind == "cuda":
            torch.cuda.empty_cache()

    def _write(self, job: Any, name: str, status: str, why: str, **figures: Any) -> Row:
        row = {"kind": self.kind, **self.named(job, name), "status": status, "reason": why}
        row = self.log.write(row | figures)
        print("; ".join(filter(None, (self.text(row), rests_on(row)))), flush=True)
        return row


def rests_on(row: Row) -> str:
    """In words, what a row rests on whose run was cut off; empty for others."""
    rests = row.get("rests_on") or {}
    if not rests.get("cut_off"):
        return ""
    turns = f"{rests['bursts']} of {rests['of']} bursts" if rests["by_turns"] else "1 burst just after it had started"
    return f"{turns}, cut off: {rests['cut_off']}"


def _status(error: BaseException) -> tuple[str, str]:
    if isinstance(error, ImportError):
        return "unavailable", f"not installed: {error}"
    return "failed", f"{type(error).__name__}: {error}"[:300]


def work_through(contest: Contest, todo: list[Any]) -> int:
    """Run jobs until the time is up, judged by the longest so far; the exit status: 1 if a contender of ours failed."""
    clock, longest, rows = contest.until.clock, 0.0, []
    for number, job in enumerate(todo):
        begun = clock()
        if contest.until.passed(longest):
            print(f"time is up, not measured: {', '.join(map(str, todo[number:]))}")
            break
        rows += contest.run(job)
        longest = max(longest, clock() - begun)
    contest.conclude(rows)
    return int(any(row["status"] in ("incorrect", "failed") for row in rows))
