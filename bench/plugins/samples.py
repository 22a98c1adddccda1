"""What the one clock measured, given to pytest-benchmark sample by sample, for its comparison tools.

pytest-benchmark would call a function again and again from Python, one provider after another; here providers run by
turns, in graphs, and between events of the device. So the measuring is done before, and its samples are played back.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from bench import ops, step
from bench.gate import compare
from bench.measure.progress import Timed
from bench.measure.rows import Row
from bench.measure.timing import Timing


class Replay:
    """A timer that tells pairs of times whose differences are the samples."""

    __name__ = "bench.measure.timing"

    def __init__(self) -> None:
        self._marks: Iterator[float] = iter(())

    def script(self, samples: list[float]) -> None:
        self._marks = (mark for sample in samples for mark in (0.0, sample))

    def __call__(self) -> float:
        return next(self._marks)


#: The timer that tests of this kind are marked with.
REPLAY = Replay()


def play(benchmark: Any, row: Row, timing: Timing | None) -> None:
    """Give a row's samples, seconds of one call each, to pytest-benchmark; skip or fail a row that has none."""
    said = f"{row['status']}: {row['reason']}"
    if row["status"] in compare.WRONG and compare.mine(row):
        pytest.fail(said, pytrace=False)
    if timing is None:
        pytest.skip(said)
    names = ("gpu", "revision", "fraction", "bound", "method", "calls", "images_per_second", "mfu", "peak_gb")
    benchmark.extra_info |= {name: row[name] for name in names if name in row}
    REPLAY.script(timing.samples)
    benchmark.pedantic(lambda: None, rounds=len(timing.samples))


class Last:
    """Remembers the last result of a function: neighbouring tests ask for parts of one measurement."""

    def __init__(self, function: Callable[[Hashable], Any]):
        self._function, self._asked, self._result = function, None, None

    def __call__(self, question: Hashable) -> Any:
        if question != self._asked:
            self._result = None
            self._asked, self._result = question, self._function(question)
        return self._result


@dataclass(frozen=True)
class OpBench(ops.OpComparison):
    """Keeps the samples of (direction, provider)."""

    kept: dict[tuple[str, str], Timing] = field(default_factory=dict)

    def measured(self, job: ops.OpJob) -> dict[tuple[str | None, str], tuple[Row, Timing | None]]:
        """(direction, provider) → row, and its samples if it has some."""
        self.kept.clear()
        rows = self.run(job)
        return {(row["direction"], row["provider"]): (row, self.kept.get((row["direction"], row["provider"])))
                for row in rows}  # fmt: skip

    def _direction(self, job: ops.OpJob, expected: Any, present: list, work: ops.Work) -> Iterator[Row]:
        keeping = _Work(work.cost, work.direction, work.dtype, work.ceilings, kept=self.kept)
        return super()._direction(job, expected, present, keeping)


@dataclass(frozen=True)
class _Work(ops.Work):
    kept: dict[tuple[str, str], Timing] = field(kw_only=True)

    def figures(self, name: str, timings: dict[str, Timing]) -> Row:
        self.kept[self.direction, name] = timings[name]
        return super().figures(name, timings)


def row_of(found: dict, direction: str, provider: str) -> tuple[Row, Timing | None]:
    """What was measured of a provider in a direction, or what was said of all its directions, or of the whole job."""
    keys = ((direction, provider), (None, provider), (None, "all"))
    return next(found[key] for key in keys if key in found)


@dataclass(frozen=True)
class StepBench(step.StepComparison):
    """Keeps the samples of variants."""

    kept: dict[str, Timing] = field(default_factory=dict)

    def measured(self, job: step.StepJob) -> dict[str, tuple[Row, Timing | None]]:
        """Variant → row, and its samples if it has some."""
        self.kept.clear()
        return {row["variant"]: (row, self.kept.get(row["variant"])) for row in self.run(job)}

    def figures(self, job: step.StepJob, timed: Timed) -> Row:
        self.kept[timed.name] = timed.parts[""]
        return super().figures(job, timed)
