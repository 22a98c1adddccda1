"""Work in another thread beside the loop that hands it out: in order, a few items ahead, errors raised in the loop."""

import queue
import threading
from collections.abc import Callable
from typing import Any, Self

DEPTH = 2  # items that wait, beside the one that is worked on


class InBackground:
    """Calls `work(item)` for every item that is `put`, in order, in one thread.

        with InBackground(write) as background:
            for item in items:
                background.put(item)

    At most `depth` items wait: `put` blocks beyond. What `work` raises is raised by the next `put`, or at the end of
    the block; items after it are dropped. Where the block itself raises, what waits is dropped, and nothing is written
    any more once it has ended.
    """

    def __init__(self, work: Callable[[Any], None], depth: int = DEPTH):
        self._work = work
        self._error: BaseException | None = None
        self._items: queue.Queue = queue.Queue(depth)
        self._dropped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="background", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def put(self, item: Any) -> None:
        """Have `item` worked on, when those before it are."""
        self._raise()
        self._items.put(item)

    def __exit__(self, kind, value, trace) -> None:
        if kind is not None:
            self._dropped.set()
        self._items.put(None)  # never waits for ever: the thread takes items also after an error
        self._thread.join()
        if kind is None:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            if self._error is None and not self._dropped.is_set():
                try:
                    self._work(item)
                except BaseException as e:
                    self._error = e
