"""Batches of latents that lie in the devices' memory: each process sends the others what they need of its part.

Who needs which samples of a step follows from the order of samples, which every process knows: how much is sent to whom
is known to all beforehand, and nothing waits for a device. The exchange takes part in training's stream, between one
step and the next. So it meets no other collective on any process, of whichever communicator, and they cannot block each
other; what can be made ready before it is, a step ahead, in a stream of its own.
"""

import math
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from launch.runtime.read_ahead import read_in_threads
from launch.training.loader import BatchSplit, SampleOrder, Tensors
from lightningdit.data import draw_noise
from lightningdit.device_latents import DeviceLatents

PLANNED = 2048  # samples that a process alone plans for at once, which takes hardly longer than one batch
_BY_SAMPLE = ("places", "labels", "noise")


@dataclass(frozen=True)
class Plan:
    """What one process needs for the n samples of its part of a step, and what it sends.

    A process alone may plan for several steps at once: its samples are one run of the order.

    tensors: `labels` [n]; `places` [n], where each sample lies among the rows that are received, or on this device
    without others; where moments are drawn `noise` [n, C·H·W] float32; with others `outgoing`, rows of this device's in
    the order of the processes they are for. `sent` and `received` count rows by process.
    """

    tensors: Tensors
    sent: tuple[int, ...] = ()
    received: tuple[int, ...] = ()

    def pin_memory(self) -> "Plan":
        """In page-locked memory, which a GPU fetches by itself."""
        return replace(self, tensors={name: value.pin_memory() for name, value in self.tensors.items()})

    def to(self, device: torch.device) -> "Plan":
        """On a device, without waiting for it."""
        return replace(self, tensors={name: v.to(device, non_blocking=True) for name, v in self.tensors.items()})


@dataclass(frozen=True)
class _Ready:
    """A plan on the device, with the rows to send; `event`: when they are there, on a GPU."""

    plan: Plan
    rows: torch.Tensor | None
    event: torch.cuda.Event | None


