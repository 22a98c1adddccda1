"""Ways to sample, to be timed: the program's own with the ops of a backend, and the plain model under the plain loop.

All have the same weights (none of them zero), labels and noise, and the `sample` section of the published 64-epoch run.
A call of each kind stands for all of that kind, as the time of a network does not depend on what it is shown.
"""

from collections.abc import Callable
from functools import partial

import torch

import kernels
from bench.entrants.plain import PlainLightningDiT, plain_euler
from bench.entrants.tokenizers import flops_per_image, make_tokenizer, set_numerics
from bench.entrants.training import CONFIG, make_network
from bench.measure.timing import Lap
from bench.sampling import Variant
from kernels.compile.compilation import compiled
from kernels.registry import Ops
from launch.config import load
from launch.sample import Generator
from lightningdit.config import ModelConfig, SampleConfig
from lightningdit.flow import Transport
from lightningdit.latents import LatentStatistics
from lightningdit.model import LightningDiT
from lightningdit.sampler import Denoiser, Guidance, sample, sample_noise, sample_ode, time_grid
from vavae.config import AutoencoderConfig

#: Points of the grid by which contenders are judged: on it the first two of four calls lie below the interval.
JUDGED_POINTS = 5


def published_settings(precision: str) -> tuple[SampleConfig, Transport]:
    """The `sample` section of the 64-epoch run in that precision, and what integrates it."""
    run, _ = load(CONFIG, [f"sample.precision={precision}"], kind="lightningdit")
    return run.sampling(), Transport.from_config(run.transport)


class Setting:
    """What all ways to sample a model share: weights, settings, labels, and the results that they are judged by."""

    def __init__(self, config: ModelConfig, tokenizer: AutoencoderConfig, batch: int, precision: str,
                 device: torch.device | str):  # fmt: skip
        self.config, self.tokenizer, self.device = config, tokenizer, device
        self.settings, self.transport = published_settings(precision)
        self.y = torch.arange(batch, device=device) % config.num_classes
        self.shape = (config.in_channels, config.input_size, config.input_size)
        self.decode_flops = flops_per_image(tokenizer, config.input_size * tokenizer.downsample_ratio)["decode"]
        set_numerics()
        network = make_network(config, kernels.select("reference"), device)
        labels = network.y_embedder.embedding_table.weight  # of N(0, 0.02): labels, and so guidance, hardly matter
        torch.nn.init.normal_(labels, generator=torch.Generator(device).manual_seed(0))
        self._weights = network.state_dict()
        narrow = getattr(torch, precision)
        self.eager = self.judged_plain(self.plain(None if narrow == torch.float32 else narrow))
        self.exact = self.judged_plain(self.plain(None).double(), torch.float64)

    def network(self, ops: Ops) -> LightningDiT:
        """A network with the shared weights, float32, not to be trained."""
        network = make_network(self.config, ops, self.device)
        network.load_state_dict(self._weights)
        return network.eval().requires_grad_(False)

    def plain(self, autocast: torch.dtype | None) -> PlainLightningDiT:
        return PlainLightningDiT(self.network(kernels.select("reference")), autocast)

    def noise(self) -> torch.Tensor:
        """Where all samples of the batch start."""
        return sample_noise(self.settings.seed, range(len(self.y)), self.shape, device=self.y.device)

    def judged(self) -> SampleConfig:
        """The settings on the grid that contenders are judged by."""
        return self.settings.model_copy(update={"num_sampling_steps": JUDGED_POINTS})

    def judged_plain(self, network: PlainLightningDiT, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        times = time_grid(0.0, 1.0, JUDGED_POINTS, self.settings.timestep_shift).to(self.y.device)
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


class Sampler:
    """A way to sample, made from a `Setting`.

    Attributes:
        laps: part → what is timed. "noise" and "decode" are of the whole batch, the others of one call and its update.
        times: part → how often a batch of samples needs it.
        calls: (guided, unguided) calls that a whole sample needs.
        samples: latents of the batch on the grid that contenders are judged by, [B, C, S, S] float32.
    """

    laps: dict[str, Lap]
    times: dict[str, float]
    calls: tuple[int, int]
    samples: torch.Tensor


class OurSampler(Sampler):
    """`launch.sample.Generator` as the program makes it, but for the weights."""

    def __init__(self, variant: Variant, setting: Setting):
        ops, s = variant.ops(), setting.settings
        tokenizer = make_tokenizer(setting.tokenizer, ops, setting.device)
        statistics = LatentStatistics.neutral(setting.config.in_channels)
        generator = Generator(setting.network(ops), tokenizer, statistics, setting.transport, s)
        generator.to(setting.y.device)
        model, null = compiled(generator.model, variant.compile), setting.config.null_label
        indices = range(len(setting.y))
        self.samples = sample(model, setting.transport, setting.judged(), setting.y, indices, shape=setting.shape,
                              null_label=null).latents  # fmt: skip
        z, always = setting.noise(), Guidance(s.cfg_scale, null, channels=s.cfg_channels)
        guided, unguided = (partial(self._update, setting, Denoiser(model, setting.y, g), z) for g in (always, None))
        self.laps = {"noise": Lap(setting.noise), "guided": Lap(guided), "unguided": Lap(unguided),
                     "decode": Lap(partial(generator.pixels, self.samples))}  # fmt: skip
        self.calls = setting.calls()
        self.times = dict(zip(("guided", "unguided"), self.calls, strict=True))

    @torch.no_grad()
    def _update(self, setting: Setting, predict: Denoiser, z: torch.Tensor) -> torch.Tensor:
        return sample_ode(setting.transport, predict, z, method=setting.settings.sampling_method, steps=2)


class PlainSampler(Sampler):
    """The peer, both halves in every call; its images come from the tokenizer with the reference ops."""

    def __init__(self, variant: Variant, setting: Setting):
        s, narrow = setting.settings, getattr(torch, setting.settings.precision)
        plain = setting.plain(None if narrow == torch.float32 else narrow)
        network = compiled(plain, variant.compile, deterministic=False)
        self.samples = setting.judged_plain(network)
        statistics = LatentStatistics.neutral(setting.config.in_channels)
        tokenizer = make_tokenizer(setting.tokenizer, variant.ops(), setting.device)
        generator = Generator(network, tokenizer, statistics, setting.transport, s)
        ends, z = torch.tensor([0.0, 1.0], device=setting.y.device), setting.noise()
        self.laps = {"noise": Lap(setting.noise), "guided": Lap(partial(setting.plain_samples, network, z, ends)),
                     "decode": Lap(partial(generator.pixels, self.samples))}  # fmt: skip
        self.calls = setting.calls()
        self.times = {"guided": sum(self.calls)}


SAMPLERS: dict[str, Callable[[Variant, Setting], Sampler]] = {"ours": OurSampler, "plain": PlainSampler}
