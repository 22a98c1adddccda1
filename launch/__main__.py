"""`python -m launch <program> …`, and the same under a launcher: `deepspeed --module launch <program> …`."""

import errno
import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import NoReturn

from launch.runtime import exit_status, launcher, packages
from launch.runtime.lifetime import STOP_SIGNALS, StopRequest, exit_process

PROGRAMS = {
    "train": "train a tokenizer or a LightningDiT: train vavae|lightningdit CONFIG [key=value …] [--dry-run]",
    "extract": "encode images into latents: extract CONFIG [key=value …]",
    "sample": "generate images: sample CONFIG [key=value …]",
    "decode": "images of latents: decode --latents DIR --tokenizer FILE --output DIR",
    "show": "pictures: show interpolation|denoising CONFIG, show nearest --samples DIR --images DIR",
    "sweep": "which settings sample best: sweep CONFIG sample.cfg_scale=1,2,4 … [--figure fid]",
    "evaluate": "measure samples (FID, KID, FDD …), reconstructions or latents; write a reference",
    "export": "write weights as safetensors + JSON and as a published .pt",
    "compare": "loss curves of runs beside each other, or beside the published one: compare RUN [RUN …] [--published]",
    "compare-results": "figures of evaluations, samples and sweeps side by side, and which settings differ",
    "gallery": "one HTML page of runs: samples, curves, evaluation, configs, ops, provenance: gallery RUN [RUN …]",
    "status": "where the runs below a directory stand: status DIR",
    "scaling": "time, bytes and failures on many GPUs, on paper: scaling CONFIG --gpus 8,64,1024",
    "quickstart": "every stage on handwritten digits, in minutes",
    "replay": "compute what stopped a run again: replay DUMP [key=value …]",
    "doctor": "what this machine has, and which backend each op would use",
}


#: Run as one process.
SINGLE_PROCESS = (
    "show",
    "export",
    "compare",
    "compare-results",
    "gallery",
    "status",
    "scaling",
    "quickstart",
    "replay",
)
ORDER_PATIENCE = 10.0  # seconds in which all are made to leave by a process that knows more of the error, and says it
_ending = False  # an error ends this process


def main(argv: list[str]) -> int:
    """Run one program; returns the exit status. A user's mistake is one line, not a traceback."""
    argv = [a for a in argv if not a.startswith("--local_rank")]  # launchers add it; LOCAL_RANK says the same
    try:
        return _program(argv)
    except BrokenPipeError:  # the reader of standard output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        _end_all(128 + signal.SIGPIPE, "the reader of standard output has closed it", None)
        return 128 + signal.SIGPIPE
    except (ValueError, OSError, RuntimeError) as e:
        if os.environ.get("LIGHTNINGDIT_TRACEBACK") or not _is_user_error(e):
            raise
        return _end_with_error(e)


