"""Status and reason of a row for an error."""

from collections.abc import Iterator

import torch

from bench.measure.timing import IterationFailed

#: What a driver or a library says in the place of torch's own error when the memory of the device has run out.
NO_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class CannotRun(RuntimeError):
    """A provider that is not measured on this machine: the status of its row, and why."""

    def __init__(self, status: str, why: str):
        self.status = status
        super().__init__(why)


def status_of(error: BaseException) -> tuple[str, str]:
    """The status and the reason of a row; where memory ran out the reason begins with "OutOfMemoryError"."""
    if isinstance(error, IterationFailed):
        error = error.__cause__ or error
    if isinstance(error, CannotRun):
        return error.status, str(error)
    if isinstance(error, ImportError):
        return "unavailable", f"not installed: {error}"
    name, cause = type(error).__name__, error
    for found in _chain(error):
        if isinstance(found, torch.OutOfMemoryError) or any(text in str(found) for text in NO_MEMORY):
            name, cause = "OutOfMemoryError", found
            break
    return "failed", f"{name}: {cause}"[:300]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it came from: a compiler wraps what it meets."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
