"""Sampling: ODE and SDE solvers, the timestep shift, classifier-free guidance, likelihood.

Times are host floats, so no step waits for the device (dopri5 alone reads its error estimate). Guidance begins with a
jump of the prediction; dopri5 solves up to it and restarts there, so that no step crosses it. A sample depends on its
seed and index only: its numbers are drawn on the CPU, one generator per sample. Solvers work in the dtype of the
noise they are given. Sources: SiT (arXiv 2401.08740) for the SDE, arXiv 2501.01423 for shift and interval.

Shapes: B samples, C latent channels, H and W latent height and width; solvers take states of any shape [B, ...].
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torchdiffeq

from common.seeds import generator
from lightningdit.config import LAST_STEPS, ODE_METHODS, SDE_METHODS, SampleConfig
from lightningdit.flow import Transport, choose, standard_normal_logp, unsqueeze_like

Predict = Callable[[torch.Tensor, float], torch.Tensor]  # the network's output for x at the host time t
Callback = Callable[[int, torch.Tensor], None]  # called with the grid index reached and the state there


class SolverError(ValueError):
    """An adaptive solver finds no step: what it integrates is not finite, or not smooth enough for its tolerances."""


def sample_noise(
    seed: int, indices: Sequence[int], shape: Sequence[int], *, draw: int = 0, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Standard normal [len(indices), *shape] float32; row i is a function of (seed, indices[i], draw) alone.

    Draw 0 is the initial noise, draw k the noise of SDE step k (of an ODE, draw 1 probes its divergence). The same on
    every device.
    """
    rows = [torch.randn(tuple(shape), generator=generator(seed, int(index), draw)) for index in indices]
    return torch.stack(rows).to(device)  # [B, *shape]


def time_grid(start: float, end: float, points: int, shift: float = 0.0) -> torch.Tensor:
    """[points] float32 on the CPU: evenly spaced, then t → s·t / (1 + (s - 1)·t) for a shift s other than 0."""
    if points < 2:
        raise ValueError(f"num_sampling_steps is {points}; a grid has at least 2 points")
    t = torch.linspace(start, end, points)
    return shift * t / (1 + (shift - 1) * t) if shift else t


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: uncond + scale·(cond - uncond) from time `interval_start` on.

    channels: how many leading channels are guided (None: all; the published code guides 3), the rest stay conditional.
    """

    scale: float
    null_label: int
    interval_start: float = 0.0
    channels: int | None = None

    @property
    def start(self) -> float:
        """The first guided time; infinite where none is."""
        # Times are float32: a start of 0.11 has to mean the float32 next to it for t = 0.11 to count as reached.
        return math.inf if self.scale == 1 else torch.tensor(self.interval_start, dtype=torch.float32).item()

    def applies(self, t: float) -> bool:
        """Whether a call at time t is guided."""
        return t >= self.start


class Denoiser:
    """`model(x, t, y)` for fixed labels, with `guidance` from its start on, counting its calls.

    nfe: calls by the solver. guided_nfe: those that also ran the unconditional half.
    """

    def __init__(
        self, model: Callable[..., torch.Tensor], y: torch.Tensor | None = None, guidance: Guidance | None = None
    ):
        if guidance is not None and y is None:
            raise ValueError("guidance needs labels y")
        self.model, self.y, self.guidance = model, y, guidance
        self.labels = {} if y is None else {"y": y}
        self.nfe = self.guided_nfe = 0

    def segments(self, start: float, end: float) -> Iterator[tuple[float, float, Predict]]:
        """(from, to, prediction) along the times from start to end, in either direction, cut where guidance begins.

        The prediction of a segment is guided at all times or at none, at its ends and beyond them too: it never jumps.
        """
        jump = math.inf if self.guidance is None else self.guidance.start
        inside = [jump] if min(start, end) < jump < max(start, end) else []
        for t, after in pairwise([start, *inside, end]):
            yield t, after, partial(self, guided=(t + after) / 2 >= jump)

    def __call__(self, x: torch.Tensor, t: float, guided: bool | None = None) -> torch.Tensor:
        """The prediction for x [B, C, ...] at the host time t, in x's dtype; guided: None for what holds at t."""
        self.nfe += 1
        guidance = self.guidance
        if guided is None:
            guided = guidance is not None and guidance.applies(t)
        if not guided:
            return self.model(x, x.new_full((len(x),), t), **self.labels).to(x.dtype)
        self.guided_nfe += 1
        assert guidance is not None and self.y is not None
        labels = torch.cat([self.y, torch.full_like(self.y, guidance.null_label)])  # [2B]
        output = self.model(torch.cat([x, x]), x.new_full((2 * len(x),), t), y=labels).to(x.dtype)  # [2B, C, ...]
        cond, uncond = output.chunk(2)  # [B, C, ...] both
        return guide(cond, uncond, guidance.scale, guidance.channels)


