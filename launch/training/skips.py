"""Skipped steps and their causes: recorded on the device in every step, read when a row of the log is due."""

from collections.abc import Iterable, Mapping

import torch

from launch.runtime.processes import Processes
from launch.training.optimizer import COUNTERS

#: Network → what `AdamWEma.read_counters` gives.
Counters = Mapping[str, Mapping[str, float]]


class SkippedSteps:
    """`AdamWEma.skip_flags` of the last steps, for each network and this process.

    Args:
        networks: their names.
        step: the step before the first that is noted.
        capacity: how many steps are remembered until they are read.
    """

    def __init__(self, networks: Iterable[str], step: int, capacity: int, device: torch.device):
        self._networks = tuple(networks)
        self._flags = torch.zeros(capacity, len(self._networks), 2, dtype=torch.bool, device=device)
        self._no_flags = torch.zeros(2, dtype=torch.bool, device=device)
        self._read_to = step

    def record(self, step: int, skip_flags: dict[str, torch.Tensor]) -> None:
        """Keep `AdamWEma.skip_flags` of each network that was trained in this step; nothing is copied to the host."""
        rows = [skip_flags.get(name, self._no_flags) for name in self._networks]
        self._flags[step % len(self._flags)] = torch.stack(rows)

    def read(self, step: int, processes: Processes) -> list[dict]:
        """The skipped steps since the last reading up to `step`; every process must call it, and gets the same.

        Each has `step`, `network`, `not_finite` ("loss" or "gradient") and `ranks`, whose loss it was. A gradient is
        known as the sum over all processes only: then there are none.
        """
        first = max(self._read_to, step - len(self._flags)) + 1
        self._read_to = step
        skip_flags = self._flags.tolist()
        here = [
            (number, name, loss)
            for number in range(first, step + 1)
            for name, (skipped, loss) in zip(self._networks, skip_flags[number % len(skip_flags)], strict=True)
            if skipped
        ]
        if not here:
            return []
        found = []
        for (number, name, _), *faults in zip(here, *processes.all_gather([loss for *_, loss in here]), strict=True):
            ranks = [rank for rank, fault in enumerate(faults) if fault]
            cause = "loss" if ranks else "gradient"
            found.append({"step": number, "network": name, "not_finite": cause, "ranks": ranks})
        return found


def all_skipped(before: Counters, after: Counters) -> bool:
    """Whether a network has met steps between two readings of the counters, and each of them was skipped."""
    nothing: Mapping[str, float] = dict.fromkeys(COUNTERS, 0.0)
    earlier = {name: before.get(name, nothing) for name in after}
    return any(
        c["applied"] == earlier[name]["applied"] and c["skipped"] > earlier[name]["skipped"]
        for name, c in after.items()
    )
