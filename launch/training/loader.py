"""Sample order and data loader: the samples of a step are a function of the step alone, so resuming is exact."""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from common.seeds import generator
from launch.runtime.read_ahead import read_in_processes, read_in_threads

Tensors = dict[str, torch.Tensor]
Key = tuple[int, int]  # step and micro-batch
Redrawn = tuple[int, int, int]  # first and last step, seed


class Batches(Protocol):
    """A task's data set: `batch` depends on its arguments (and the task's seed) alone.

    Where it says `threaded = True`, `batch` also takes `pin_memory`, and is called from several threads at once (of
    which `most_readers`, where it has that, are enough): it should hold Python's lock for as little as it can.
    Otherwise it is called in processes of its own.
    """

    def __len__(self) -> int: ...

    def batch(self, epochs: torch.Tensor, indices: torch.Tensor) -> Tensors: ...


@runtime_checkable
class Streams(Protocol):
    """A data set that makes the micro-batches of a process by itself, from the order of samples, on its device."""

    def __len__(self) -> int: ...

    def stream(
        self,
        order: "SampleOrder",
        split: "BatchSplit",
        rank: int,
        *,
        first_step: int,
        last_step: int,
        num_workers: int,
    ) -> Generator[Tensors]:
        """As `micro_batches`."""

    def close(self) -> None:
        """Free the device's memory."""


@dataclass
class SampleOrder:
    """The stream of training samples: every epoch a permutation of all samples, epochs one after the other.

    Step s (from 1) takes positions (s − 1)·B to s·B of the stream; no sample is dropped at an epoch's end. The global
    batch of a step is the same for any number of processes and micro-batches.

    redrawn: ranges (first step, last step, seed) whose steps take their positions from the stream of another seed, the
        last range that holds a step; some samples of the epoch are then met twice and others not.
    """

    num_samples: int
    global_batch_size: int
    seed: int
    redrawn: Sequence[Redrawn] = ()
    _permutations: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False)

    def seed_of(self, step: int) -> int:
        """The seed that a step's samples and random numbers are drawn from."""
        return next((seed for first, last, seed in reversed(self.redrawn) if first <= step <= last), self.seed)

    def slice(self, step: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Epochs and sample indices (int64 `[stop − start]`) of part of the global batch of `step`."""
        first, seed = (step - 1) * self.global_batch_size, self.seed_of(step)
        epochs, places = np.divmod(np.arange(first + start, first + stop), self.num_samples)
        indices = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            indices[here] = self._permutation(seed, epoch)[places[here]]
        return torch.from_numpy(epochs), torch.from_numpy(indices)

    def _permutation(self, seed: int, epoch: int) -> np.ndarray:
        found = self._permutations.get((seed, epoch))
        if found is None:
            found = torch.randperm(self.num_samples, generator=generator(seed, epoch)).numpy()
            # Steps near each other, in whatever order threads come to them, hardly need more than an epoch's
            # neighbours. The dict is replaced, never changed, so that no thread meets it half done.
            near = {key: p for key, p in self._permutations.items() if abs(key[1] - epoch) <= 1}
            self._permutations = near | {(seed, epoch): found}
        return found


@dataclass(frozen=True)
class BatchSplit:
    """A global batch cut into micro-batches: micro-batch m of process r is one run of samples inside it."""

    global_batch_size: int
    world_size: int
    micro_batch_size: int

    def __post_init__(self):
        together = self.world_size * self.micro_batch_size
        if self.global_batch_size % together:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of {self.world_size} processes × "
                f"micro_batch_size {self.micro_batch_size} = {together}"
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches per step."""
        return self.global_batch_size // (self.world_size * self.micro_batch_size)

    def bounds(self, micro: int, rank: int) -> tuple[int, int]:
        """Start and end, in the global batch, of micro-batch `micro` of process `rank`."""
        start = (micro * self.world_size + rank) * self.micro_batch_size
        return start, start + self.micro_batch_size


def samples_of_step(order: SampleOrder, split: BatchSplit, step: int) -> dict[str, list[list[int]]]:
    """`epochs` and indices (`samples`) of the samples of a step, one list for each process."""
    found = {"epochs": [], "samples": []}
    for rank in range(split.world_size):
        cuts = [split.bounds(micro, rank) for micro in range(split.accumulation)]
        epochs, indices = zip(*(order.slice(step, *cut) for cut in cuts), strict=True)
        found["epochs"].append(torch.cat(epochs).tolist())
        found["samples"].append(torch.cat(indices).tolist())
    return found


class _KeySampler(Sampler):
    def __init__(self, first_step: int, last_step: int, accumulation: int):
        self._steps, self._accumulation = range(first_step, last_step + 1), accumulation

    def __iter__(self):
        return ((step, micro) for step in self._steps for micro in range(self._accumulation))

    def __len__(self) -> int:
        return len(self._steps) * self._accumulation


def micro_batches(
    batches: Batches | Streams,
    order: SampleOrder,
    split: BatchSplit,
    rank: int,
    *,
    first_step: int,
    last_step: int,
    num_workers: int,
    pin_memory: bool,
) -> Generator[Tensors]:
    """This process's micro-batches of steps `first_step` to `last_step`, in order, read ahead by `num_workers`.

    See `read_batches`; those of `Streams` come as they make them.
    """
    if isinstance(batches, Streams):
        steps = {"first_step": first_step, "last_step": last_step}
        return batches.stream(order, split, rank, **steps, num_workers=num_workers)

    def load(key: Key, **options: bool) -> Tensors:
        step, micro = key
        return batches.batch(*order.slice(step, *split.bounds(micro, rank)), **options)

    keys = _KeySampler(first_step, last_step, split.accumulation)
    return read_batches(batches, load, keys, num_workers=num_workers, pin_memory=pin_memory)


def read_batches(
    batches: Batches, load: Callable[..., Tensors], keys: Iterable, *, num_workers: int, pin_memory: bool
) -> Generator[Tensors]:
    """`load(key)` for each of `keys`, in order, read ahead by `num_workers`.

    The workers are threads where the batches are `threaded`, at least one and at most `most_readers`; else processes,
    and nothing is read ahead without any. With pin_memory the batches lie where a GPU can fetch them by itself. Close
    the generator to end them.

    load: makes a batch of `batches`, and hands `pin_memory` on to them in threads.
    """
    if getattr(batches, "threaded", False):
        threads = max(min(num_workers, getattr(batches, "most_readers", None) or num_workers), 1)
        return read_in_threads(partial(load, pin_memory=pin_memory), keys, threads=threads)
    return read_in_processes(_ByKey(load), keys, num_workers=num_workers, pin_memory=pin_memory)


def to_device(batch: Tensors, device: torch.device) -> Tensors:
    """A batch on the device of the run, without waiting for it."""
    for value in batch.values():
        if value.is_cuda:  # made on a reader's stream: its memory is not free before this stream has used it
            value.record_stream(torch.cuda.current_stream(device))
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


class _ByKey(Dataset):
    def __init__(self, load: Callable[..., Tensors]):
        self._load = load

    def __getitem__(self, key) -> Tensors:
        return self._load(key)
