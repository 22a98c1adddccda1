"""Which samples a step sees, and the loader that brings them: a function of the step alone, so resuming is exact."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lightningdit.seeds import generator


class Batches(Protocol):
    """What a task gives to load from: `batch` depends on its arguments (and the task's seed) alone."""

    def __len__(self) -> int: ...

    def batch(self, epochs: torch.Tensor, indices: torch.Tensor) -> dict[str, torch.Tensor]: ...


@dataclass
class SampleOrder:
    """The stream of training samples: every epoch a permutation of all samples, epochs one after the other.

    Step s (from 1) takes positions (s − 1)·B to s·B of the stream; no sample is dropped at an epoch's end. The global
    batch of a step is the same for any number of processes and micro-batches.
    """

    num_samples: int
    global_batch_size: int
    seed: int
    _permutations: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)

    def slice(self, step: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Epochs and sample indices (int64 `[stop − start]`) of part of the global batch of `step`."""
        first = (step - 1) * self.global_batch_size
        positions = torch.arange(first + start, first + stop)
        epochs = positions // self.num_samples
        indices = torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            indices[here] = self._permutation(epoch)[positions[here] % self.num_samples]
        return epochs, indices

    def _permutation(self, epoch: int) -> torch.Tensor:
        if epoch not in self._permutations:
            # A batch can straddle two epochs, hardly more: older permutations are not needed again.
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            self._permutations[epoch] = torch.randperm(self.num_samples, generator=generator(self.seed, epoch))
        return self._permutations[epoch]


@dataclass(frozen=True)
class Split:
    """How a global batch is cut: micro-batch m of process r is one run of samples inside it."""

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


class _MicroBatches(Dataset):
    def __init__(self, batches: Batches, order: SampleOrder, split: Split, rank: int):
        self._batches, self._order, self._split, self._rank = batches, order, split, rank

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        step, micro = key
        return self._batches.batch(*self._order.slice(step, *self._split.bounds(micro, self._rank)))


class _Keys(Sampler):
    def __init__(self, first_step: int, last_step: int, accumulation: int):
        self._steps, self._accumulation = range(first_step, last_step + 1), accumulation

    def __iter__(self):
        return ((step, micro) for step in self._steps for micro in range(self._accumulation))

    def __len__(self) -> int:
        return len(self._steps) * self._accumulation


def _leave_signals_to_main(worker: int) -> None:
    """A launcher signals every process below it: workers must outlive the step that ends in a checkpoint."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def micro_batches(batches: Batches, order: SampleOrder, split: Split, rank: int, *, first_step: int, last_step: int,
                  num_workers: int, pin_memory: bool) -> Iterator[dict[str, torch.Tensor]]:
    """This process's micro-batches of steps `first_step` to `last_step`, in order, read ahead by `num_workers`."""
    keys = _Keys(first_step, last_step, split.accumulation)
    dataset = _MicroBatches(batches, order, split, rank)
    return iter(DataLoader(
        dataset, sampler=keys, batch_size=None, num_workers=num_workers, pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_main if num_workers else None,
    ))  # fmt: skip
