"""Files as one array: memory maps side by side in one range of addresses, so that one call gathers from all of them."""

import ctypes
import mmap
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

_MAP_FIXED = 0x10  # on Linux, macOS and the BSDs; Python's mmap module has no name for it
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)


def map_side_by_side(paths: Sequence[Path]) -> tuple[np.ndarray, list[int]]:
    """Map files into one range of addresses → its bytes (uint8, read-only), and where in it each file begins.

    Every file begins on a page of its own, with zeros behind it up to the next. Nothing is read before it is used. The
    range is given back with the last reference to the array or a view of it. A file must keep its length meanwhile: to
    read what has been cut off ends the process.

    Raises OSError where a file cannot be opened or mapped.
    """
    sizes = [path.stat().st_size for path in paths]
    *starts, total = accumulate((-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes), initial=0)
    # An empty range owned by Python, of which the files take the place: its end is theirs too.
    whole = np.frombuffer(
        mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ), np.uint8
    )
    for path, size, start in zip(paths, sizes, starts, strict=True):
        place = whole.ctypes.data + start
        with open(path, "rb") as f:
            mapped = _libc.mmap(place, size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, f.fileno(), 0)
        if mapped != place:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    return whole, starts