def guide(cond: torch.Tensor, uncond: torch.Tensor, scale: float, channels: int | None) -> torch.Tensor:
    """uncond + scale·(cond - uncond) on the first `channels` of axis 1 (None: all), cond on the others."""
    if channels is None or channels >= cond.shape[1]:
        return uncond + scale * (cond - uncond)
    guided = uncond[:, :channels] + scale * (cond[:, :channels] - uncond[:, :channels])
    return torch.cat([guided, cond[:, channels:]], dim=1)


# Butcher tableaus of explicit Runge-Kutta methods: (c_i, row a_i) of each stage, then the weights b.
# rk4 is the 3/8 rule, which is what torchdiffeq, and so the published code, runs under that name.
_TABLEAUS: dict[str, tuple[list[tuple[float, tuple[float, ...]]], tuple[float, ...]]] = {
    "euler": ([(0.0, ())], (1.0,)),
    "midpoint": ([(0.0, ()), (1 / 2, (1 / 2,))], (0.0, 1.0)),
    "heun": ([(0.0, ()), (1.0, (1.0,))], (1 / 2, 1 / 2)),
    "heun3": ([(0.0, ()), (1 / 3, (1 / 3,)), (2 / 3, (0.0, 2 / 3))], (1 / 4, 0.0, 3 / 4)),
    "rk4": (
        [(0.0, ()), (1 / 3, (1 / 3,)), (2 / 3, (-1 / 3, 1.0)), (1.0, (1.0, -1.0, 1.0))],
        (1 / 8, 3 / 8, 3 / 8, 1 / 8),
    ),
}


def _add_stages(x: torch.Tensor, k: Sequence[torch.Tensor], weights: Sequence[float], dt: float) -> torch.Tensor:
    """x + dt · Σ weights_i · k_i."""
    for k_i, weight in zip(k, weights, strict=True):
        if weight:
            x = x + (weight * dt) * k_i
    return x


def _runge_kutta_step(velocity: Predict, x: torch.Tensor, t: float, dt: float, method: str) -> torch.Tensor:
    stages, b = _TABLEAUS[method]
    k: list[torch.Tensor] = []
    for c_i, a_i in stages:
        k.append(velocity(_add_stages(x, k, a_i, dt), t + c_i * dt))
    return _add_stages(x, k, b, dt)


def sample_ode(
    transport: Transport,
    predict: Predict,
    z: torch.Tensor,
    *,
    method: str = "euler",
    steps: int = 250,
    shift: float = 0.0,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    callback: Callback | None = None,
) -> torch.Tensor:
    """Integrate the probability-flow ODE from noise z [B, ...] to data over a grid of `steps` points.

    predict(x, t) is the network's output at the host time t, such as a `Denoiser`. dopri5 chooses its own steps within
    atol and rtol and may evaluate past t = 1. Raises ValueError on an unknown method, SolverError where dopri5 fails.
    """
    choose("ODE method", method, dict.fromkeys(ODE_METHODS))
    grid = time_grid(*transport.interval(transport.sample_eps), steps, shift)

    def velocity(predict: Predict, x: torch.Tensor, t: float) -> torch.Tensor:
        return transport.velocity(predict(x, t), x, x.new_full((len(x),), t))

    times, x = grid.tolist(), z
    if method == "dopri5":
        for i, x in enumerate(_dopri5(velocity, predict, z, times, atol, rtol), start=1):
            if callback:
                callback(i, x)
        return x
    for i, (t, t_next) in enumerate(pairwise(times), start=1):
        x = _runge_kutta_step(partial(velocity, predict), x, t, t_next - t, method)
        if callback:
            callback(i, x)
    return x


