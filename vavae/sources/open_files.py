"""Reads at any place of many files, of which a few stay open."""

import os
import threading
from collections import OrderedDict
from pathlib import Path

from common.files import open_regular


class _Handle:
    """An open file that closes when nobody holds it any more."""

    def __init__(self, path: Path):
        self._file = open_regular(path)
        self.number = self._file.fileno()

    def __del__(self):
        if hasattr(self, "_file"):
            self._file.close()


class OpenFiles:
    """Positional reads, by any number of threads; of the files read last at most `limit` stay open.

    One that has to go closes when the last thread that reads it is done. A forked or unpickled copy opens files anew.
    """

    def __init__(self, limit: int = 128):
        self.limit = limit
        self._begin()

    def _begin(self) -> None:
        self._opened: tuple[int, threading.Lock, OrderedDict[Path, _Handle]]
        self._opened = os.getpid(), threading.Lock(), OrderedDict()

    def __reduce__(self):
        return OpenFiles, (self.limit,)

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, fewer where the file ends before.

        Raises FileError where the file cannot be opened, OSError where it cannot be read.
        """
        handle = self._handle(path)
        content = os.pread(handle.number, size, offset)
        while len(content) < size:  # the system reads at most 2 GiB at once
            more = os.pread(handle.number, size - len(content), offset + len(content))
            if not more:
                break
            content += more
        return content

    def _handle(self, path: Path) -> _Handle:
        if self._opened[0] != os.getpid():  # a lock may have been held when the process was forked
            self._begin()
        _, lock, handles = self._opened
        with lock:
            handle = handles.get(path)
            if handle is not None:
                handles.move_to_end(path)
                return handle
        handle = _Handle(path)  # outside the lock: opening may take long
        with lock:
            handle = handles.setdefault(path, handle)
            while len(handles) > self.limit:
                handles.popitem(last=False)
        return handle
