"""The gradient norm of each block of a network, from the tensors that the optimizer steps on."""

import re
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

#: Where a part of a parameter lies: index of the optimizer's tensor, first element, number of elements.
Part = tuple[int, int, int]


def block_of(parameter: str) -> str:
    """The block that a parameter belongs to: its name to the first number, such as `blocks.3`, or its module's."""
    numbered = re.match(r".*?\.\d+(?=\.)", parameter)
    return numbered[0] if numbered else parameter.rpartition(".")[0] or parameter


class BlockNorms:
    """Norms of the gradients of the blocks whose parameters lie at `parts` (parameter → where).

    partitioned: whether each process holds a part of the gradients, so that squares add up over processes.
    """

    def __init__(self, parts: Mapping[str, Sequence[Part]], partitioned: bool):
        self.names = list(dict.fromkeys(block_of(name) for name in parts))
        self._partitioned = partitioned
        self._parts: list[tuple[int, Part]] = []
        for name, places in parts.items():
            for place in places:
                self._append(self.names.index(block_of(name)), place)

    def _append(self, block: int, part: Part) -> None:
        """One more part, joined to the last where it follows it."""
        if self._parts:
            last_block, (tensor, start, size) = self._parts[-1]
            if (last_block, tensor, start + size) == (block, part[0], part[1]):
                self._parts[-1] = (block, (tensor, start, size + part[2]))
                return
        self._parts.append((block, part))

    def measure(self, grads: Sequence[torch.Tensor | None], device: torch.device) -> torch.Tensor:
        """L2 norms of the blocks' gradients, float32 [blocks] on `device`, the same on every process.

        grads: of the optimizer's tensors, as they are stepped on. Nothing is copied to the host.
        """
        flat = [None if grad is None else grad.detach().reshape(-1) for grad in grads]
        here = [(block, flat[tensor], start, size) for block, (tensor, start, size) in self._parts]
        pieces = [(block, grad.narrow(0, start, size)) for block, grad, start, size in here if grad is not None]
        squares: list[list[torch.Tensor]] = [[] for _ in self.names]
        if pieces:
            norms = torch._foreach_norm([piece for _, piece in pieces], 2, dtype=torch.float32)
            for (block, _), norm in zip(pieces, norms, strict=True):
                squares[block].append(norm.square())
        zero = torch.zeros((), device=pieces[0][1].device if pieces else device)
        total = torch.stack([torch.stack(each).sum() if each else zero for each in squares]).to(device)
        if self._partitioned and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(total)
        return total.sqrt()