def _dopri5(derivative, predict: Predict, state, times: Sequence[float], atol: float, rtol: float) -> Iterator:
    """The states at times[1:], in order, of d state / dt = derivative(predict, state, t); a tensor or a tuple of them.

    The step control assumes a smooth derivative, so each segment of a `Denoiser` is solved by itself.
    """
    first, last = times[0], times[-1]
    segments = predict.segments(first, last) if isinstance(predict, Denoiser) else [(first, last, predict)]
    for start, end, segment_predict in segments:
        points = [start, *(t for t in times if min(start, end) < t < max(start, end)), end]
        states = _solve(partial(derivative, segment_predict), state, points, atol, rtol)
        state = states[-1]
        yield from (x for t, x in zip(points[1:], states[1:], strict=True) if t in times)


def _solve(derivative, state, points: list[float], atol: float, rtol: float) -> list:
    x = state[0] if isinstance(state, tuple) else state
    t = torch.tensor(points, device=x.device, dtype=x.dtype)
    try:
        path = torchdiffeq.odeint(lambda t, x: derivative(x, float(t)), state, t, method="dopri5", atol=atol, rtol=rtol)
    except AssertionError as error:
        if not str(error).startswith(("underflow in dt", "non-finite values in state")):
            raise
        raise SolverError(
            f"dopri5 finds no step between t = {points[0]:g} and {points[-1]:g}: the network's output is "
            f"not finite, or not smooth enough for atol {atol:g} and rtol {rtol:g}"
        ) from None
    return list(zip(*path, strict=True)) if isinstance(state, tuple) else list(path)


def sample_sde(
    transport: Transport,
    predict: Predict,
    z: torch.Tensor,
    noise: Callable[[int], torch.Tensor],
    *,
    method: str = "euler",
    steps: int = 250,
    shift: float = 0.0,
    form: str = "sigma",
    norm: float = 1.0,
    last_step: str | None = "Mean",
    last_step_size: float = 0.04,
    callback: Callback | None = None,
) -> torch.Tensor:
    """Integrate the reverse SDE dx = (v + g·score) dt + sqrt(2 g) dw from noise z [B, ...] to data.

    noise(k) is the standard normal tensor of step k (1-based), as z. form, norm: g(t), see `Transport.diffusion`.
    last_step: the noiseless step over the remaining time `last_step_size`: along the SDE's drift (Mean), to the
    posterior mean (Tweedie), along the ODE (Euler), or None: the grid itself runs to the end. Raises ValueError on an
    unknown name.
    """
    choose("SDE method", method, dict.fromkeys(SDE_METHODS))
    if last_step is not None:
        choose("last step", last_step, dict.fromkeys(LAST_STEPS))
    remaining = 0.0 if last_step is None else last_step_size
    interval = transport.interval(transport.sample_eps, sde=True, form=form, last_step_size=remaining)
    grid = time_grid(*interval, steps, shift)

    def drift(x: torch.Tensor, t: float) -> torch.Tensor:
        t_batch = x.new_full((len(x),), t)
        output, g = predict(x, t), transport.diffusion(x, t_batch, form, norm)
        return transport.velocity(output, x, t_batch) + g * transport.score(output, x, t_batch)

    def noise_increment(x: torch.Tensor, t: float, dt: float, k: int) -> torch.Tensor:
        g = transport.diffusion(x, x.new_full((len(x),), t), form, norm)
        return (2 * g * dt).sqrt() * noise(k).to(x)

    times, x = grid.tolist(), z
    for k, (t, t_next) in enumerate(pairwise(times), start=1):
        dt = t_next - t
        if method == "euler":
            x = x + drift(x, t) * dt + noise_increment(x, t, dt, k)
        else:  # Heun on the drift, after the noise
            x = x + noise_increment(x, t, dt, k)
            d1 = drift(x, t)
            x = x + dt / 2 * (d1 + drift(x + dt * d1, t_next))
        if callback:
            callback(k, x)
    if last_step is None:
        return x
    t = times[-1]
    if last_step == "Mean":
        return x + remaining * drift(x, t)
    t_batch, output = x.new_full((len(x),), t), predict(x, t)
    if last_step == "Euler":
        return x + remaining * transport.velocity(output, x, t_batch)
    alpha, sigma = (f(unsqueeze_like(t_batch, x))[0] for f in (transport.path.alpha, transport.path.sigma))
    return (x + sigma**2 * transport.score(output, x, t_batch)) / alpha


