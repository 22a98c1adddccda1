"""Previews of a LightningDiT in training: few-step samples from fixed noise and classes, decoded by its tokenizer."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from launch.config import ConfigError, LightningDiTRun, select_ops
from launch.hub import is_reference
from launch.pictures import sample_grid
from launch.runtime.processes import Processes
from launch.trained import build_tokenizer
from launch.training.memory import DECODED
from lightningdit.config import ModelConfig, SampleConfig
from lightningdit.flow import Transport
from lightningdit.latents import LatentStatistics
from lightningdit.sampler import sample
from lightningdit.task import LightningDiTTask
from vavae.images import to_uint8
from vavae.model import AutoencoderKL


class DiffusionPreviews:
    """Samples of `settings` whose noise and class follow from their number alone; see `launch.training.task.Previews`.

    Args:
        count: how many.
        every: the steps between two pictures.
        tokenizer: on the CPU of the main process, where latents are decoded; it is on the device only meanwhile.
        names: of the classes, where they are known.
    """

    def __init__(
        self,
        network: ModelConfig,
        transport: Transport,
        settings: SampleConfig,
        statistics: LatentStatistics,
        tokenizer: AutoencoderKL | None,
        *,
        count: int,
        every: int,
        names: Sequence[str] = (),
    ):
        self.every = every
        self._network, self._transport, self._settings = network, transport, settings
        self._statistics, self._tokenizer, self._names = statistics, tokenizer, names
        self.labels = preview_labels(count, network.num_classes)

    @torch.no_grad()
    def sample(self, networks: Mapping[str, Callable], processes: Processes, batch_size: int | None) -> Tensor:
        """Latents [N, C, H, W] float32 on the CPU, each made by one of the processes, which call the network equally
        often: under ZeRO 3 it takes all of them."""
        count, config = len(self.labels), self._network
        own = -(-count // processes.world_size)
        numbers = [(processes.rank * own + i) % count for i in range(own)]
        model = networks["model"] if batch_size is None else in_batches(networks["model"], batch_size)
        y = torch.tensor(self.labels, device=processes.device)[numbers]
        shape = (config.in_channels, config.input_size, config.input_size)
        made = sample(model, self._transport, self._settings, y, numbers, shape=shape, null_label=config.null_label)
        return torch.cat(processes.all_gather(made.latents.cpu()))[:count]

    @torch.no_grad()
    def draw(self, latents: Tensor, device: torch.device, path: Path) -> None:
        """A row of images for each class."""
        assert self._tokenizer is not None
        images = decode_in_parts(self._tokenizer, self._statistics, latents, device)
        sample_grid(images, torch.tensor(self.labels), path, columns=len(images), names=self._names)


@torch.no_grad()
def decode_in_parts(
    tokenizer: AutoencoderKL, statistics: LatentStatistics, latents: Tensor, device: torch.device
) -> Tensor:
    """Images of normalised latents [N, C, H, W], uint8 [N, H, W, 3] on the CPU, decoded a few at a time by a tokenizer
    that is on the device only meanwhile."""
    tokenizer.to(device)
    try:
        parts = [
            to_uint8(tokenizer.decode(statistics.denormalise(part.to(device)))).cpu() for part in latents.split(DECODED)
        ]
    finally:
        tokenizer.to("cpu")
    return torch.cat(parts).permute(0, 2, 3, 1)


def preview_labels(count: int, num_classes: int) -> list[int]:
    """Labels of `count` previews: about as many classes, from all over, as images of each."""
    classes = min(num_classes, max(round(count**0.5), 1))
    return [(i % classes) * num_classes // classes for i in range(count)]


def in_batches(model: Callable[..., Tensor], size: int) -> Callable[..., Tensor]:
    """`model(x, t, y=y, …)` for any number of samples, called with exactly `size` at a time, filled up with the first
    ones again: a compiled network is compiled for one size."""

    def call(x: Tensor, t: Tensor, **others: Tensor) -> Tensor:
        found = []
        for first in range(0, len(x), size):
            places = torch.arange(first, first + size, device=x.device) % len(x)
            # Copied: a CUDA graph gives its result at the same address every time.
            given = {name: value[places] for name, value in others.items()}
            found.append(model(x[places], t[places], **given)[: len(x) - first].clone())
        return torch.cat(found)

    return call


def few_step_settings(run: LightningDiTRun, points: int) -> SampleConfig:
    """The `sample` section for samples in training: an ODE solver of `points` points, without likelihood.

    A solver that chooses its steps by itself, and one of the SDE, is replaced by Euler's; a model without a null label
    is not guided, and no other network guides. Average velocities keep their own few steps.
    """
    found = run.sampling()
    if found.mode == "meanflow":
        if run.transport.objective == "flow":
            raise ConfigError("sample.mode is meanflow, but transport.objective flow trains no average velocities")
        return found
    fixed = found.mode == "ODE" and found.sampling_method.lower() != "dopri5"
    return found.model_copy(
        update={
            "mode": "ODE",
            "sampling_method": found.sampling_method if fixed else "euler",
            "num_sampling_steps": points,
            "cfg_scale": found.cfg_scale if run.network().null_label is not None else 1.0,
            "guide_ckpt_path": None,
            "guide_step": None,
            "likelihood": False,
        }
    )


def make_previews(run: LightningDiTRun, task: LightningDiTTask, processes: Processes) -> DiffusionPreviews | None:
    """The previews of a run, or None where it wants none; raises ConfigError, on every process, for a tokenizer that
    cannot be loaded or decodes other latents."""
    count = run.num_previews()
    if count and run.train.previews is None and not processes.broadcast(_is_there(run.vae.ckpt_path or "")):
        if processes.is_main:
            print(f"no previews: vae.ckpt_path {run.vae.ckpt_path} is not there")
        count = 0
    if not count:
        return None
    tokenizer = error = None
    if processes.is_main:
        try:
            tokenizer = _load(run)
        except ValueError as e:
            error = e
    processes.raise_on_all(error)
    return DiffusionPreviews(
        run.network(),
        task.transport,
        few_step_settings(run, run.train.preview_steps),
        task.batches.statistics,
        tokenizer,
        count=count,
        every=run.train.preview_every or run.train.valid_every or run.train.ckpt_every,
        names=task.batches.classes or (),
    )


def _is_there(path: str) -> bool:
    """Whether a tokenizer is here or, by its reference to the hub, can be."""
    return is_reference(path) or Path(path).exists()


def _load(run: LightningDiTRun) -> AutoencoderKL:
    return build_tokenizer(run, select_ops(run.kernels), run.network().in_channels)
