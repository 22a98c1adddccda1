"""Atomic writes, and reads of regular files and JSON with errors that name the file.

Every file of this project that another run may read is written by `atomic_write`; a test finds other writers. Needs
the standard library alone.
"""

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from common.file_types import as_text

JSON_LIMIT = 256 * 2**20  # bytes; the manifest of a million shards is smaller
_BLOCK = 1 << 24
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
#: Errors that say nothing of what a file holds: of a network file system, of permissions, of this process's limits.
_UNREACHABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EINTR,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENOTCONN,
    errno.ECONNREFUSED,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
}
_LFS_POINTER = b"version https://git-lfs.github.com/"


class FileError(ValueError):
    """A file that cannot be read, or is not what it should be; the message names it."""


class UnreachableError(FileError):
    """The system does not tell what there is (a stale handle, no permission, too many open files).

    The file itself may be whole.
    """


class DownloadError(RuntimeError):
    """Something that is downloaded where no file is named could not be; the message says which key names a file."""


class WriteError(OSError):
    """A file that could not be written; the message names it and the reason. Nothing that was there is lost."""


@contextmanager
def atomic_write(path: Path | str) -> Iterator[BinaryIO]:
    """A binary file to write that takes the name `path` when the block ends well: whole and on the disk, or not at all.

    Until then it lies beside `path` under a temporary name. It has the permissions that the umask leaves. A link stays
    one, and what it leads to is replaced.

    Raises WriteError, naming `path`, where the system refuses (full disk, no such folder, no permission), or what has
    that name is no file but a device, say.
    """
    path = _to_replace(Path(path))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except BaseException as e:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(e, OSError) and e.filename in (None, str(temporary)):
            raise write_error(path, e) from None
        raise


def _to_replace(path: Path) -> Path:
    """The target of the links at `path`; raises WriteError where it exists and is no regular file."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        kind = stat.S_IFREG
    except OSError as e:
        raise write_error(path, e) from None
    if kind != stat.S_IFREG:
        raise WriteError(f"cannot write {path}: it is {_KINDS.get(kind, 'something else')}")
    return Path(os.path.realpath(path))


def link_without_overwrite(source: Path, path: Path) -> None:
    """Give a finished file the name `path` too, and never that of another: of two programs one gets it.

    Raises FileExistsError where the name is taken, WriteError where the system refuses otherwise.
    """
    try:
        os.link(source, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without such links, or one that refuses all
        if path_exists(path):
            raise FileExistsError(f"{path} is already there") from None
        try:
            os.rename(source, path)
        except OSError as e:
            raise write_error(path, e) from None


def replace_file(source: Path, path: Path) -> None:
    """Give a finished file the name `path` instead of its own, and of whatever has it; raises WriteError."""
    try:
        os.replace(source, path)
    except OSError as e:
        raise write_error(path, e) from None


def rename_directory(source: Path, path: Path) -> None:
    """Give a finished directory the name `path` instead of its own: with all that is in it, or not at all.

    Raises FileExistsError where the name is taken (by more than an empty directory), WriteError where the system
    refuses otherwise.
    """
    try:
        os.rename(source, path)
    except OSError as e:
        if e.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise FileExistsError(f"{path} is already there") from None
        raise write_error(path, e) from None
    sync_directory(path.parent)


def write_error(path: Path | str, error: OSError) -> WriteError:
    """The WriteError for a write to `path` that failed with `error`."""
    return WriteError(f"cannot write {path}: {error.strerror or error}")


def sync_directory(directory: Path) -> None:
    """Put the names in a directory on the disk, where its file system can."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8; see `atomic_write`."""
    with atomic_write(path) as f:
        f.write(text.encode())


def write_json(path: Path | str, content: Any) -> None:
    """Write JSON, indented; see `atomic_write`. Raises ValueError for NaN and infinity, which JSON does not have."""
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except ValueError as e:
        raise ValueError(f"cannot write {path}: {e}") from None
    write_text(path, text + "\n")


