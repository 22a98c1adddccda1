"""The statuses that a program of this project ends with, and which of them a scheduler should start again."""

import signal

DONE = 0
FAULT = 1  # an exception that is a fault of the program: its traceback is printed
ERROR = 2  # usage, data, disk: the same command ends the same way until somebody acts
NUMERICAL = 65  # EX_DATAERR: training stopped as its numbers are not finite
IN_USE = 69  # EX_UNAVAILABLE: another run, maybe one that is just ending, has the directory or the port
LOST_PEER = 74  # EX_IOERR: another process of the run was killed, is stopped, or cannot be reached
STOPPED = 75  # EX_TEMPFAIL: stopped by SIGTERM or SIGUSR1 after a checkpoint
INTERRUPTED = 128 + signal.SIGINT  # stopped by SIGINT after a checkpoint; a second SIGINT leaves at once

IN_ORDER = (DONE, STOPPED, INTERRUPTED)  # after all processes have agreed on it


def of_signal(number: int | None) -> int:
    """The status of a run that this signal ended after a checkpoint; None: of one that no signal ended."""
    if number is None:
        return DONE
    return INTERRUPTED if number == signal.SIGINT else STOPPED