class DeviceBatches:
    """Micro-batches of a training set, made on the devices that hold it; see `launch.training.loader.Streams`.

    They are the same bits as `LatentDataset.batch` gives, already on the device. Of several processes, all must ask for
    the same steps, as in training; rows are exchanged in the default process group.
    """

    def __init__(self, latents: DeviceLatents):
        self.latents = latents
        self._stream = torch.cuda.Stream(latents.device) if latents.device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self.latents.data)

    def close(self) -> None:
        """Give the devices' memory back."""
        self.latents.free()

    def stream(
        self, order: SampleOrder, split: BatchSplit, rank: int, *, first_step: int, last_step: int, num_workers: int
    ) -> Generator[Tensors]:
        """This process's micro-batches of the steps, in order; the set is read first, if it is not here.

        num_workers: threads that draw the noise of moments; whatever else is stored, one thread plans ahead.
        """
        assert (rank, split.world_size) == (self.latents.rank, self.latents.world_size)
        self.latents.load()
        moments, alone, size = self.latents.data.store == "moments", split.world_size == 1, split.global_batch_size
        at_once = max(PLANNED // size, 1) if alone and not moments else 1
        steps = (range(s, min(s + at_once, last_step + 1)) for s in range(first_step, last_step + 1, at_once))
        cuts = [[split.bounds(micro, r) for micro in range(split.accumulation)] for r in range(split.world_size)]
        shares = np.array([np.concatenate([np.arange(*cut) for cut in of_rank]) for of_rank in cuts])  # [ranks, n]
        plan = partial(self.plan, order, shares)
        return self._micro_batches(read_in_threads(plan, steps, threads=max(num_workers, 1) if moments else 1), split)

    def plan(self, order: SampleOrder, shares: np.ndarray, steps: range) -> Plan:
        """The plan of a step, or of several for a process alone, in page-locked memory where there is a GPU.

        shares: [ranks, n], the places in the global batch of each process's samples.
        """
        latents, rank = self.latents, self.latents.rank
        slices = [order.slice(step, 0, shares.size) for step in steps]
        epochs, indices = (torch.cat(parts).numpy() for parts in zip(*slices, strict=True))
        holders, rows = latents.places(indices, latents.data.flips(epochs, indices))
        own = shares[rank] if len(shares) > 1 else slice(None)
        tensors = {"labels": latents.data.labels[torch.from_numpy(indices[own])]}
        if latents.data.store == "moments":
            tensors["noise"] = self._noise(epochs[own], indices[own])
        if len(shares) == 1:
            plan = Plan(tensors | {"places": torch.from_numpy(rows[own])})
        else:
            held = holders[shares] == rank  # [ranks, n]
            places = np.empty(shares.shape[1], np.int64)
            places[np.argsort(holders[own], kind="stable")] = np.arange(len(places))  # they arrive by rank, in order
            tensors |= {"places": torch.from_numpy(places), "outgoing": torch.from_numpy(rows[shares[held]])}
            received = np.bincount(holders[own], minlength=len(shares))
            plan = Plan(tensors, tuple(held.sum(1).tolist()), tuple(received.tolist()))
        return plan.pin_memory() if self._stream is not None else plan

    def _noise(self, epochs: np.ndarray, indices: np.ndarray) -> torch.Tensor:
        """The noise of moments [n, C·H·W], of the host's generator: those of GPUs give other numbers."""
        data = self.latents.data
        noise = torch.empty(len(indices), math.prod(data.shape))
        for row, epoch, index in zip(noise, epochs.tolist(), indices.tolist(), strict=True):
            draw_noise(row, data.seed, epoch, index)
        return noise

    def _micro_batches(self, plans: Generator[Plan], split: BatchSplit) -> Generator[Tensors]:
        with closing(plans):
            for ready in self._ahead(plans):
                rows, size = self._exchange(ready), split.micro_batch_size
                parts = {
                    name: ready.plan.tensors[name].split(size) for name in _BY_SAMPLE if name in ready.plan.tensors
                }
                for micro, (places, labels) in enumerate(zip(parts["places"], parts["labels"], strict=True)):
                    noise = parts["noise"][micro] if "noise" in parts else None
                    yield {"x": self.latents.samples(rows, places, noise), "y": labels}

    def _ahead(self, plans: Iterable[Plan]) -> Generator[_Ready]:
        """Each plan once the next one is being made ready, too."""
        current = None
        for plan in plans:
            coming = self._make_ready(plan)
            if current is not None:
                yield current
            current = coming
        if current is not None:
            yield current

    def _make_ready(self, plan: Plan) -> _Ready:
        with torch.cuda.stream(self._stream):  # no other than the present one where there is none
            plan = plan.to(self.latents.device)
            assert self.latents.rows is not None
            outgoing = plan.tensors.get("outgoing")
            rows = None if outgoing is None else self.latents.rows.index_select(0, outgoing)
            return _Ready(plan, rows, None if self._stream is None else self._stream.record_event())

    def _exchange(self, ready: _Ready) -> torch.Tensor:
        """The rows that this process's samples lie in, those of others after an exchange in which all take part."""
        plan, device = ready.plan, self.latents.device
        assert self.latents.rows is not None
        if ready.event is not None:
            present = torch.cuda.current_stream(device)
            present.wait_event(ready.event)
            for value in (*plan.tensors.values(), *([] if ready.rows is None else [ready.rows])):
                value.record_stream(present)  # made in another: its memory is not free before this one has used it
        if ready.rows is None:
            return self.latents.rows
        received = ready.rows.new_empty(sum(plan.received), ready.rows.shape[1])
        # As bytes, which every backend takes; split sizes count rows.
        dist.all_to_all_single(
            received.view(torch.uint8), ready.rows.view(torch.uint8), list(plan.received), list(plan.sent)
        )
        return received
