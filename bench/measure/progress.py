"""State of a comparison: providers that have started, their times so far, and the rows written of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.measure.rows import Row
from bench.measure.timing import Iteration, Timing

#: What has cut off a row that is in the file when the process ends without a word: nothing has replaced it.
ENDED = "the process ended"


@dataclass
class Ready:
    """A provider that has started.

    Attributes:
        iterations: part → what is timed; the one part of most providers is called "".
        value: what is checked, such as a first loss; None where there is nothing to compare.
        about: further keys of its row.
        times: part → how often the whole that a row is about needs it; once where nothing is said.
        close: gives back what does not go by itself when `iterations` do.
        peak_gb: gigabytes of device memory that starting it took at most; None on a CPU.
        early: part → times just after it had started.
        late: part → times of all rounds so far.
    """

    iterations: dict[str, Iteration]
    value: Any = None
    about: Row = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    close: Callable[[], object] = lambda: None
    peak_gb: float | None = None
    early: dict[str, Timing] = field(default_factory=dict)
    late: dict[str, Timing] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, Timing]:
        """Times of all rounds, or else the early ones; empty where there are none."""
        return self.late if self.late and all(timing.samples for timing in self.late.values()) else self.early

    def seconds(self, q: float = 0.5) -> float:
        """Of the whole, at that quantile of its parts."""
        return sum(self.times.get(part, 1) * timing.quantile(q) for part, timing in self.parts.items())

    def release(self) -> None:
        """Let go of what is timed, and of its memory."""
        self.iterations.clear()
        close, self.close = self.close, lambda: None
        close()


@dataclass
class Progress:
    """State of one job.

    Attributes:
        shared: lives as long; providers may read files that go with it.
        ready: everybody who has started and was not found wrong, also those whose memory has been given back.
        stopped: why nothing more is timed.
        rows: provider → its row as last written.
        figures: provider → the figures in it.
    """

    shared: Any = None
    ready: dict[str, Ready] = field(default_factory=dict)
    stopped: str = ""
    rows: dict[str, Row] = field(default_factory=dict)
    figures: dict[str, Row] = field(default_factory=dict)

    def held(self) -> dict[str, Ready]:
        """Those that can be timed."""
        return {name: ready for name, ready in self.ready.items() if ready.iterations}

    def timed(self) -> dict[str, Ready]:
        """Those that have been."""
        return {name: ready for name, ready in self.ready.items() if ready.parts}


class PeakMemory:
    """`gigabytes` of device memory, at most at once within the context; None where there is no device."""

    def __init__(self, on_device: bool):
        self._on_device = on_device
        self.gigabytes: float | None = None

    def __enter__(self) -> "PeakMemory":
        if self._on_device:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._on_device:
            self.gigabytes = (torch.cuda.max_memory_allocated() - self._before) / 1e9
