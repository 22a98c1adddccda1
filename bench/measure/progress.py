"""How far a comparison has come: providers that have started, what was timed of them, the memory they took."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.measure.rows import Row
from bench.measure.timing import Iteration, Timing

Parts = dict[str, Timing]
#: What a row rests on that is in the file when the process ends without a word: nothing has replaced it.
ENDED = "the process ended"


@dataclass
class Ready:
    """A provider that has started.

    Attributes:
        iterations: part → what is timed; the one part of most providers is called "".
        times: part → how often the whole that a row is about needs it; once where nothing is said.
        close: gives back what does not go by itself when `iterations` do.
        value: what providers are checked against, such as a first loss; None where there is nothing to compare.
        about: further keys of its row.
        peak_gb: gigabytes of device memory that starting it took at most; None on a CPU.
    """

    iterations: dict[str, Iteration]
    value: Any = None
    about: Row = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    close: Callable[[], object] = lambda: None
    peak_gb: float | None = None

    def release(self) -> None:
        """Let go of what is timed, and of its memory."""
        self.iterations.clear()
        close, self.close = self.close, lambda: None
        close()


@dataclass(frozen=True)
class Timed:
    """A provider and the times of its parts; `early`: just after it had started."""

    name: str
    ready: Ready
    parts: Parts
    early: bool = False

    @property
    def rounds(self) -> int:
        return min(part.rounds for part in self.parts.values())

    def seconds(self, q: float = 0.5) -> float:
        """Of the whole, at that quantile of its parts."""
        return sum(self.ready.times.get(part, 1) * timing.quantile(q) for part, timing in self.parts.items())


@dataclass
class Progress:
    """How far a job has come: who has started, what was timed of whom, and what has been written of it.

    Attributes:
        shared: lives as long; providers may read files that go with it.
        ready: everybody who has started and was not found wrong, also those whose memory has been given back.
        early: provider → times just after it had started.
        late: (provider, part) → times of all rounds so far.
        stopped: why nothing more is timed.
        rows: provider → its row as last written.
        told: provider → the figures in it.
    """

    shared: Any = None
    ready: dict[str, Ready] = field(default_factory=dict)
    early: dict[str, Parts] = field(default_factory=dict)
    late: dict[tuple[str, str], Timing] = field(default_factory=dict)
    stopped: str = ""
    rows: dict[str, Row] = field(default_factory=dict)
    told: dict[str, Row] = field(default_factory=dict)

    def held(self) -> dict[str, Ready]:
        """Those that can be timed."""
        return {name: ready for name, ready in self.ready.items() if ready.iterations}

    def values(self) -> dict[str, Any]:
        return {name: ready.value for name, ready in self.ready.items()}

    def drop(self, name: str) -> Ready | None:
        """Take a provider out."""
        self.late = {key: timing for key, timing in self.late.items() if key[0] != name}
        self.early.pop(name, None)
        return self.ready.pop(name, None)

    def timed(self) -> dict[str, Timed]:
        """Provider → its times of all rounds, or else the early ones; without those that have neither."""
        found = {}
        for name, ready in self.ready.items():
            parts = {part: timing for (whose, part), timing in self.late.items() if whose == name}
            if parts and all(timing.samples for timing in parts.values()):
                found[name] = Timed(name, ready, parts)
            elif name in self.early:
                found[name] = Timed(name, ready, self.early[name], early=True)
        return found


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