@dataclass(frozen=True)
class Samples:
    """Latents [B, C, H, W] float32 and what they cost: solver calls, and those that ran the unconditional half too.

    log_likelihood: [B] float32, of the latents under the model in nats, where it was asked for.
    """

    latents: torch.Tensor
    nfe: int
    guided_nfe: int
    log_likelihood: torch.Tensor | None = None


@torch.no_grad()
def sample(
    model: Callable[..., torch.Tensor],
    transport: Transport,
    config: SampleConfig,
    y: torch.Tensor,
    indices: Sequence[int],
    *,
    shape: Sequence[int],
    null_label: int | None,
    callback: Callback | None = None,
) -> Samples:
    """The samples with these `indices` and labels y [B] (on the model's device) under a `sample` section.

    shape: (C, H, W) of one latent. null_label: None for a model without one, which cannot be guided.
    """
    guidance = None
    if config.cfg_scale != 1:
        if null_label is None:
            raise ValueError(
                f"cfg_scale {config.cfg_scale} needs a null label; trained with class_dropout_prob 0, use 1"
            )
        guidance = Guidance(config.cfg_scale, null_label, config.cfg_interval_start, config.cfg_channels)
    if len(indices) != len(y):
        raise ValueError(f"{len(indices)} indices for {len(y)} labels")
    predict = Denoiser(model, y, guidance)
    z = sample_noise(config.seed, indices, shape, device=y.device)  # [B, C, H, W]
    method = config.sampling_method.lower()
    common: dict[str, Any] = dict(method=method, steps=config.num_sampling_steps, shift=config.timestep_shift)
    if config.mode == "ODE":
        latents = sample_ode(transport, predict, z, atol=config.atol, rtol=config.rtol, callback=callback, **common)
    else:
        latents = sample_sde(
            transport,
            predict,
            z,
            lambda k: sample_noise(config.seed, indices, shape, draw=k, device=y.device),
            form=config.diffusion_form,
            norm=config.diffusion_norm,
            last_step=config.last_step,
            last_step_size=config.last_step_size,
            callback=callback,
            **common,
        )
    logp = None
    if config.likelihood:
        signs = torch.where(sample_noise(config.seed, indices, shape, draw=1, device=y.device) < 0, -1.0, 1.0)
        logp, _ = log_likelihood(transport, Denoiser(model, y), latents, signs, atol=config.atol, rtol=config.rtol)
    return Samples(latents, predict.nfe, predict.guided_nfe, logp)


def log_likelihood(
    transport: Transport,
    predict: Predict,
    x1: torch.Tensor,
    probe: torch.Tensor,
    *,
    atol: float = 1e-6,
    rtol: float = 1e-3,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p(x1) [B] in nats, the noise x1 [B, ...] comes from), by the ODE run from data to noise with dopri5.

    The divergence is Hutchinson's estimate with `probe`, independent signs ±1 shaped as x1: unbiased, and exact for a
    diagonal Jacobian (arXiv 2011.13456, section D.2). Raises SolverError where dopri5 fails.
    """
    start, end = torch.tensor(transport.interval(transport.sample_eps)).tolist()  # times are float32

    def derivative(predict: Predict, state: tuple[torch.Tensor, torch.Tensor], t: float):
        x = state[0].detach().requires_grad_()
        with torch.enable_grad():
            velocity = transport.velocity(predict(x, t), x, x.new_full((len(x),), t))  # [B, ...]
            (vjp,) = torch.autograd.grad((velocity * probe).sum(), x)  # [B, ...]: probeᵀ · ∂velocity/∂x
        return velocity.detach(), (vjp * probe).flatten(1).sum(1)  # [B, ...], [B]

    state = (x1, x1.new_zeros(len(x1)))
    ((noise, divergence),) = _dopri5(derivative, predict, state, [end, start], atol, rtol)
    # From data to noise dt is negative, so the integral of the divergence has the sign that adds to the prior's.
    return standard_normal_logp(noise) + divergence, noise
