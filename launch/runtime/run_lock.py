"""The lock of a directory that a program writes into: `.lock` names the owning process, which holds a lock on it.

The lock is the system's (`lockf`), so that it ends with its process, however that ends. Where a file system has no
locks, host and process in the file decide.
"""

import errno
import fcntl
import json
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from common.files import make_directory, write_error
from common.records import Record
from launch.runtime import exit_status, process_table
from launch.runtime.processes import Processes

NAME = ".lock"
_PLAIN = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # never through a link to another's file, never waiting
_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_held: set[Path] = set()  # by this process: a lock of lockf does not exclude its own process


class DirectoryInUseError(ValueError):
    """A directory that another process writes into."""

    exit_status = exit_status.IN_USE


class Owner(Record):
    """The process that holds a directory. started: when, to be told from a later process of the same number."""

    host: str
    pid: int
    since: str
    started: str | None

    @classmethod
    def this_process(cls) -> "Owner":
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(host=socket.gethostname(), pid=os.getpid(), since=now, started=process_table.started(os.getpid()))

    def has_ended(self) -> bool:
        """Whether that is certain: on another host it is not."""
        return self.host == socket.gethostname() and process_table.started(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@contextmanager
def lock_directory(directory: Path, processes: Processes) -> Iterator[None]:
    """Lock `directory` (made if missing) for a run of these processes; the main one holds the lock for all.

    Raises DirectoryInUseError on every process where another run holds it, and WriteError where nothing can be written.
    A lock whose owner was killed is taken over, and that is said.
    """
    lock = error = None
    if processes.is_main:
        try:
            lock = _Lock.take(directory)
        except (DirectoryInUseError, OSError) as e:
            error = e
    processes.raise_on_all(error)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


@dataclass(frozen=True)
class LockState:
    """Who a directory's lock file names (None: damaged, as a kill may leave it), and whether that one still holds it.

    held: None where that cannot be told: no locks on its file system, and a process of another host.
    """

    owner: Owner | None
    held: bool | None


def read_lock(directory: Path) -> LockState | None:
    """The lock of a directory, without taking it or writing anything; None where there is no readable lock file."""
    path = directory / NAME
    try:
        if directory.resolve() in _held:  # opening and closing the file would give up this process's own lock
            return LockState(Owner.this_process(), True)
        handle = os.open(path, os.O_RDONLY | _PLAIN)
    except (OSError, ValueError):
        return None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return None
        owner = _read(handle)
        question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = struct.unpack_from(_FLOCK, fcntl.fcntl(handle, fcntl.F_GETLK, question))
        return LockState(owner, answer[0] != fcntl.F_UNLCK)
    except OSError:  # a file system without locks: host and process decide
        here = owner is not None and owner.host == socket.gethostname()
        return LockState(owner, not owner.has_ended() if owner and here else None)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class _Lock:
    """made: whether the directory was created for the lock; it is removed on release if nothing was written into it."""

    directory: Path
    handle: int
    made: bool

    @classmethod
    def take(cls, directory: Path) -> "_Lock":
        made = not directory.exists()
        directory = make_directory(directory).resolve()
        path = directory / NAME
        if directory in _held:
            raise DirectoryInUseError(_refusal(path, Owner.this_process()))
        try:
            handle, former = _open(path)
            os.truncate(handle, 0)
            os.pwrite(handle, Owner.this_process().model_dump_json().encode(), 0)
        except OSError as e:
            raise write_error(path, e) from None
        if former is not None:
            print(f"{directory} was left by {former}, which did not end in order: taken over")
        _held.add(directory)
        return cls(directory, handle, made)

    def release(self) -> None:
        _held.discard(self.directory)
        path = self.directory / NAME
        with suppress(OSError):  # the directory may have been removed, and the lock with it
            if os.path.samestat(path.stat(), os.fstat(self.handle)):
                path.unlink()
            if self.made and not any(self.directory.iterdir()):
                self.directory.rmdir()
        os.close(self.handle)


def _open(path: Path) -> tuple[int, Owner | None]:
    """A handle of the locked file, and the killed owner that left it, if any; raises DirectoryInUseError."""
    while True:
        new, handle = _create(path)
        try:
            _lock(path, handle, new)
            if os.path.samestat(path.stat(), os.fstat(handle)):
                return handle, None if new else _read(handle)
        except FileNotFoundError:  # its owner, ending, removed it between these lines: as if it had never been
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _create(path: Path) -> tuple[bool, int]:
    """Whether the file is new, and a handle of it."""
    while True:
        with suppress(FileExistsError):
            return True, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _PLAIN, 0o666)
        with suppress(FileNotFoundError):
            return False, os.open(path, os.O_RDWR | _PLAIN)


def _lock(path: Path, handle: int, new: bool) -> None:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        owner = _read(handle)
        if e.errno in (errno.EACCES, errno.EAGAIN):
            raise DirectoryInUseError(_refusal(path, owner)) from None
        if e.errno not in _NO_LOCKS:
            raise
        if not new and not (owner and owner.has_ended()):
            raise DirectoryInUseError(
                f"{_refusal(path, owner)} (its file system has no locks: if that has ended, remove {path})"
            ) from None


def _read(handle: int) -> Owner | None:
    """The owner that the file names; None where it is empty or damaged, as a kill may leave it."""
    try:
        return Owner.model_validate(json.loads(os.pread(handle, 1 << 12, 0)))
    except (ValueError, ValidationError, RecursionError):
        return None


def _refusal(path: Path, owner: Owner | None) -> str:
    text = f"{path.parent} is in use by {owner or 'another process'}"
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1"))
    if tasks != "1" and "RANK" not in os.environ:
        text += (
            f"; SLURM started {tasks} tasks, and each is a run of its own: start one (--ntasks=1) of a launcher, "
            "such as torchrun, per node"
        )
    return text
