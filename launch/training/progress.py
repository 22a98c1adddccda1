"""How a run gets on: position, images/s, MFU, waiting for data, memory, time left, its pace beside the published one.

Times are the host's. Nothing here waits for a device: what is measured is read when a row of the log is due, after the
row's means were copied from the device.
"""

import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from common.data_sheets import SHEETS
from launch.runtime.processes import Processes

#: The published run: 80,000 steps of 1,024 images (64 epochs of ImageNet) in 10 hours on 8 GPUs (arXiv 2501.01423).
PUBLISHED_IMAGES_PER_GPU_HOUR = 80_000 * 1024 / (8 * 10)
#: Keys of a row that say how fast it was made, by what clock and in how much memory: another start has others.
_RATES = ("images_per_second", "seconds_per_step", "eta_seconds", "mfu", "data_wait", "memory_gb")
TIMING = frozenset((*_RATES, "hours", "wall_hours", "ahead_hours"))


class Throughput:
    """Images per second since the last reading, and the time left. `now` gives seconds.

    elapsed: seconds that the last reading was of.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now, self.elapsed = now, 0.0
        self._time, self._step = now(), 0

    def start(self, step: int) -> None:
        """Begin to measure after `step`: what came before, such as saving, does not count."""
        self._time, self._step = self._now(), step

    def read(self, step: int, last_step: int, global_batch_size: int) -> dict[str, float]:
        """Rates over the steps since `start` or the last reading; the time left is that of training alone."""
        now = self._now()
        self.elapsed = now - self._time
        per_step = self.elapsed / max(step - self._step, 1)
        self._time, self._step = now, step
        return {
            "images_per_second": global_batch_size / per_step,
            "seconds_per_step": per_step,
            "eta_seconds": per_step * (last_step - step),
        }


class DataWait:
    """Seconds that the host spent inside this context, which surrounds fetching a batch, since the last reading.

    On a GPU the host runs ahead of the device, whose queue of work covers a short wait: the device stood still for want
    of data for at most this time, and for all of it once the loader is the slowest part. Copies to a GPU are only
    started in it. Without workers it is the time of reading itself.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now, self._seconds, self._entered = now, 0.0, 0.0

    def __enter__(self) -> None:
        self._entered = self._now()

    def __exit__(self, *exception: object) -> None:
        self._seconds += self._now() - self._entered

    def read(self) -> float:
        """Seconds since the last reading."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class RunTime:
    """Hours that a run has trained since step 0, over all its starts, and when it began.

    Hours go on with checkpoints: validation and saving count, starting up does not, nor what was between two starts or
    was lost with a kill; `wall_hours`, since the first start, has all of it. None where a checkpoint does not say.

    Args:
        now, clock: seconds, of a clock that never goes back and of the calendar (Unix time).
    """

    def __init__(self, gpus: int, now: Callable[[], float] = time.perf_counter, clock: Callable[[], float] = time.time):
        self._gpus, self._now, self._clock = gpus, now, clock
        self._hours: float | None = 0.0
        self._gpu_hours: float | None = 0.0
        self._started: float | None = clock()
        self._begun: float | None = None

    def begin(self) -> None:
        """Training begins, or goes on."""
        self._begun = self._now()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of a checkpoint; earlier ones say nothing of time."""
        self._hours, self._gpu_hours = state.get("hours"), state.get("gpu_hours")
        self._started = state.get("started")

    def state_dict(self) -> dict[str, float | None]:
        """`hours`, `gpu_hours` (times the GPUs of each start), `started` (Unix time), for a checkpoint."""
        here = 0.0 if self._begun is None else (self._now() - self._begun) / 3600
        hours = None if self._hours is None else self._hours + here
        gpu_hours = None if self._gpu_hours is None else self._gpu_hours + here * self._gpus
        return {"hours": hours, "gpu_hours": gpu_hours, "started": self._started}

    def read(self, images: int, *, paced: bool) -> dict[str, float | None]:
        """`hours`, `wall_hours` and, where `paced`, `ahead_hours`: how far ahead of the published run at `images`.

        The published run's GPU hours for these images less this run's, over this run's GPUs.
        """
        state = self.state_dict()
        started, gpu_hours = state["started"], state["gpu_hours"]
        ahead = None
        if paced and gpu_hours is not None:
            ahead = (images / PUBLISHED_IMAGES_PER_GPU_HOUR - gpu_hours) / self._gpus
        wall = None if started is None else (self._clock() - started) / 3600
        return {"hours": state["hours"], "wall_hours": wall, "ahead_hours": ahead}


class Progress:
    """What a row of the log says of where a run is and how fast.

    Args:
        num_samples: of an epoch.
        precision: that of training, for the device's peak.
        flops: FLOPs per image of a training step, by step; asked for only where the peak is known.
        paced: whether the run is compared with the published one: a LightningDiT on GPUs.
    """

    def __init__(
        self,
        *,
        last_step: int,
        global_batch_size: int,
        num_samples: int,
        processes: Processes,
        precision: str,
        flops: Callable[[int], float],
        paced: bool,
    ):
        self._last_step, self._batch, self._num_samples = last_step, global_batch_size, num_samples
        self._processes, self._flops = processes, flops
        self._paced = paced and processes.device.type == "cuda"
        self._peak = peak_flops(processes.device, precision)
        self._throughput, self.data_wait, self.time = Throughput(), DataWait(), RunTime(processes.world_size)

    def begin(self, step: int) -> None:
        """The loop begins after `step`."""
        self.time.begin()
        if self._peak is not None and self._processes.is_main:
            self._flops(step + 1)  # counting those of a tokenizer takes seconds
        self.start(step)

    def start(self, step: int) -> None:
        """Measure rates from here on: what came before, such as validation, does not count."""
        self.data_wait.read()
        self._throughput.start(step)

    def position(self, step: int) -> dict[str, Any]:
        """Where a step is in the run."""
        images = step * self._batch
        return {
            "step": step,
            "last_step": self._last_step,
            "epoch": images / self._num_samples,
            "images": images,
            "global_batch_size": self._batch,
        }

    def read(self, step: int) -> dict[str, float | None]:
        """Rates since the last reading, peak memory, hours; every process must call it. The means of a row come first:
        reading them waits for the device."""
        rates = self._throughput.read(step, self._last_step, self._batch)
        share = self.data_wait.read() / self._throughput.elapsed
        # The slowest loader holds up all processes, and the fullest device is the one that runs out.
        found = self._processes.all_gather((share, peak_memory(self._processes.device)))
        return {
            **rates,
            "mfu": self._mfu(step, rates["images_per_second"]),
            "data_wait": max(share for share, _ in found),
            "memory_gb": max(memory for _, memory in found) / 1e9,
            **self.time.read(step * self._batch, paced=self._paced),
        }

    def _mfu(self, step: int, images_per_second: float) -> float | None:
        """Share of the devices' peak that the FLOPs of the model take (Chowdhery et al., arXiv 2204.02311, B)."""
        if self._peak is None or not self._processes.is_main:
            return None
        return images_per_second * self._flops(step) / (self._peak * self._processes.world_size)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s of a device in "bfloat16" or "float32" by its data sheet; None where that is not known, as of a CPU."""
    if device.type != "cuda":
        return None
    sheet = SHEETS.get(torch.cuda.get_device_name(device))
    return None if sheet is None else sheet.peak(precision)


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on a GPU at most since the last call; of a process on a CPU the most it was ever resident."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
