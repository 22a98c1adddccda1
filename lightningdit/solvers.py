"""Solvers: the time grid, fixed steps of the ODE and the SDE, dopri5, likelihood.

A fixed-step solver is a list of steps, and one function that makes a step: of the state, the step's numbers (floats of
the host, or tensors [] on the device, to the same bits) and the network. So the same function runs in the loop here
and, captured as a CUDA graph, in `lightningdit.sampler`. Guidance begins and ends with a jump of the prediction; dopri5
solves up to it and restarts there, so that no step crosses it. Solvers work in the dtype of the noise they are given.
Sources: SiT (arXiv 2401.08740) for the SDE, arXiv 2501.01423 for the shift.

Shapes: states are [B, ...] for B samples.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
import torchdiffeq

from lightningdit.config import LAST_STEPS, ODE_METHODS, SDE_METHODS
from lightningdit.flow import Transport, choose, standard_normal_logp, unsqueeze_like
from lightningdit.guidance import Denoiser, Predict, Scalar, times_of

Callback = Callable[[int, torch.Tensor], None]  # called with the grid index reached and the state there
Stage = Callable[[torch.Tensor, int], torch.Tensor]  # the network's output for x at the i-th time of a step


class SolverError(ValueError):
    """An adaptive solver finds no step: what it integrates is not finite, or not smooth enough for its tolerances."""


def time_grid(start: float, end: float, points: int, shift: float = 0.0) -> torch.Tensor:
    """[points] float32 on the CPU: evenly spaced, then t → s·t / (1 + (s - 1)·t) for a shift s other than 0."""
    if points < 2:
        raise ValueError(f"num_sampling_steps is {points}; a grid has at least 2 points")
    t = torch.linspace(start, end, points)
    return shift * t / (1 + (shift - 1) * t) if shift else t


class Step(NamedTuple):
    """The numbers of one step.

    times: at which the network is evaluated, in this order. weights: factors of the update, as the solver takes them.
    last: the SDE's step without noise over the remaining time.
    """

    times: Sequence[Scalar]
    weights: Sequence[Scalar]
    last: bool = False


class FixedSteps(Protocol):
    """A solver whose steps are known beforehand."""

    steps: list[Step]
    noisy: bool  # whether steps (but the last one) take noise

    def update(self, network: Stage, x: torch.Tensor, step: Step, noise: torch.Tensor | None) -> torch.Tensor:
        """The state after `step` from x [B, ...], in x's dtype; noise: standard normal, as x."""
        ...


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


class OdeSteps:
    """Runge-Kutta steps of the probability-flow ODE over a grid of `steps` points; dopri5 is none of them.

    The weights of a step are dt times the tableau's numbers that are not 0, row by row. Raises ValueError on an unknown
    method.
    """

    noisy = False

    def __init__(self, transport: Transport, method: str = "euler", steps: int = 250, shift: float = 0.0):
        self._transport, (self._stages, self._b) = transport, choose("method of fixed steps", method, _TABLEAUS)
        grid = time_grid(*transport.interval(transport.sample_eps), steps, shift).tolist()
        numbers = [number for row in (*(a for _, a in self._stages), self._b) for number in row if number]
        self.steps = [
            Step([t + c * (after - t) for c, _ in self._stages], [number * (after - t) for number in numbers])
            for t, after in pairwise(grid)
        ]

    def update(self, network: Stage, x: torch.Tensor, step: Step, noise: torch.Tensor | None = None) -> torch.Tensor:
        weights, k = iter(step.weights), list[torch.Tensor]()
        for i, (_, a) in enumerate(self._stages):
            at = _add_stages(x, k, a, weights)
            k.append(self._transport.velocity(network(at, i), at, times_of(at, step.times[i])))
        return _add_stages(x, k, self._b, weights)


def _add_stages(
    x: torch.Tensor, k: Sequence[torch.Tensor], row: Sequence[float], weights: Iterator[Scalar]
) -> torch.Tensor:
    """x + Σ weight · k_i over the numbers of a tableau's row that are not 0."""
    for k_i, number in zip(k, row, strict=True):
        if number:
            x = x + next(weights) * k_i
    return x


