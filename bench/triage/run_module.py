"""Run a module as `python -m` does, and print tracebacks when its time is nearly up.

    python -m bench.triage.run_module SECONDS MODULE [ARGUMENT …]

After so many seconds the tracebacks of all threads go to stderr, and the module runs on: a compiler that hangs in C++
hears no signal, and is killed soon after. The process ends when the one that started it ends.
"""

import ctypes
import faulthandler
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def main() -> None:
    seconds, module = float(sys.argv[1]), sys.argv[2]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    faulthandler.enable()
    faulthandler.dump_traceback_later(seconds)
    sys.argv = sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
