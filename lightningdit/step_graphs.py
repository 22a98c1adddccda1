"""Steps of a fixed-step solver on the device: numbers in a table there, each kind of step one CUDA graph.

All that a step reads but the weights is in tensors: the state, labels, noise, and the step's times, guidance scales and
factors, a row of a table that is made once. So steps that guide at the same stages are one computation, which is
captured once and replayed for each of them, without a number of the host in it and without waiting for the device.

Shapes: B samples, C latent channels, H and W latent height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lightningdit.guidance import Denoiser, Guidance, Network
from lightningdit.solvers import FixedSteps, Step

#: Makes of a function, of tensors that stay where they are, what runs it again. It may run it before, or not.
Capture = Callable[[Callable[[], object]], Callable[[], object]]
WARM_UP = 2  # calls before a capture: they compile, choose kernels and make room, which a capture must not


def cuda_graphs() -> Capture:
    """A `Capture` by CUDA graphs, all on one stream and in one pool of memory: one of them runs at a time."""
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def capture(function: Callable[[], object]) -> Callable[[], object]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on meanwhile: images are decoded and written while the next batch is sampled.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            function()
        return graph.replay

    return capture


class Kind(NamedTuple):
    """What makes two steps the same computation, on other numbers.

    guided: of each evaluation, whether it is guided. last: `Step.last`.
    """

    guided: tuple[bool, ...]
    last: bool


@dataclass
class Static:
    """Tensors that the captured steps of batches of one size read and write: the state, labels, noise, numbers."""

    x: torch.Tensor
    y: torch.Tensor
    noise: torch.Tensor
    numbers: torch.Tensor


class StepRunner:
    """Runs all steps of a solver for batches of samples.

    capture: how steps are captured; None: they are called one after the other. nfe, guided_nfe: calls of the network
    that a batch takes, and those with a second evaluation.
    """

    def __init__(
        self,
        solver: FixedSteps,
        model: Network,
        guidance: Guidance | None = None,
        guide: Network | None = None,
        capture: Capture | None = None,
    ):
        self._solver, self._model, self._guidance, self._guide = solver, model, guidance, guide
        self._capture = capture
        self._static: Static | None = None
        self._replays: dict[Kind, Callable[[], object]] = {}
        self._numbers: torch.Tensor | None = None
        self._num_weights = len(solver.steps[0].weights)
        self.kinds, self._rows = self._plan()
        self.nfe = sum(len(kind.guided) for kind in self.kinds)
        self.guided_nfe = sum(sum(kind.guided) for kind in self.kinds)

    def _plan(self) -> tuple[list[Kind], list[list[float]]]:
        """Of each step its kind and its numbers: times, guidance scales (1 where there is none), weights."""
        asked = Denoiser(self._model, torch.empty(0), self._guidance, self._guide)
        kinds, rows = [], []
        for step in self._solver.steps:
            times, weights = [float(t) for t in step.times], [float(weight) for weight in step.weights]
            scales = [asked.scale_at(t) for t in times]
            kinds.append(Kind(tuple(scale is not None for scale in scales), step.last))
            rows.append([*times, *(1.0 if scale is None else scale for scale in scales), *weights])
        return kinds, rows

    @torch.no_grad()
    def __call__(
        self, z: torch.Tensor, y: torch.Tensor, noise: Callable[[int], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Latents [B, C, H, W] from the noise z, of labels y [B].

        noise(k): standard normal, as z, for step k from 1 on, where the solver takes it.
        """
        advance = self.step if self._capture is None else self._replayed
        if self._capture is not None:
            self._load(z, y)
        x = z
        for k, (kind, numbers) in enumerate(zip(self.kinds, self._table(z), strict=True), start=1):
            drawn = noise(k) if noise is not None and self._solver.noisy and not kind.last else None
            x = advance(kind, x, y, numbers, drawn)
        return x if self._capture is None else x.clone()

    def step(
        self, kind: Kind, x: torch.Tensor, y: torch.Tensor, numbers: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """The state after a step of this kind from x [B, C, H, W]: a function of its tensors, all on one device.

        numbers: [n], a row of the table. noise: as x, for steps that take it.
        """
        count, values = len(kind.guided), numbers.unbind()
        times, scales, weights = values[:count], values[count : 2 * count], values[2 * count :]
        denoiser = Denoiser(self._model, y, self._guidance, self._guide)

        def network(x: torch.Tensor, i: int) -> torch.Tensor:
            return denoiser.evaluate(x, times[i], scales[i] if kind.guided[i] else None)

        return self._solver.update(network, x, Step(times, weights[: self._num_weights], kind.last), noise)

    def _table(self, z: torch.Tensor) -> torch.Tensor:
        """The numbers of all steps, [steps, n] in the state's dtype, on its device; short rows end with zeros."""
        if self._numbers is None or (self._numbers.device, self._numbers.dtype) != (z.device, z.dtype):
            width = max(map(len, self._rows))
            rows = [row + [0.0] * (width - len(row)) for row in self._rows]
            self._numbers = torch.tensor(rows, dtype=z.dtype, device=z.device)
        return self._numbers

    def _load(self, z: torch.Tensor, y: torch.Tensor) -> None:
        """Put a batch where the captured steps read it; one of another shape has what was captured made anew."""
        if self._static is None or self._static.x.shape != z.shape:
            self._replays.clear()
            self._static = Static(z.clone(), y.clone(), torch.zeros_like(z), self._table(z)[0].clone())
        self._static.x.copy_(z)
        self._static.y.copy_(y)

    def _replayed(self, kind: Kind, x: torch.Tensor, y: torch.Tensor, numbers: torch.Tensor, noise) -> torch.Tensor:
        static, capture = self._static, self._capture
        assert static is not None and capture is not None
        static.numbers.copy_(numbers)
        if noise is not None:
            static.noise.copy_(noise)
        if kind not in self._replays:
            before = static.x.clone()  # the calls that warm up move the state on
            self._replays[kind] = capture(
                lambda: static.x.copy_(self.step(kind, static.x, static.y, static.numbers, static.noise))
            )
            static.x.copy_(before)
        self._replays[kind]()
        return static.x