class SdeSteps:
    """Steps of the reverse SDE dx = (v + g·score) dt + sqrt(2 g) dw over a grid of `steps` points, and the last one.

    form, norm: g(t), see `Transport.diffusion`. last_step: the noiseless step over the remaining time `last_step_size`:
    along the SDE's drift (Mean), to the posterior mean (Tweedie), along the ODE (Euler), or None: the grid itself runs
    to the end. The weight of a step is its dt. Raises ValueError on an unknown name.
    """

    noisy = True

    def __init__(
        self,
        transport: Transport,
        method: str = "euler",
        steps: int = 250,
        shift: float = 0.0,
        *,
        form: str = "sigma",
        norm: float = 1.0,
        last_step: str | None = "Mean",
        last_step_size: float = 0.04,
    ):
        choose("SDE method", method, dict.fromkeys(SDE_METHODS))
        if last_step is not None:
            choose("last step", last_step, dict.fromkeys(LAST_STEPS))
        self._transport, self._method, self._form, self._norm, self._last = transport, method, form, norm, last_step
        remaining = 0.0 if last_step is None else last_step_size
        interval = transport.interval(transport.sample_eps, sde=True, form=form, last_step_size=remaining)
        grid = time_grid(*interval, steps, shift).tolist()
        self.steps = [Step([t] if method == "euler" else [t, after], [after - t]) for t, after in pairwise(grid)]
        if last_step is not None:
            self.steps.append(Step([grid[-1]], [remaining], last=True))

    def update(self, network: Stage, x: torch.Tensor, step: Step, noise: torch.Tensor | None = None) -> torch.Tensor:
        (dt,) = step.weights

        def drift(x: torch.Tensor, i: int) -> torch.Tensor:
            t, output = times_of(x, step.times[i]), network(x, i)
            g = self._transport.diffusion(x, t, self._form, self._norm)
            return self._transport.velocity(output, x, t) + g * self._transport.score(output, x, t)

        if step.last:
            return x + dt * drift(x, 0) if self._last == "Mean" else self._last_update(network, x, step)
        assert noise is not None
        g = self._transport.diffusion(x, times_of(x, step.times[0]), self._form, self._norm)
        increment = (2 * g * dt).sqrt() * noise
        if self._method == "euler":
            return x + drift(x, 0) * dt + increment
        x = x + increment  # Heun on the drift, after the noise
        d1 = drift(x, 0)
        return x + dt / 2 * (d1 + drift(x + dt * d1, 1))

    def _last_update(self, network: Stage, x: torch.Tensor, step: Step) -> torch.Tensor:
        t, output = times_of(x, step.times[0]), network(x, 0)
        if self._last == "Euler":
            return x + step.weights[0] * self._transport.velocity(output, x, t)
        path = self._transport.path
        alpha, sigma = (f(unsqueeze_like(t, x))[0] for f in (path.alpha, path.sigma))
        return (x + sigma**2 * self._transport.score(output, x, t)) / alpha


def _at_times(predict: Predict, times: Sequence[Scalar], x: torch.Tensor, i: int) -> torch.Tensor:
    return predict(x, float(times[i]))


def _no_noise(step: int) -> torch.Tensor:
    raise AssertionError("steps of an ODE take no noise")


def run_steps(
    solver: FixedSteps,
    predict: Predict,
    x: torch.Tensor,
    noise: Callable[[int], torch.Tensor],
    callback: Callback | None = None,
) -> torch.Tensor:
    """The state after all steps of a solver from x [B, ...]; predict and noise as `sample_ode` and `sample_sde` say."""
    for k, step in enumerate(solver.steps, start=1):
        drawn = noise(k).to(x) if solver.noisy and not step.last else None
        x = solver.update(partial(_at_times, predict, step.times), x, step, drawn)
        if callback and not step.last:
            callback(k, x)
    return x


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
    if method != "dopri5":
        return run_steps(OdeSteps(transport, method, steps, shift), predict, z, _no_noise, callback)

    def velocity(predict: Predict, x: torch.Tensor, t: float) -> torch.Tensor:
        return transport.velocity(predict(x, t), x, times_of(x, t))

    times, x = time_grid(*transport.interval(transport.sample_eps), steps, shift).tolist(), z
    for i, x in enumerate(_dopri5(velocity, predict, z, times, atol, rtol), start=1):
        if callback:
            callback(i, x)
    return x


def sample_sde(
    transport: Transport,
    predict: Predict,
    z: torch.Tensor,
    noise: Callable[[int], torch.Tensor],
    *,
    callback: Callback | None = None,
    **options,
) -> torch.Tensor:
    """Integrate the reverse SDE from noise z [B, ...] to data; options: those of `SdeSteps`.

    noise(k) is the standard normal tensor of step k (1-based), as z.
    """
    return run_steps(SdeSteps(transport, **options), predict, z, noise, callback)


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
            velocity = transport.velocity(predict(x, t), x, times_of(x, t))  # [B, ...]
            (vjp,) = torch.autograd.grad((velocity * probe).sum(), x)  # [B, ...]: probeᵀ · ∂velocity/∂x
        return velocity.detach(), (vjp * probe).flatten(1).sum(1)  # [B, ...], [B]

    state = (x1, x1.new_zeros(len(x1)))
    ((noise, divergence),) = _dopri5(derivative, predict, state, [end, start], atol, rtol)
    # From data to noise dt is negative, so the integral of the divergence has the sign that adds to the prior's.
    return standard_normal_logp(noise) + divergence, noise
