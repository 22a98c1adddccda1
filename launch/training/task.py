"""The interface between the trainer and a model package."""

from collections.abc import Callable, Collection, Hashable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from launch.runtime.processes import Processes
from launch.training.loader import Batches, Tensors


class Task(Protocol):
    """A model package as the trainer uses it.

    `networks` are the trained networks by name, float32 and on the CPU when built; each gets an engine of its own.
    `validated` names those that `validate` and `pictures` call.
    """

    networks: dict[str, nn.Module]
    validated: Collection[str]
    batches: Batches

    def to(self, device: torch.device) -> None:
        """Move frozen helpers to the device."""

    def compile(self, mode: str, deterministic: bool) -> None:
        """Compile frozen helpers in a mode of `kernels.compile.modes`, as the engines compile the networks."""

    def draw(
        self,
        step: int,
        batch_size: int,
        device: torch.device,
        out: Tensors | None = None,
        *,
        seed: int | None = None,
    ) -> Tensors:
        """Every random number of optimizer step `step` (from 1) for the global batch, a function of (seed, step).

        With `out`, the result of an earlier call, its tensors are overwritten, so that every step finds them at the
        same addresses (CUDA graphs). seed: of the step, where it is not the task's.
        """

    def train_step(
        self,
        networks: Mapping[str, Callable],
        batch: Tensors,
        draws: Tensors,
        step: int,
        backward: Callable[[str, torch.Tensor], None],
    ) -> Tensors:
        """Losses of one micro-batch; calls `backward(name, loss)` for each network it steps; returns scalars to log."""

    def validation_draws(self, number: int, batch_size: int, device: torch.device) -> Tensors:
        """Every random number of the global batch `number` (from 0) of validation, the same every time."""

    def validate(self, networks: Mapping[str, Callable], batch: Tensors, draws: Tensors) -> Tensors:
        """What is measured of one micro-batch of validation data, without gradients: scalars, or a number for each
        sample that has it (NaN for the others)."""

    def state_dict(self) -> dict:
        """More state for a checkpoint (JSON), such as the latents' statistics."""

    def load_state_dict(self, state: dict) -> None:
        """Restore it; raises ValueError where it contradicts the run."""


@runtime_checkable
class DrawsPictures(Protocol):
    """A task of whose validation there is something to see; `num_pictures`: of how many samples (0: of none)."""

    num_pictures: int

    def pictures(self, networks: Mapping[str, Callable], batch: Tensors, draws: Tensors) -> Mapping[str, Tensors]:
        """Picture → caption → a row of it, for one micro-batch of validation data, without gradients.

        Rows as `launch.pictures.comparison` takes them. Names of pictures become folders of the run's directory.
        """


class Previews(Protocol):
    """Samples of a network in training, to look at."""

    every: int  # steps

    def sample(self, networks: Mapping[str, Callable], processes: Processes, batch_size: int | None) -> torch.Tensor:
        """Latents of all samples, on the CPU of every process; every process must call it, without gradients.

        batch_size: with which networks are called; None for any.
        """

    def draw(self, latents: torch.Tensor, device: torch.device, path: Path) -> None:
        """Decode latents on the device and write their picture, a PNG."""


class SampleFigures(Protocol):
    """Figures of samples of a network in training."""

    every: int  # steps
    facts: Mapping[str, Any]  # what figures depend on beside the weights, on the main process

    def measure(
        self, networks: Mapping[str, Callable], processes: Processes, batch_size: int
    ) -> tuple[Mapping[str, float | None], str | None]:
        """`samples/<figure>` → its value, and `samples/seconds`, that it took; why there are none (None), if so.

        Every process must call it, without gradients; the main one's values count.
        batch_size: with which networks are called.
        """


@runtime_checkable
class Measures(Protocol):
    """A task that measures more of a network than its losses, on request (`train.watch`)."""

    def measure(
        self, names: Collection[str], networks: Mapping[str, Callable], batch: Tensors, draws: Tensors
    ) -> Tensors:
        """Figures of a forward pass of some samples of a micro-batch, without gradients: key → scalar, on the device.

        names: those of `launch.training.config.MEASURED` that are wanted. Keys are `<figure>/<block>`; the largest over
            processes is logged.
        """


@runtime_checkable
class ChangesObjective(Protocol):
    """A task whose loss means something else from some step on."""

    def objective(self, step: int) -> Hashable:
        """What is minimised in a step: losses of steps where it differs are not to be compared."""


@runtime_checkable
class Warns(Protocol):
    """A task that knows what figures of its own are a reason to worry."""

    def warnings(self, row: Mapping[str, float | None]) -> Mapping[str, str]:
        """Cause → what to say of it, by the means of a row of the log; a pure function of them."""
