"""Deadlines and signals that end a measurement early, with its rows written."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class CutOff(BaseException):
    """A signal has come: raised wherever the process is at that moment, past any `except Exception`.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int):
        self.number = number
        super().__init__(signal.Signals(number).name)


@contextmanager
def stoppable() -> Iterator[None]:
    """Within the context the first SIGTERM or SIGINT raises `CutOff`; what comes after it is ignored.

    `timeout` sends its signal twice, to the process and to its group: the second must not end what the first began, nor
    must the end of the loaders' processes, of which torch makes an exception wherever this one is. They inherit the
    handler, and end as they would without it.
    """
    owner = os.getpid()

    def stop(number: int, frame: object) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        raise CutOff(number)

    before = {signal.SIGCHLD: signal.getsignal(signal.SIGCHLD)}
    before |= {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Deadline:
    """A reading of `clock`, in seconds, after which nothing is to be begun."""

    end: float = math.inf
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def after(cls, minutes: float, clock: Callable[[], float] = time.monotonic) -> "Deadline":
        return cls(clock() + 60 * minutes, clock)

    def passed(self, ahead: float = 0.0) -> bool:
        """Whether it will have passed so many seconds from now."""
        return self.clock() + ahead > self.end


NEVER = Deadline()
