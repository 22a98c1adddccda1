"""How far a contest has come: contenders that have started, what was timed of them, the memory they took."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.measure.rows import Row
from bench.measure.timing import Lap, Timing

Parts = dict[str, Timing]


@dataclass
class Ready:
    """A contender that has started.

    Attributes:
        laps: part → what is timed; the one part of most contenders is called "".
        times: part → how often the whole that a row is about needs it; once where nothing is said.
        value: what contenders are judged by, such as a first loss; None where there is nothing to compare.
        about: further keys of its row.
        peak_gb: gigabytes of device memory that starting it took at most; None on a CPU.
    """

    laps: dict[str, Lap]
    value: Any = None
    about: Row = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    peak_gb: float | None = None


@dataclass(frozen=True)
class Timed:
    """A contender and the times of its parts."""

    name: str
    ready: Ready
    parts: Parts

    def seconds(self, q: float = 0.5) -> float:
        """Of the whole, at that quantile of its parts."""
        return sum(self.ready.times.get(part, 1) * timing.quantile(q) for part, timing in self.parts.items())


@dataclass
class Progress:
    """How far a job has come: who has started, and what was timed of whom.

    `shared` lives as long: contenders may read files that go with it.
    """

    shared: Any = None
    ready: dict[str, Ready] = field(default_factory=dict)
    early: dict[str, Parts] = field(default_factory=dict)
    turns: dict[tuple[str, str], Timing] = field(default_factory=dict)
    stopped: str = ""
    reported: set[str] = field(default_factory=set)

    def drop(self, name: str) -> None:
        for where in (self.ready, self.early):
            where.pop(name, None)
        self.turns = {key: timing for key, timing in self.turns.items() if key[0] != name}

    def timed(self) -> dict[str, Timed]:
        """Contender → its times by turns, or the early ones where there are none; without those that have neither."""
        found = {}
        for name, ready in self.ready.items():
            parts = {part: self.turns[name, part] for part in ready.laps if self._measured(name, part)}
            if len(parts) == len(ready.laps):
                found[name] = Timed(name, ready, parts)
            elif name in self.early:
                found[name] = Timed(name, ready, self.early[name])
        return found

    def unreported(self, names: Iterable[str]) -> list[str]:
        """Those that were timed and have no row yet."""
        timed = self.timed()
        return [name for name in names if name in timed and name not in self.reported]

    def by_turns(self, parts: Parts) -> bool:
        return any(mine is measured for mine in parts.values() for measured in self.turns.values())

    def _measured(self, name: str, part: str) -> bool:
        return bool((name, part) in self.turns and self.turns[name, part].samples)


class PeakMemory:
    """`gigabytes` of device memory, at most at once within the context; None where there is no device."""

    def __init__(self, on_device: bool):
        self._on_device, self.gigabytes = on_device, None

    def __enter__(self) -> "PeakMemory":
        if self._on_device:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._on_device:
            self.gigabytes = (torch.cuda.max_memory_allocated() - self._before) / 1e9
