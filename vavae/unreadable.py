"""Which files of a set could not be read, known to all processes of a loader, and when there are too many."""

import logging

import torch

from vavae.image_files import UnreadableImage

log = logging.getLogger(__name__)

LEAST_READ = 10_000  # files of which a share says something
_READ, _UNREADABLE = 1, 2


class UnreadableFiles:
    """Marks the files of a set as read or unreadable, in memory shared with processes forked later.

    Args:
        num_files: of the set.
        max_share: share of the files read so far (of at least `LEAST_READ`, or of all) that may be unreadable.
        description: of the set, for messages.
        empty: number of files that are not of the set because they are empty.

    Raises UnreadableImage where the empty files are too many.
    """

    def __init__(self, num_files: int, max_share: float, description: str, *, empty: int = 0):
        if empty > max_share * (num_files + empty):
            raise UnreadableImage(
                f"{empty:,} of {num_files + empty:,} images of {description} are empty, more than data.max_unreadable "
                f"{max_share:g} allows"
            )
        self._max_share, self._description = max_share, description
        self._marks = torch.zeros(num_files, dtype=torch.uint8).share_memory_()
        self._verdict: str | None = None  # that there are too many, once there are

    @property
    def indices(self) -> list[int]:
        """Those found unreadable."""
        return (self._marks == _UNREADABLE).nonzero().flatten().tolist()

    def next_readable(self, index: int) -> int:
        """`index`, or the next, around the end, that is not known to be unreadable.

        Raises UnreadableImage where there is none, or there were too many unreadable ones before.
        """
        self._refuse_after_verdict()
        total = len(self._marks)
        for place in range(index, index + total):
            if self._marks[place % total] != _UNREADABLE:
                return place % total
        raise self._end(f"none of the {total:,} images of {self._description} can be read")

    def mark_read(self, index: int) -> None:
        self._marks[index] = _READ

    def mark_unreadable(self, index: int, error: UnreadableImage) -> None:
        """Log the error, once; raises UnreadableImage where there are too many, or nothing is left, and ever after."""
        self._refuse_after_verdict()
        if self._marks[index] == _UNREADABLE:
            return
        self._marks[index] = _UNREADABLE
        unreadable, total = int((self._marks == _UNREADABLE).sum()), len(self._marks)
        if unreadable == total:
            raise self._end(f"none of the {total:,} images of {self._description} can be read: {error}")
        read = int(self._marks.count_nonzero())
        if unreadable > self._max_share * max(read, min(total, LEAST_READ)):
            raise self._end(
                f"{unreadable:,} of the {read:,} images read so far of {self._description} are unreadable, more than "
                f"data.max_unreadable {self._max_share:g} allows; the last one: {error}"
            )
        log.warning("skipping: %s", error)

    def _end(self, verdict: str) -> UnreadableImage:
        """The error that later calls raise too."""
        self._verdict = self._verdict or verdict
        return UnreadableImage(self._verdict)

    def _refuse_after_verdict(self) -> None:
        if self._verdict is not None:
            raise UnreadableImage(self._verdict)
