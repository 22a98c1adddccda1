"""Text in messages: what comes out of files made printable, lists of names shortened, the nearest valid name."""

import difflib
import re
from collections.abc import Iterable, Sequence

# A terminal obeys the first and ends lines at the next two; the last are bytes that are no UTF-8.
_UNSHOWN = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def printable(text: str, *, lines: bool = False) -> str:
    """`text` with its control characters, and bytes that are no UTF-8, as escapes; with `lines` line ends are kept."""
    return _UNSHOWN.sub(lambda found: found[0] if lines and found[0] == "\n" else repr(found[0])[1:-1], text)


def shortened(names: Sequence[str], count: int) -> str:
    """The first names, printable, and a sign where there are more."""
    return ", ".join(map(printable, names[:count])) + (", …" if len(names) > count else "")


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean …?)' with the closest of `known`, or an empty string where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
