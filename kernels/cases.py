"""Inputs for tests and benches: what a case is, how its tensors are drawn, what a call costs."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Cost:
    """The least a call has to move and multiply, as if every tensor crossed device memory once.

    Attributes:
        forward_bytes, backward_bytes: inputs read plus outputs written. Backward reads the upstream gradients and what
            the forward pass has saved, and writes the gradients of the differentiable arguments.
        forward_flops, backward_flops: floating-point operations of the matrix products, two for each multiply-add.
    """

    forward_bytes: int
    backward_bytes: int = 0
    forward_flops: int = 0
    backward_flops: int = 0


class Draw:
    """Random tensors of one case: the same numbers for every dtype and device, from a seed of its own."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device | str):
        self.dtype, self.device = dtype, device
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, mean: float = 0, std: float = 1, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal numbers in the case's dtype, or in `dtype`."""
        values = torch.randn(shape, generator=self._generator).mul_(std).add_(mean)
        return values.to(self.device, dtype or self.dtype)

    def rows(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal numbers whose rows (all but the last dimension) have scale 1 and 1e-3 by turns.

        An `eps` of 1e-6 decides the small rows and hardly touches the others: wrong or dropped, it shows.
        """
        scale = torch.ones(shape[:-1]).flatten()
        scale[1::2] = 1e-3
        values = torch.randn(shape, generator=self._generator) * scale.view(*shape[:-1], 1)
        return values.to(self.device, dtype or self.dtype)

    def angles(self, tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 cos and sin `[tokens, width]` of random angles, one for each pair of neighbours."""
        angle = torch.rand(tokens, width // 2, generator=self._generator).mul_(6.28).repeat_interleave(2, dim=1)
        return angle.cos().to(self.device), angle.sin().to(self.device)


@dataclass(frozen=True)
class Case:
    """One set of arguments for an op.

    Attributes:
        id: names the case within its op, and seeds its numbers.
        make: draws the arguments, by name.
        production: a shape of a real run, for a GPU or for ahead-of-time compilation; the others suit a CPU.
    """

    id: str
    make: Callable[[Draw], dict[str, Any]]
    production: bool = False

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The op's arguments by name; main inputs have `dtype`, and nothing requires a gradient yet."""
        return self.make(Draw(zlib.crc32(self.id.encode()), dtype, device))


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, spread over every other element of a larger storage whose gaps hold NaN."""
    gaps = tensor.new_full((*tensor.shape, 2), float("nan"))
    gaps[..., 0] = tensor
    return gaps[..., 0]


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of the tensors that are given, gaps not counted."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
