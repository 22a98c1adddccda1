"""What each of several processes measures of a set of images, and how it comes together on the main one.

A set is divided into parts of whole batches, a stretch of them for each process: every image is in one batch with the
same others, however many processes there are.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from launch.evaluation.moments import FeatureStatistics, MomentsOfParts, Node
from launch.runtime.processes import Processes

ALONE = Processes(0, 1, torch.device("cpu"))
BATCHES_PER_PART = 4  # joining moments costs as much as some batches of features


@dataclass(frozen=True)
class Share:
    """The parts `first` to `last` (exclusive) of a set, which are its images `start` to `stop`."""

    first: int
    last: int
    start: int
    stop: int

    @classmethod
    def of(cls, total: int, batch_size: int, processes: Processes) -> "Share":
        """The share of a process in `total` images."""
        size = BATCHES_PER_PART * batch_size
        parts, rank, world_size = -(-total // size), processes.rank, processes.world_size
        first, last = (parts * r // world_size for r in (rank, rank + 1))
        return cls(first, last, first * size, min(last * size, total))


def rows_on_main(processes: Processes, rows: Tensor) -> Tensor | None:
    """The rows `[n, …]` of all processes, by rank, on the main one; None on the others. Where n is 0 no width counts.

    All are on the CPU and of one dtype.
    """
    if processes.world_size == 1:
        return rows
    shapes = processes.all_gather(tuple(rows.shape))
    if not processes.is_main:
        if len(rows):
            dist.send(rows.contiguous(), 0, group=processes.host_group)
        return None
    shape = next((shape[1:] for shape in shapes if shape[0]), rows.shape[1:])
    whole = torch.empty(sum(shape[0] for shape in shapes), *shape, dtype=rows.dtype)
    at = len(rows)
    whole[:at] = rows if at else whole[:at]
    for rank, (count, *_) in enumerate(shapes[1:], 1):
        if count:
            dist.recv(whole[at : at + count], rank, group=processes.host_group)
            at += count
    return whole


def moments_on_main(processes: Processes, parts: MomentsOfParts) -> FeatureStatistics | None:
    """The moments of the parts of all processes, on the main one; None on the others."""
    if processes.world_size == 1:
        return parts.whole()
    own = [(node, part.count, len(part.state[0])) for node, part in sorted(parts.nodes.items())]
    theirs: list[list[tuple[Node, int, int]]] = processes.all_gather(own)
    if not processes.is_main:
        for node, _, _ in own:
            for tensor in parts.nodes[node].state:
                dist.send(tensor.cpu(), 0, group=processes.host_group)
        return None
    for rank, nodes in enumerate(theirs[1:], 1):
        for (level, number), count, width in nodes:
            mean, scatter = (torch.empty(shape, dtype=torch.float64) for shape in ((width,), (width, width)))
            for tensor in (mean, scatter):
                dist.recv(tensor, rank, group=processes.host_group)
            part = FeatureStatistics(count, mean.to(processes.device), scatter.to(processes.device))
            parts.add(number, part, level)
    return parts.whole()
