"""The sampling program from noise to images in files on a small model: as it is, and as it was in revision 0ac9773.

That one made 4 images at a time by default, each batch in one loop with both halves in a call, decoded it, wrote it to
a file of its own and joined the files at the end. Both have the same weights, which are none of them zero. This one
computes whole units, several at a time, and writes beside it (`launch.sampling`).
"""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

import kernels
from bench.workloads.tokenizers import make_tokenizer
from bench.workloads.training import make_network
from bench.workloads.variants import ProgramVariant
from common.files import atomic_write
from common.seeds import generator
from launch.runtime.processes import Processes
from launch.sampling.generator import SampleGenerator
from launch.sampling.outputs import COUNTS, NpzOutput
from launch.sampling.pipeline import Pipeline
from launch.sampling.produce import Job, Making, produce
from launch.sampling.units import batch_size
from lightningdit.config import ModelConfig, SampleConfig
from lightningdit.flow import Transport
from lightningdit.latents import LatentStatistics
from lightningdit.solvers import time_grid
from vavae.config import AutoencoderConfig
from vavae.images import to_uint8

Images = Callable[[Sequence[int], Sequence[int]], np.ndarray]  # of indices and all labels, uint8 [b, H, W, 3]
Program = Callable[[], np.ndarray]  # uint8 [N, H, W, 3], read back from what it has written


class ProgramSetup:
    """What the ways to run the program share: weights, settings, and the labels of the images."""

    def __init__(self, config: ModelConfig, tokenizer: AutoencoderConfig, images: int, points: int):
        ops = kernels.select("auto")
        self.config, self.labels = config, [i % config.num_classes for i in range(images)]
        self.settings = SampleConfig(preset="paper-64ep", num_sampling_steps=points)
        self.network = make_network(config, ops, "cpu").eval().requires_grad_(False)
        self.tokenizer = make_tokenizer(tokenizer, ops, "cpu")
        self.statistics = LatentStatistics.identity(config.in_channels)

    def program(self, variant: ProgramVariant) -> Program:
        """How that variant makes all images."""
        if variant.engine == "plain":
            assert variant.at_once is not None, "the program as it was has a number at once"
            return partial(all_images, self._plain_images, self.labels, variant.at_once)
        return partial(self._produced, variant.at_once)

    def _produced(self, at_once: int | None) -> np.ndarray:
        processes, labels = Processes(0, 1, torch.device("cpu")), np.array(self.labels)
        made = SampleGenerator(self.network, self.tokenizer, self.statistics, Transport(), self.settings, labels=labels)

        def prepare() -> Making:
            pipeline = Pipeline(made.solve, made.decode, processes.device)
            image_size = self.config.input_size * self.tokenizer.config.downsample_ratio
            size = batch_size(
                at_once, processes.device, self.config, image_size, weight_bytes=4, workers=pipeline.workers
            )
            return pipeline, size, made.checked

        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):  # which says where they are
            output = NpzOutput(Path(folder), labels)
            job = Job(Path(folder), len(labels), output, {}, COUNTS, np.arange(0), lambda images, path: None)
            return np.load(produce(job, processes, prepare))["arr_0"]

    @torch.no_grad()
    def _plain_images(self, indices: Sequence[int], labels: Sequence[int]) -> np.ndarray:
        z = plain_samples(self.network, self.settings, torch.tensor([labels[i] for i in indices]), indices)
        decoded = self.tokenizer.decode(self.statistics.denormalise(z))
        return to_uint8(decoded).permute(0, 2, 3, 1).contiguous().numpy()


def plain_samples(network, settings: SampleConfig, y: torch.Tensor, indices: Sequence[int]) -> torch.Tensor:
    """Latents [B, C, S, S] of these indices and labels y [B] by Euler's method, both halves of a guided call in one."""
    config, s = network.config, settings
    shape = (config.in_channels, config.input_size, config.input_size)
    x = torch.stack([torch.randn(shape, generator=generator(s.seed, i, 0)) for i in indices])
    both = torch.cat([y, torch.full_like(y, config.null_label)])
    for t, after in pairwise(time_grid(0.0, 1.0, s.num_sampling_steps, s.timestep_shift).tolist()):
        if t < s.cfg_interval_start:
            velocity = network(x, torch.full((len(x),), t), y=y)
        else:
            cond, uncond = network(torch.cat([x, x]), torch.full((2 * len(x),), t), y=both).chunk(2)
            k = s.cfg_channels
            guided = uncond[:, :k] + s.cfg_scale * (cond[:, :k] - uncond[:, :k])
            velocity = torch.cat([guided, cond[:, k:]], dim=1)
        x = x + (after - t) * velocity
    return x


def all_images(images_of: Images, labels: Sequence[int], at_once: int) -> np.ndarray:
    """uint8 [N, H, W, 3]: all batches, each in a file of its own until the last is there."""
    starts = [*range(0, len(labels), at_once), len(labels)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{start:07d}.npz" for start in starts[:-1]]
        for path, (start, stop) in zip(paths, pairwise(starts), strict=True):
            with atomic_write(path) as file:
                np.savez(file, images=images_of(range(start, stop), labels))
        return np.concatenate([np.load(path)["images"] for path in paths])
