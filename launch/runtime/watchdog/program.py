"""The program of a watchdog: settings, then messages, come over standard input, a socket."""

import json
import os
import resource
import signal
import socket
import threading
from contextlib import suppress

from launch.runtime.watchdog.main_process import MainWatchdog
from launch.runtime.watchdog.member import Settings
from launch.runtime.watchdog.others import PeerWatchdog
from launch.runtime.wire import Wire

#: Sent to all processes of a terminal, a launcher or a job: the process that is watched decides what they mean.
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)
SAY_TIMEOUT = 1.0  # seconds


def main(settings: str) -> None:
    """Run the watchdog of these settings (JSON). Signals are still blocked, by the process that started this one."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    with suppress(OSError, ValueError):  # a connection to each of thousands of processes
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    given = Settings(**json.loads(settings))
    process = Wire(socket.socket(fileno=0))
    (PeerWatchdog if given.rank else MainWatchdog)(given, process, say).run()


def say(text: str) -> None:
    """Print to standard error, in one piece; where that is a pipe whose reader is stopped, the others are told all the
    same."""
    writer = threading.Thread(target=_write, args=[text], daemon=True)
    writer.start()
    writer.join(SAY_TIMEOUT)


def _write(text: str) -> None:
    with suppress(OSError):  # closed: nobody listens
        os.write(2, f"{text}\n".encode(errors="replace"))
