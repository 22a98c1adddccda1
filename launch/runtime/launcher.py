"""The launcher that started this process (deepspeed, torchrun): its environment variables, and ending with it."""

import logging
import os
import select
import signal
import threading
from contextlib import suppress
from dataclasses import dataclass

from launch.runtime import process_table
from launch.runtime.lifetime import signal_on_parent_exit

log = logging.getLogger(__name__)
LAUNCHER_GRACE = 30.0  # seconds that DeepSpeed's launcher and torchrun give a process to end
_warned = False
_LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")  # set by torchrun and by DeepSpeed's launcher
_SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "fish", "tcsh", "csh"}
_INIT_PROCESSES = {"systemd", "init", "tini", "dumb-init", "docker-init", "catatonit"}  # they adopt orphans


class LaunchError(ValueError):
    """The environment does not say how the processes of a run meet, or they do not meet."""


@dataclass(frozen=True)
class LaunchEnvironment:
    """Rank of this process in a run, and the address at which the run's processes meet."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int


def launch_environment() -> LaunchEnvironment | None:
    """The launcher's environment variables, None without one; raises LaunchError, naming a variable that is invalid."""
    if "RANK" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
        if (local := os.environ.get("LOCAL_RANK", "0")) != "0":
            raise LaunchError(
                f"LOCAL_RANK is {local!r}, but RANK is not set: a launcher (deepspeed, torchrun) sets both"
            )
        return None
    world_size = _number("WORLD_SIZE", 1, None)
    rank = _number("RANK", 0, world_size - 1)
    local_rank = _number("LOCAL_RANK", 0, world_size - 1)
    address = os.environ.get("MASTER_ADDR", "").strip()
    if not address:
        raise LaunchError(
            f"RANK is {rank} of WORLD_SIZE {world_size}, but MASTER_ADDR does not say where they meet: a "
            "launcher (deepspeed, torchrun) sets it to the name of the machine of rank 0"
        )
    return LaunchEnvironment(rank, world_size, local_rank, address, _number("MASTER_PORT", 1, 65535))


def accelerator(*, gpus_here: bool) -> str:
    """The device, cuda or cpu: of DS_ACCELERATOR, else what is here; raises LaunchError for what is not here."""
    asked = os.environ.get("DS_ACCELERATOR", "cuda" if gpus_here else "cpu")
    if asked not in ("cpu", "cuda"):
        raise LaunchError(f"DS_ACCELERATOR is {asked!r}: set it to cpu or cuda, or not at all")
    if asked == "cuda" and not gpus_here:
        raise LaunchError(
            "DS_ACCELERATOR is 'cuda', but this process sees no GPU (CUDA_VISIBLE_DEVICES "
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}): set it to cpu, or not at all"
        )
    return asked


def rank() -> int:
    """This process's rank, 0 where there is no launcher."""
    return _number("RANK", 0, None) if "RANK" in os.environ else 0


def _number(name: str, least: int, most: int | None) -> int:
    text, allowed = os.environ.get(name), f"from {least} to {most}" if most is not None else f"of at least {least}"
    with suppress(TypeError, ValueError):
        if (value := int(text)) >= least and (most is None or value <= most):
            return value
    found = f"{name} is {text!r}" if text is not None else f"{name} is not set"
    raise LaunchError(
        f"{found}: a launcher (deepspeed, torchrun) sets it to a whole number {allowed}; without one, "
        "RANK, WORLD_SIZE and LOCAL_RANK are not set"
    )


def exit_with_launcher() -> None:
    """Have this process get SIGTERM when the launcher that started it ends; without a launcher nothing is done.

    DeepSpeed's runner is followed, too: its launcher, which is our parent, does not notice that it has gone. Nor does
    the runner take a launcher that was killed for a failure (it ends with 0), so it is signalled.
    """
    parent = os.getppid()
    if "RANK" not in os.environ or _started_by_nohup(parent):
        return
    signal_on_parent_exit(signal.SIGTERM, parent)
    if process_table.name(parent) in _INIT_PROCESSES and any(name in os.environ for name in _LAUNCHER_VARIABLES):
        signal.raise_signal(signal.SIGTERM)  # it had gone before we looked
    if "deepspeed.launcher.launch" in process_table.command(parent):
        runner = process_table.parent(parent)
        if "deepspeed" in process_table.command(runner):
            _signal_when_ended(runner, os.getpid())
            _signal_when_ended(parent, runner)


def warn_of_slow_checkpoint(seconds: float) -> None:
    """Say, once, where a checkpoint takes longer than launchers wait between a signal and a kill."""
    global _warned
    if seconds > LAUNCHER_GRACE and not _warned and "RANK" in os.environ:
        _warned = True
        log.warning(
            "a checkpoint took %.0f s, but launchers kill a process %.0f s after they signal it: one begun at "
            "a signal would be lost; signal the processes, not the launcher",
            seconds,
            LAUNCHER_GRACE,
        )


def _started_by_nohup(parent: int) -> bool:
    """Whether a shell started this process by nohup."""
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and process_table.name(parent) in _SHELLS


def _signal_when_ended(pid: int, other: int) -> None:
    """Send SIGTERM to the process `other` when the process `pid` ends."""
    try:
        watched, told = os.pidfd_open(pid), os.pidfd_open(other)
    except (AttributeError, OSError):  # no Linux of the last years, or one of them has just ended
        return
    poll = select.poll()
    poll.register(watched, select.POLLIN)

    def wait() -> None:
        poll.poll()
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(told, signal.SIGTERM)

    threading.Thread(target=wait, name=f"follow process {pid}", daemon=True).start()
