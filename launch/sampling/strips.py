"""Strips of samples: between two samples, and of one on its way from noise to data.

Both follow the probability-flow ODE of a `sample` section with its guidance.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from launch.sampling.generator import SampleGenerator
from lightningdit.flow import Transport, unsqueeze_like
from lightningdit.guidance import Denoiser
from lightningdit.sampler import guidance_of, sample_noise, solve_ode
from lightningdit.solvers import time_grid


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Spherical interpolation of a [...] and b [...] at weights [K] from 0 to 1 → [K, ...].

    sin((1 − w)·θ)/sin θ · a + sin(w·θ)/sin θ · b, θ the angle between both (Shoemake, SIGGRAPH 1985): of two standard
    normal vectors, which are nearly orthogonal and of one length, it keeps the length, where a line's middle would be
    shorter by √2, and no noise that the network has seen. Linear where the angle vanishes.
    """
    x, y = a.flatten().double(), b.flatten().double()
    cosine = (x @ y) / (x.norm() * y.norm())
    theta, w = cosine.clamp(-1, 1).arccos(), weights.double()[:, None]  # [K, 1]
    if theta.sin() < 1e-6:
        path = (1 - w) * x + w * y
    else:
        path = (((1 - w) * theta).sin() * x + (w * theta).sin() * y) / theta.sin()
    return path.view(-1, *a.shape).to(a.dtype)


class BlendedLabels(nn.Module):
    """A label embedder under which the K samples of a strip have (1 − w)·e(y) + w·e(second), e(null) as it is.

    Labels come as [K], or [2K] where the second half is the null label's, as guidance asks for both at once.
    """

    weights: Tensor

    def __init__(self, embedder: nn.Module, second: int, weights: Tensor, null_label: int | None):
        super().__init__()
        self.embedder, self.second, self.null_label = embedder, second, null_label
        self.register_buffer("weights", weights)

    def forward(self, y: Tensor) -> Tensor:
        weights = self.weights.repeat(len(y) // len(self.weights))[:, None]  # [K or 2K, 1]
        second = torch.full_like(y, self.second)
        if self.null_label is not None:
            second = torch.where(y == self.null_label, y, second)
        one, two = self.embedder(y), self.embedder(second)  # [K or 2K, D]
        return torch.lerp(one, two, weights.to(one.dtype))


@torch.no_grad()
def interpolation(generator: SampleGenerator, indices: Sequence[int], labels: Sequence[int], count: int) -> Tensor:
    """`count` images uint8 [count, H, W, 3] between the samples with two indices and labels, both ends included.

    The noise goes along a great circle (`slerp`), the embedding of the label along a line. The ends are the samples.
    """
    device = generator.model.pos_embed.device
    noise = sample_noise(generator.settings.seed, indices, _shape(generator), device=device)  # [2, C, h, w]
    weights = torch.linspace(0, 1, count, device=device)
    z = slerp(noise[0], noise[1], weights)
    networks = [network for network in (generator.model, generator.guide) if network is not None]
    embedders = [network.y_embedder for network in networks]
    if labels[0] != labels[1]:
        for network in networks:
            blended = BlendedLabels(network.y_embedder, labels[1], weights, network.config.null_label)
            network.add_module("y_embedder", blended)
    try:
        latents = _solve(generator, z, torch.full((count,), labels[0], device=device))
    finally:
        for network, embedder in zip(networks, embedders, strict=True):
            network.y_embedder = embedder
    return torch.from_numpy(generator.pixels(latents))


@dataclass(frozen=True)
class Denoising:
    """A batch on its way: `times` [K], and of each sample images uint8 [B, K, H, W, 3] of the state at each time, and
    of the data that the network predicts from it."""

    times: list[float]
    states: Tensor
    predictions: Tensor


@torch.no_grad()
def denoising(generator: SampleGenerator, indices: Sequence[int], labels: Sequence[int], count: int) -> Denoising:
    """The samples with these indices and labels at `count` points of their solver's grid, spread evenly over it.

    Raises ValueError where the grid has fewer points.
    """
    settings, device = generator.settings, generator.model.pos_embed.device
    if not 2 <= count <= settings.num_sampling_steps:
        raise ValueError(f"{count} points: 2 to num_sampling_steps {settings.num_sampling_steps} are allowed")
    z = sample_noise(settings.seed, indices, _shape(generator), device=device)
    y = torch.tensor(labels, device=device)
    steps = settings.num_sampling_steps
    picked = [round(i * (steps - 1) / (count - 1)) for i in range(count)]
    states = {0: z}
    _solve(generator, z, y, lambda step, x: states.update({step: x}) if step in picked else None)
    interval = generator.transport.interval(generator.transport.sample_eps)
    grid = time_grid(*interval, steps, settings.timestep_shift).tolist()
    predict = _denoiser(generator, y)
    found, times = [], [grid[step] for step in picked]
    for step, t in zip(picked, times, strict=True):
        x, t_batch = states[step], z.new_full((len(z),), t)
        velocity = generator.transport.velocity(predict(x, t), x, t_batch)
        found.append((x, predicted_data(generator.transport, x, velocity, t_batch)))
    images = [[torch.from_numpy(generator.pixels(latents)) for latents in pair] for pair in found]
    states_BK, predictions_BK = (torch.stack([pair[i] for pair in images], 1) for i in (0, 1))
    return Denoising(times, states_BK, predictions_BK)


def predicted_data(transport: Transport, x: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """E[x₁ | x_t = x] [B, ...] of the velocity E[α̇ x₁ + σ̇ x₀ | x_t = x], as x = α x₁ + σ x₀: (σ v − σ̇ x)/(σ α̇ − σ̇ α).

    Of the linear path x + (1 − t)·v. Tweedie's formula is the same and has no value at t = 0, where α is 0.
    """
    (alpha, d_alpha), (sigma, d_sigma) = (f(unsqueeze_like(t, x)) for f in (transport.path.alpha, transport.path.sigma))
    return (sigma * velocity - d_sigma * x) / (sigma * d_alpha - d_sigma * alpha)


def _shape(generator: SampleGenerator) -> tuple[int, int, int]:
    config = generator.model.config
    return config.in_channels, config.input_size, config.input_size


def _denoiser(generator: SampleGenerator, y: Tensor) -> Denoiser:
    guidance = guidance_of(generator.settings, generator.model.config.null_label, generator.guide)
    return Denoiser(generator.model, y, guidance, generator.guide)


def _solve(generator: SampleGenerator, z: Tensor, y: Tensor, callback=None) -> Tensor:
    """Latents [B, C, h, w] of noise z and labels y [B]; raises ValueError for settings of an SDE."""
    settings = generator.settings
    if settings.mode != "ODE":
        raise ValueError(f"strips follow an ODE, and sample.mode is {settings.mode}: say sample.mode=ODE")
    return solve_ode(generator.transport, settings, _denoiser(generator, y), z, callback)
