"""Samplers: the program's own with the ops of a backend, and the plain model under the plain loop.

All have the same weights (none of them zero), labels and noise, and the `sample` section of the published 64-epoch run.
A call of each kind stands for all of that kind, as the time of a network does not depend on what it is shown.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import kernels
from bench.measure.timing import Iteration
from bench.workloads.plain import PlainLightningDiT, plain_euler
from bench.workloads.tokenizers import flops_per_image, make_tokenizer, set_numerics
from bench.workloads.training import CONFIG, make_network
from bench.workloads.variants import Variant
from kernels.compile.modes import compiled
from kernels.registry import Ops
from launch.config import load
from launch.sample import SampleGenerator
from lightningdit.config import ModelConfig
from lightningdit.flow import Transport
from lightningdit.guidance import Guidance
from lightningdit.latents import LatentStatistics
from lightningdit.model import LightningDiT
from lightningdit.sampler import guidance_of, sample, sample_noise
from lightningdit.solvers import OdeSteps, time_grid
from lightningdit.step_graphs import StepRunner, cuda_graphs
from vavae.config import AutoencoderConfig

#: Points of the grid on which samples are checked: on it the first two of four calls lie below the interval.
CHECKED_POINTS = 5


class SamplingSetup:
    """State that the samplers of a model share: weights, settings, labels, and the results to check against."""

    def __init__(
        self, config: ModelConfig, tokenizer: AutoencoderConfig, batch: int, precision: str, device: torch.device | str
    ):
        self.config, self.tokenizer, self.device = config, tokenizer, device
        run, _ = load(CONFIG, [f"sample.precision={precision}"], kind="lightningdit")  # the 64-epoch run
        self.settings, self.transport = run.sampling(), Transport.from_config(run.transport)
        self.y = torch.arange(batch, device=device) % config.num_classes
        self.shape = (config.in_channels, config.input_size, config.input_size)
        self.decode_flops = flops_per_image(tokenizer, config.input_size * tokenizer.downsample_ratio)["decode"]
        set_numerics()
        network = make_network(config, kernels.select("reference"), device)
        labels = network.y_embedder.embedding_table.weight  # of N(0, 0.02): labels, and so guidance, hardly matter
        torch.nn.init.normal_(labels, generator=torch.Generator(device).manual_seed(0))
        self._weights = network.state_dict()
        dtype = getattr(torch, precision)
        self.eager = self.baseline_samples(self.plain(None if dtype == torch.float32 else dtype))
        self.exact = self.baseline_samples(self.plain(None).double(), torch.float64)

    def network(self, ops: Ops) -> LightningDiT:
        """A network with the shared weights, float32, not to be trained."""
        network = make_network(self.config, ops, self.device)
        network.load_state_dict(self._weights)
        return network.eval().requires_grad_(False)

    def plain(self, autocast: torch.dtype | None) -> PlainLightningDiT:
        return PlainLightningDiT(self.network(kernels.select("reference")), autocast)

    def noise(self) -> torch.Tensor:
        """Starting noise of the batch."""
        return sample_noise(self.settings.seed, range(len(self.y)), self.shape, device=self.y.device)

    def baseline_samples(self, network: PlainLightningDiT, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        times = time_grid(0.0, 1.0, CHECKED_POINTS, self.settings.timestep_shift).to(self.y.device)
        return self.plain_samples(network, self.noise().to(dtype), times)

    def plain_samples(self, network: Callable, z: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        s = self.settings
        channels = self.config.in_channels if s.cfg_channels is None else s.cfg_channels
        null, start = self.config.null_label, s.cfg_interval_start
        return plain_euler(network, z, self.y, times, null, s.cfg_scale, start, channels)

    def calls(self) -> tuple[int, int]:
        """Guided and unguided calls of a whole sample, counted by the sampler itself with a network of nothing."""
        nothing, y = (lambda x, t, y: torch.zeros_like(x)), torch.zeros(1, dtype=torch.long)
        made = sample(nothing, self.transport, self.settings, y, [0], shape=(1, 1, 1), null_label=1)
        return made.guided_nfe, made.nfe - made.guided_nfe


@dataclass
class Sampler:
    """A way to sample.

    Attributes:
        iterations: part → what is timed: "noise" and "decode" of the whole batch, others of one call and its update.
        times: part → how often a batch of samples needs it.
        calls: (guided, unguided) calls that a whole sample needs.
        samples: latents of the batch on the short grid, to be checked, [B, C, S, S] float32.
    """

    iterations: dict[str, Iteration]
    times: dict[str, float]
    calls: tuple[int, int]
    samples: torch.Tensor


def our_sampler(variant: Variant, setup: SamplingSetup) -> Sampler:
    """`launch.sample.SampleGenerator` as the program makes it, but for the weights."""
    ops, s, null = variant.ops(), setup.settings, setup.config.null_label
    generator = _generator(setup, ops, setup.network(ops))
    generator.to(setup.y.device)
    # Captured is the whole step, so Inductor's own graphs stay off.
    model = compiled(generator.model, "inductor" if variant.compile == "cudagraphs" else variant.compile)
    capture = cuda_graphs() if variant.compile == "cudagraphs" else None

    def steps(points: int, shift: float, guidance: Guidance | None) -> Callable[[], torch.Tensor]:
        solver = OdeSteps(setup.transport, s.sampling_method, points, shift)
        return partial(StepRunner(solver, model, guidance, capture=capture), setup.noise(), setup.y)

    samples = steps(CHECKED_POINTS, s.timestep_shift, guidance_of(s, null))()
    always = Guidance(s.cfg_scale, null, channels=s.cfg_channels)
    updates = {"guided": steps(2, 0.0, always), "unguided": steps(2, 0.0, None)}
    return _sampler(setup, generator, samples, updates, dict(zip(updates, setup.calls(), strict=True)))


def plain_sampler(variant: Variant, setup: SamplingSetup) -> Sampler:
    """The plain model, both halves in every call; its images come from the tokenizer with the reference ops."""
    dtype = getattr(torch, setup.settings.precision)
    network = compiled(setup.plain(None if dtype == torch.float32 else dtype), variant.compile, deterministic=False)
    ends, z = torch.tensor([0.0, 1.0], device=setup.y.device), setup.noise()
    updates = {"guided": partial(setup.plain_samples, network, z, ends)}
    generator, samples = _generator(setup, variant.ops(), network), setup.baseline_samples(network)
    return _sampler(setup, generator, samples, updates, {"guided": sum(setup.calls())})


def _generator(setup: SamplingSetup, ops: Ops, network: Callable) -> SampleGenerator:
    tokenizer = make_tokenizer(setup.tokenizer, ops, setup.device)
    statistics = LatentStatistics.identity(setup.config.in_channels)
    return SampleGenerator(network, tokenizer, statistics, setup.transport, setup.settings)


def _sampler(
    setup: SamplingSetup, generator: SampleGenerator, samples: torch.Tensor, updates: dict[str, Callable], times: dict
) -> Sampler:
    parts = {"noise": setup.noise, **updates, "decode": partial(generator.pixels, samples)}
    return Sampler({name: Iteration(part) for name, part in parts.items()}, times, setup.calls(), samples)


SAMPLERS: dict[str, Callable[[Variant, SamplingSetup], Sampler]] = {"ours": our_sampler, "plain": plain_sampler}
