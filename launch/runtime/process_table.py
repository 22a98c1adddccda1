"""What the system's table of processes (/proc of Linux) says of a process; elsewhere nothing is known of any."""

import os
from contextlib import suppress
from pathlib import Path


def name(pid: int) -> str:
    """The name of a process's program; "" where there is none."""
    return _read(pid, "comm").strip()


def command(pid: int) -> str:
    """A process's command line; "" where there is none."""
    return _read(pid, "cmdline").replace("\0", " ")


def parent(pid: int) -> int:
    """The process that started a process, 0 where there is none."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal (SIGSTOP, SIGTSTP); one that a debugger holds is not."""
    return _stat(pid)[:1] == ["T"]


def started(pid: int) -> str | None:
    """The boot and the clock tick that a process began at, which tell it from others of the same number."""
    with suppress(OSError):
        if fields := _stat(pid):
            return f"{_boot()}/{fields[19]}"
    return None


def namespace() -> str:
    """Names the table of processes that this process sees: that of its container on its machine."""
    with suppress(OSError):
        return f"{_boot()}/{os.readlink('/proc/self/ns/pid')}"
    return ""


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the state on; empty where there is no such process."""
    return _read(pid, "stat").rpartition(")")[2].split()


def _read(pid: int, file: str) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/{file}").read_text("utf-8", "replace")
    return ""
