"""The end of a process: with its parent, on a signal, and in order."""

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

EXIT_TIMEOUT = 20.0  # seconds that a process has to leave in order
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # SIGUSR1 is SLURM's warning, by --signal
#: Seconds in which a SIGINT is taken for a copy of the first: launchers send theirs within milliseconds, and nobody
#: presses Ctrl-C twice in so little time and means it.
COPY_SECONDS = 0.5
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


#: A child would write the numbers of its signals to its parent's pipe.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


class StopRequest:
    """SIGTERM, SIGUSR1 and SIGINT, while the block lasts, are kept for a loop to see: `number` is the first one.

    A second SIGINT calls `leave(SIGINT)`, which ends the process at once, whatever its main thread waits for. Terminals
    and launchers send a SIGINT of the same Ctrl-C each: those within `COPY_SECONDS` of the first signal are one wish.
    SIGTERM and SIGUSR1 may come any number of times, as schedulers repeat them while a checkpoint is written.

    Where `number` is set at the end of the block, the process is about to leave: further signals are ignored, unless an
    exception ends the block, after which all is as before it.

    Args:
        at_once: nothing needs to be saved: SIGTERM and SIGUSR1 call `leave` the first time, and the first SIGINT is
            Python's KeyboardInterrupt.
    """

    def __init__(self, leave: Callable[[int], object], *, at_once: bool = False, numbers: Sequence[int] = STOP_SIGNALS):
        self.number: int | None = None
        self._leave, self._at_once, self._numbers = leave, at_once, numbers

    def __enter__(self) -> "StopRequest":
        # Python runs handlers between two of the main thread's steps, and that may be inside a collective which never
        # ends; the system's own handler writes the number of each signal to this pipe, for a thread to read.
        self._signals, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        self._former = {number: signal.signal(number, self._take) for number in self._numbers}
        self._former_wakeup = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        signal.set_wakeup_fd(self._former_wakeup)
        leaving = self.number is not None and error is None
        for number, handler in self._former.items():
            signal.signal(number, signal.SIG_IGN if leaving else handler)
        os.write(self._wakeup, bytes(1))
        self._thread.join()
        os.close(self._signals)
        os.close(self._wakeup)

    def pass_on(self) -> None:
        """After the block: a signal that came in it and ended nothing comes again, to the handlers from before it."""
        if self.number is not None:
            signal.raise_signal(self.number)

    def agree(self, all_reduce_max: Callable[[int], int]) -> int | None:
        """The signal that all processes of a run stop by, where one of them got any; then it is `number` on each.

        SIGINT, the smallest number, comes before the others: who presses Ctrl-C wants no scheduler to start it again.

        all_reduce_max: gives the largest of all processes' numbers.
        """
        highest = all_reduce_max(signal.NSIG - self.number if self.number else 0)
        if highest:
            self.number = signal.NSIG - highest
        return self.number if highest else None

    def _take(self, number: int, frame) -> None:
        first = self.number is None
        if first:
            self.number = number
        if first and self._at_once and number == signal.SIGINT:
            raise KeyboardInterrupt

    def _watch(self) -> None:
        since = None
        while number := os.read(self._signals, 1)[0]:
            if number not in self._numbers:  # Python has handlers of its own for others
                continue
            now = time.monotonic()
            since = now if since is None else since
            again = now - since > COPY_SECONDS
            if again if number == signal.SIGINT else self._at_once:
                self._leave(number)


def exit_process(status: int, first: Callable[[], None] | None = None) -> NoReturn:
    """End this process with `status`, in order: call `first`, then what was registered for an exit, then flush.

    The interpreter is not taken down: it would wait for threads that may be reading what never comes, and threads of
    gloo and DeepSpeed, met while their libraries are destroyed, now and then abort a process whose work was all done.
    The process is gone within `EXIT_TIMEOUT`, also where one of these blocks or raises.
    """
    for number in STOP_SIGNALS:
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
