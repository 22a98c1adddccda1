"""From the indices of a batch to arrays on the host, in two stages: what makes latents, and what decodes them.

On a GPU the first stage runs on the current stream and the second on another, so that a batch is decoded while the next
is sampled; the host waits for neither. On a CPU whole units are computed by as many threads as torch would use, each
with one: a unit is the same bits whatever their number, where nothing is compiled.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import numpy as np
import torch

from launch.sampling.units import unit_of

#: Named tensors or arrays, each with a row for each sample.
Arrays = dict[str, Any]
First = Callable[[Sequence[int]], Arrays]
Then = Callable[[Arrays], Arrays]


class Pipeline:
    """`then(first(indices))` for batches of samples, started one after the other.

    Args:
        first: indices → tensors of these samples on the device, host arrays [b] among them.
        then: those → tensors to be kept; it may run on another stream.
        device: where both run.
        workers: threads on a CPU (None: as many as torch uses there).
    """

    def __init__(self, first: First, then: Then, device: torch.device, workers: int | None = None):
        self._first, self._then, self._device = first, then, device
        self.unit = unit_of(device)
        self.workers = (workers or torch.get_num_threads()) if device.type == "cpu" else 1
        self._pool: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None

    def __enter__(self) -> Self:
        if self._device.type == "cpu":
            self._threads = torch.get_num_threads()
            self._pool = ThreadPoolExecutor(self.workers, "units", initializer=torch.set_num_threads, initargs=(1,))
        else:
            self._stream = torch.cuda.Stream(self._device)
        return self

    def __exit__(self, *exception) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)  # setting it in a thread sets what later threads begin with

    def start(self, start: int, stop: int) -> Callable[[], Arrays]:
        """Begin samples `start` to `stop` → what waits for them, and returns their arrays, NumPy's, [stop − start, …].

        `start` is a multiple of the unit.
        """
        if self._pool is None:
            return self._start_on_stream(range(start, stop))
        units = range(start, stop, self.unit)
        futures = [self._pool.submit(self._run_unit, range(first, first + self.unit)) for first in units]
        return lambda: _joined(futures, stop - start)

    def _run_unit(self, indices: Sequence[int]) -> Arrays:
        with torch.no_grad():
            return {name: _to_numpy(value) for name, value in self._then(self._first(indices)).items()}

    @torch.no_grad()
    def _start_on_stream(self, indices: Sequence[int]) -> Callable[[], Arrays]:
        made = self._first(indices)
        stream = self._stream
        assert stream is not None, "used as a context manager"
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for value in made.values():
                if isinstance(value, torch.Tensor) and value.is_cuda:
                    value.record_stream(stream)  # its memory is not given away before this stream has read it
            kept = {name: _to_host(value) for name, value in self._then(made).items()}
            event = stream.record_event()

        def result() -> Arrays:
            event.synchronize()
            return {name: _to_numpy(value) for name, value in kept.items()}

        return result


def _to_host(value: Any) -> Any:
    """A tensor in page-locked memory, when the stream has come to it; anything else as it is."""
    if not isinstance(value, torch.Tensor) or not value.is_cuda:
        return value
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return host.copy_(value, non_blocking=True)


def _to_numpy(value: Any) -> np.ndarray:
    return value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _joined(futures: Sequence[Future], count: int) -> Arrays:
    """The arrays of units, one after the other, without what was filled up at the end."""
    parts: list[Mapping[str, np.ndarray]] = [future.result() for future in futures]
    return {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}
