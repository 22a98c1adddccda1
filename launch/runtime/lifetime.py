"""The end of a process: with its parent, on a signal, and in order."""

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

EXIT_TIMEOUT = 20.0  # seconds that a process has to leave in order
#: Seconds in which another signal is taken for a launcher's copy of the first.
_REPEAT_SECONDS = {signal.SIGTERM: 10.0, signal.SIGINT: 2.0}
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def signal_on_parent_exit(number: int, parent: int) -> None:
    """Have the system (Linux) send this process a signal when its parent ends, to be exact the thread that started it.

    Args:
        number: the signal; it is sent at once where `parent`, the process that started this one, is already gone.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        signal.raise_signal(number)


class StopRequest:
    """SIGTERM and SIGINT, while the block lasts, are kept for a loop to see: `number` is the first one.

    Terminals, schedulers and launchers signal a process several times for one wish to end it. So a SIGTERM within 10 s
    of the first signal, and a SIGINT within 2 s, change nothing; a later one ends the process at once.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.number: int | None = None
        self._clock, self._since = clock, 0.0

    def __enter__(self) -> "StopRequest":
        self._former = {number: signal.signal(number, self._take) for number in _REPEAT_SECONDS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame) -> None:
        if self.number is None:
            self.number, self._since = number, self._clock()
        elif self._clock() - self._since > _REPEAT_SECONDS[number]:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def exit_process(status: int, first: Callable[[], None] | None = None) -> NoReturn:
    """End this process with `status`, in order: call `first`, then what was registered for an exit, then flush.

    The interpreter is not taken down: it would wait for threads that may be reading what never comes, and threads of
    gloo and DeepSpeed, met while their libraries are destroyed, now and then abort a process whose work was all done.
    The process is gone within `EXIT_TIMEOUT`, also where one of these blocks or raises.
    """
    for number in _REPEAT_SECONDS:
        signal.signal(number, signal.SIG_IGN)
    end = threading.Timer(EXIT_TIMEOUT, os._exit, [status or 1])
    end.daemon = True
    end.start()
    for step in (first, atexit._run_exitfuncs, sys.stdout.flush, sys.stderr.flush):
        try:
            if step is not None:
                step()
        except BaseException:
            status = status or 1
            traceback.print_exc()
    os._exit(status)