def _program(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m launch PROGRAM …\n")
        print("\n".join(f"  {name:<16}{text}" for name, text in PROGRAMS.items()))
        return 0 if argv else 2
    if argv[0] not in PROGRAMS:
        print(f"error: unknown program {argv[0]!r}; programs: {', '.join(PROGRAMS)}", file=sys.stderr)
        return 2
    if argv[0] != "doctor" and (foreign := packages.foreign_packages()):  # the doctor says more
        return _refuse(next(iter(foreign.values())))
    if argv[0] in SINGLE_PROCESS and (env := launcher.launch_environment()) is not None and env.world_size > 1:
        error = launcher.LaunchError(
            f"{argv[0]} runs as one process, and WORLD_SIZE is {env.world_size}: start it with `python -m launch`"
        )
        error.reported_by_main = True
        raise error
    _configure_logging()
    try:
        program = importlib.import_module(f"launch.{argv[0].replace('-', '_')}")
    except ModuleNotFoundError as e:
        name = (e.name or "").partition(".")[0]
        if name in ("launch", *packages.PACKAGES) or os.environ.get("LIGHTNINGDIT_TRACEBACK"):
            raise
        return _refuse(f"{sys.executable} has no package {name}; `python -m launch doctor` says what else it lacks")
    return program.main(argv[1:])


def _refuse(reason: str) -> int:
    """Say why this installation can run nothing → the status."""
    print(f"error: {reason}", file=sys.stderr)
    if os.environ.get("WORLD_SIZE", "1") != "1":  # those of other machines may be whole
        with suppress(ImportError):
            importlib.import_module("launch.runtime.processes")
        _announce(2, reason)
    return 2


def run(argv: list[str]) -> NoReturn:
    """Run one program as this process and exit with its status, also after an exception or when the launcher ends."""
    together = False
    try:
        _open_streams()
        # Until a training loop takes over; without SIGINT where a shell had it ignored, for a background command.
        interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        numbers = STOP_SIGNALS if interrupts else (signal.SIGTERM, signal.SIGUSR1)
        StopRequest(_leave_at_once, at_once=True, numbers=numbers).__enter__()
        launcher.exit_with_launcher()
        status = main(argv)
        together = status in exit_status.IN_ORDER
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        together = status == 0
        if status:
            _end_all(status, "see its usage", None)
    except KeyboardInterrupt:
        status = exit_status.INTERRUPTED
        _end_all(status, "interrupted", lambda: print("interrupted", file=sys.stderr))
    except BaseException as e:
        status = exit_status.FAULT
        _end_all(status, f"{type(e).__name__}: {e}", partial(_print_fault, e))
    # After a failure the process group is not destroyed: peers wait for this process in another collective.
    together = together and "launch.training.engine" in sys.modules
    exit_process(status, sys.modules["launch.training.engine"].stop_processes if together else None)


def _end_with_error(error: Exception) -> int:
    """Say a user's error in one line, unless another process of the run does → the status."""
    from launch.runtime import heartbeat  # here and below: late, as `foreign_packages` is asked first what is ours

    status, told = _status(error), getattr(error, "reported_by_main", False)
    mute = told and _rank() != 0
    if (status_of_peer := getattr(error, "status_of_peer", None)) is not None:  # it has said why
        return status_of_peer
    if mute or status == exit_status.LOST_PEER:  # the main process is yet to say it, or the watchdog which one is lost
        heartbeat.await_order(ORDER_PATIENCE)
    text = _printable(_message(error))
    who = "" if told else _who()
    say = partial(print, f"error: {who}{text}\n(LIGHTNINGDIT_TRACEBACK=1 shows where)", file=sys.stderr)
    _end_all(status, text, None if mute else say)
    return status


def _end_all(status: int, reason: str, say: Callable[[], None] | None) -> None:
    global _ending
    from launch.runtime import heartbeat

    _ending = True
    heartbeat.end_all(status, reason, say)
    _announce(status, reason)


def _announce(status: int, reason: str) -> None:
    """Tell processes that wait to meet this one, if any."""
    global _ending
    _ending = True
    if "launch.runtime.processes" in sys.modules:
        sys.modules["launch.runtime.processes"].announce_failure(status, reason)


def _leave_at_once(number: int) -> None:
    if not _ending:
        from launch.runtime import heartbeat

        heartbeat.leave_at_once(number)
    elif "launch.runtime.processes" in sys.modules:  # with a status that says more, but now
        sys.modules["launch.runtime.processes"].hurry.set()


def _print_fault(error: BaseException) -> None:
    if who := _who():
        print(f"{who.removesuffix(': ')} failed:", file=sys.stderr)
    sys.excepthook(type(error), error, error.__traceback__)


def _who() -> str:
    """This process among several; "" where it is the only one."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return ""
    return f"rank {_rank()} (process {os.getpid()} on {socket.gethostname()}): "


def _rank() -> int:
    """The rank, also where the launcher's variables are wrong, which may be the error."""
    with suppress(launcher.LaunchError):
        return launcher.rank()
    return 0


def _open_streams() -> None:
    """Have all three standard streams, of which the two to print to replace characters that their encoding lacks.

    Closed ones are given to /dev/null: a file of ours would take their places, and take what is printed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free, so this one
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")


def _configure_logging() -> None:
    """Let the main process's packages say what they chose and left out; the others only warn."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(handlers=[handler])
    level = logging.INFO if launcher.rank() == 0 else logging.WARNING
    for package in ("common", "kernels", "lightningdit", "vavae", "launch"):
        logging.getLogger(package).setLevel(level)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _printable(super().format(record))


def _printable(text: str) -> str:
    """Much of what is said is text of files: what a terminal would obey in it comes as escapes."""
    from common.text import printable

    return printable(text, lines=True)


def _message(error: Exception) -> str:
    from pydantic import ValidationError

    from common.sections import describe

    if _lost_peer(error):
        first_line = str(error).partition("\n")[0]
        return (
            f"another process of this run has ended or does not answer; what it or the launcher says tells why "
            f"({first_line})"
        )
    if isinstance(error, ValidationError):
        return describe(error)
    if isinstance(error, OSError) and error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"cannot write to standard output: {error.strerror}"  # every file that is written has its name there
    return str(error)


def _status(error: Exception) -> int:
    from launch.training.optimizer import NonFiniteError

    if isinstance(error, NonFiniteError):
        return exit_status.NUMERICAL
    if (status := getattr(error, "exit_status", None)) is not None:
        return status
    return exit_status.LOST_PEER if _lost_peer(error) else exit_status.ERROR


def _is_user_error(error: Exception) -> bool:
    """Whether the message says it all; other RuntimeErrors are faults, and their traceback is wanted."""
    from common.files import DownloadError
    from kernels import BackendUnavailable
    from launch.training.optimizer import NonFiniteError

    ours = not isinstance(error, RuntimeError) or isinstance(error, BackendUnavailable | DownloadError | NonFiniteError)
    return ours or _lost_peer(error)


def _lost_peer(error: Exception) -> bool:
    """Whether gloo or NCCL report that another process of the run has ended or does not answer."""
    signs = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Socket closed",
        "Timed out waiting",
        "ncclRemoteError",
    )
    return isinstance(error, RuntimeError) and "RANK" in os.environ and any(sign in str(error) for sign in signs)


if __name__ == "__main__":
    run(sys.argv[1:])
