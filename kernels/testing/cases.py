"""Cases of ops for tests and benches: their inputs, drawn at random, and the cost of a call."""

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from kernels.registry import FLOATS


@dataclass(frozen=True)
class Cost:
    """The least a call has to move and multiply, as if every tensor crossed device memory once.

    Attributes:
        forward_bytes, backward_bytes: inputs read plus outputs written. Backward reads the upstream gradients and what
            the forward pass has saved, and writes the gradients that training asks for.
        forward_flops, backward_flops: floating-point operations of the matrix products, two for each multiply-add.
    """

    forward_bytes: int
    backward_bytes: int = 0
    forward_flops: int = 0
    backward_flops: int = 0


class Draw:
    """Random tensors of one case, the same numbers for every dtype.

    They are drawn on a CPU, so that devices see the same numbers too, unless `on_device` asks for speed instead. On the
    device "meta" the tensors have shapes and no numbers: for costs and for ahead-of-time compilation.
    """

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device | str, on_device: bool = False):
        self.dtype, self.device = dtype, device
        self._source = torch.device(device if on_device or str(device) == "meta" else "cpu")
        self._generator = None if self._source.type == "meta" else torch.Generator(self._source).manual_seed(seed)

    def normal(self, *shape: int, mean: float = 0, std: float = 1, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal numbers in the case's dtype, or in `dtype`."""
        values = torch.randn(shape, generator=self._generator, device=self._source).mul_(std).add_(mean)
        return values.to(self.device, dtype or self.dtype)

    def rows(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal numbers whose rows (all but the last dimension) have scale 1 and 1e-3 by turns.

        An `eps` of 1e-6 decides the small rows and hardly touches the others: wrong or dropped, it shows.
        """
        values = self.normal(*shape, dtype=torch.float32).flatten(0, -2)
        values[1::2] *= 1e-3
        return values.view(shape).to(dtype or self.dtype)

    def uniform(self, *shape: int, low: float = 0, high: float = 1, dtype: torch.dtype | None = None) -> torch.Tensor:
        values = torch.rand(shape, generator=self._generator, device=self._source).mul_(high - low).add_(low)
        return values.to(self.device, dtype or self.dtype)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        """Integers from 0 to `high` − 1."""
        return torch.randint(high, shape, generator=self._generator, device=self._source).to(self.device)

    def chunks(self, count: int, samples: int, width: int, mean: float = 0.5) -> tuple[torch.Tensor, ...]:
        """`count` tensors `[samples, width]`, side by side in memory as the parts of a modulation are."""
        return self.normal(samples, count * width, mean=mean, std=0.5).chunk(count, dim=1)

    def angles(self, tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 cos and sin `[tokens, width]` of random angles, one for each pair of neighbours."""
        angle = self.uniform(tokens, width // 2, high=6.28, dtype=torch.float32).repeat_interleave(2, dim=1)
        return angle.cos(), angle.sin()


@dataclass(frozen=True)
class Case:
    """One set of arguments for an op.

    Attributes:
        id: names the case within its op, and seeds its numbers.
        make: draws the arguments, by name.
        production: a shape of a real run, for a GPU or for ahead-of-time compilation; the others suit a CPU.
        dtypes: those of the op in which the case makes sense.
    """

    id: str
    make: Callable[[Draw], dict[str, Any]]
    production: bool = False
    dtypes: frozenset[torch.dtype] = FLOATS

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The op's arguments by name; main inputs have `dtype`, and nothing requires a gradient yet."""
        return self.make(Draw(zlib.crc32(self.id.encode()), dtype, device, on_device=self.production))


def with_tangents(cases: Iterable[Case], arguments: tuple[str, ...], production: Iterable[str]) -> tuple[Case, ...]:
    """Cases of an op as those of its forward mode: behind each of `arguments` comes its tangent.

    A tangent is drawn like its argument, with other numbers, and laid out like it. Of the production cases only those
    whose ids are in `production` are taken.
    """
    taken = set(production)

    def make(case: Case, draw: Draw) -> dict[str, Any]:
        inputs, others = case.make(draw), case.make(draw)
        found: dict[str, Any] = {}
        for name, value in inputs.items():
            found[name] = value
            if name in arguments:
                found[f"{name}_tangent"] = others[name]
        return found

    chosen = [case for case in cases if not case.production or case.id in taken]
    return tuple(replace(case, make=partial(make, case)) for case in chosen)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, spread over every other element of a larger storage whose gaps hold NaN."""
    gaps = tensor.new_full((*tensor.shape, 2), float("nan"))
    gaps[..., 0] = tensor
    return gaps[..., 0]


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of the tensors that are given, gaps not counted."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
