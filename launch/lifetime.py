"""How a process ends: with its parent, and in order. Linux; elsewhere processes do not follow their parent."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def follow_parent(number: int, parent: int) -> None:
    """Have the system send this process a signal when its parent ends (the thread that started it, to be exact).

    Args:
        number: the signal; it is sent at once where `parent`, the process that started this one, is already gone.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        signal.raise_signal(number)