def make_directory(path: Path | str) -> Path:
    """Make a directory and those above it → its path; raises WriteError where that is not possible."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise write_error(path, e) from None
    return Path(path)


def require_writable(path: Path | str) -> None:
    """Make a file's directory before the long work whose result it is; raises WriteError where it cannot be written."""
    path = Path(path)
    make_directory(path.parent)
    folder = _to_replace(path).parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise WriteError(f"cannot write {path}: no permission to write in {folder}")


def open_regular(path: Path | str) -> BinaryIO:
    """Open a file for reading; raises FileError for anything but a regular file, and never blocks on one."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise FileError(f"{path} does not exist") from None
    except OSError as e:
        raise _read_error(path, e) from None
    except ValueError as e:  # such as a null byte
        raise FileError(f"{str(path)!r} is no path of a file: {e}") from None
    kind = stat.S_IFMT(os.fstat(handle).st_mode)
    if kind != stat.S_IFREG:
        os.close(handle)
        raise FileError(f"{path} is {_KINDS.get(kind, 'something else')}, not a file")
    return open(handle, "rb")


def _read_error(path: Path | str, error: OSError) -> FileError:
    kind = UnreachableError if error.errno in _UNREACHABLE else FileError
    return kind(f"cannot read {path}: {error.strerror or error}")


def file_status(path: Path | str) -> os.stat_result:
    """`os.stat`; raises FileError where the system does not give it, UnreachableError where that says nothing."""
    try:
        return os.stat(path)
    except OSError as e:
        raise _read_error(path, e) from None


def path_exists(path: Path | str) -> bool:
    """Whether there is such a name, be it a link to nothing.

    Raises UnreachableError where the system does not tell (no permission, a stale handle, a failing disk): whoever then
    took a file for absent would begin anew.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as e:
        raise UnreachableError(f"cannot look for {path}: {getattr(e, 'strerror', None) or e}") from None
    return True


def refuse_placeholders(path: Path | str, begin: bytes) -> None:
    """Raise FileError where a file that begins with these bytes stands for another that was not downloaded."""
    if begin.startswith(_LFS_POINTER):
        raise FileError(f"{path} is a Git LFS pointer, not the file itself: `git lfs pull` downloads it")
    if (as_text(begin) or "").lstrip().startswith("<"):
        raise FileError(f"{path} is a web page or XML, not the file itself: the download went to a page about it")


def read_json(path: Path | str) -> Any:
    """The content of a JSON file; raises FileError where it is missing or not JSON in UTF-8."""
    with open_regular(path) as f:
        size = os.fstat(f.fileno()).st_size
        if size > JSON_LIMIT:
            raise FileError(f"{path} has {size:,} bytes; a JSON file of this project has at most {JSON_LIMIT:,}")
        try:
            content = f.read()
        except OSError as e:
            raise _read_error(path, e) from None
    refuse_placeholders(path, content[:100])
    try:
        return json.loads(content, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as e:
        reason = "a number in it is too long" if "set_int_max_str_digits" in str(e) else e
        raise FileError(f"{path} is damaged: no JSON ({reason})") from None


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no finite number")
    return number


def sha256(path: Path | str) -> str:
    """SHA-256 of a file's content, hexadecimal; raises FileError where it cannot be read."""
    digest = hashlib.sha256()
    with open_regular(path) as f:
        try:
            while block := f.read(_BLOCK):
                digest.update(block)
        except OSError as e:
            raise _read_error(path, e) from None
    return digest.hexdigest()


def file_entry(path: Path) -> dict:
    """{"bytes", "sha256"} of a file, for a manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


class HashingWriter:
    """Writes to a binary file and takes SHA-256 of what it writes, so that nothing has to be read again for it."""

    def __init__(self, file: BinaryIO):
        self._file, self._digest, self._bytes = file, hashlib.sha256(), 0

    def write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._digest.update(content)
        self._bytes += memoryview(content).nbytes

    def entry(self) -> dict:
        """As `file_entry` of the file, where all of it was written so."""
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}
