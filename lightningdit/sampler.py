"""Samples of a `sample` section: noise by index, one batch at a time, on the solvers and guidance beside this file.

Times are host floats or lie on the device before the first step, so no step waits for the device (dopri5 alone reads
its error estimate). A sample depends on its seed and index only: its numbers are drawn on the CPU, one generator per
sample. The state of a solver is float32, whatever precision the network computes in.

Shapes: B samples, C latent channels, H and W latent height and width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from common.seeds import generator
from kernels.compile.modes import compiled
from lightningdit.config import SampleConfig
from lightningdit.flow import Transport
from lightningdit.guidance import Denoiser, Guidance, Network
from lightningdit.solvers import Callback, FixedSteps, OdeSteps, SdeSteps, log_likelihood, run_steps, sample_ode
from lightningdit.step_graphs import StepRunner, cuda_graphs


def sample_noise(
    seed: int, indices: Sequence[int], shape: Sequence[int], *, draw: int = 0, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Standard normal [len(indices), *shape] float32; row i is a function of (seed, indices[i], draw) alone.

    Draw 0 is the initial noise, draw k the noise of SDE step k (of an ODE, draw 1 probes its divergence). The same on
    every device.
    """
    rows = [torch.randn(tuple(shape), generator=generator(seed, int(index), draw)) for index in indices]
    noise = torch.stack(rows)  # [B, *shape]
    if torch.device(device).type == "cuda":  # from pinned memory the host need not wait for the copy
        return noise.pin_memory().to(device, non_blocking=True)
    return noise.to(device)


@dataclass(frozen=True)
class Samples:
    """Latents [B, C, H, W] float32 and what they cost: solver calls, and those with a second evaluation for guidance.

    log_likelihood: [B] float32, of the latents under the model in nats, where it was asked for.
    """

    latents: torch.Tensor
    nfe: int
    guided_nfe: int
    log_likelihood: torch.Tensor | None = None


def guidance_of(config: SampleConfig, null_label: int | None, guide: Network | None = None) -> Guidance | None:
    """The guidance of a `sample` section; raises ValueError where nothing could guide."""
    if config.cfg_scale == 1:
        return None
    if guide is None and config.guided_by_network:
        named = "guide_step" if config.guide_ckpt_path is None else "guide_ckpt_path"
        raise ValueError(f"{named} names a network that guides, but none is given")
    if guide is None and null_label is None:
        raise ValueError(
            f"cfg_scale {config.cfg_scale} needs a null label or a network that guides; trained with "
            "class_dropout_prob 0, use 1 or guide_ckpt_path"
        )
    return Guidance(
        config.cfg_scale,
        None if guide is not None else null_label,
        config.cfg_interval_start,
        config.cfg_channels,
        config.cfg_interval_end,
        config.cfg_schedule,
    )


class AverageVelocity:
    """A network on two times as one of one time: its average velocity over the step of a uniform grid from there.

    With steps of that length, Euler's method is x_r = x_t + (r - t)·u(x_t, t, r) (arXiv 2505.13447, eq. 12).
    """

    def __init__(self, network: Network, steps: int):
        self.network, self.length = network, 1.0 / steps

    def __call__(self, x: torch.Tensor, t: torch.Tensor, **labels: torch.Tensor) -> torch.Tensor:
        """x [B, C, ...] at t [B] → [B, C, ...]."""
        return self.network(x, t, r=(t + self.length).clamp(max=1.0), **labels)


def as_ode(model: Network, config: SampleConfig) -> tuple[Network, SampleConfig]:
    """The network and settings with which mode meanflow is Euler's method; of the other modes, as they are."""
    if config.mode != "meanflow":
        return model, config
    grid = {"sampling_method": "euler", "num_sampling_steps": config.mean_steps + 1, "timestep_shift": 0.0}
    return AverageVelocity(model, config.mean_steps), config.model_copy(update={"mode": "ODE", **grid})


def _check_indices(y: torch.Tensor, indices: Sequence[int]) -> None:
    if len(indices) != len(y):
        raise ValueError(f"{len(indices)} indices for {len(y)} labels")


def solve_ode(
    transport: Transport, config: SampleConfig, predict: Denoiser, z: torch.Tensor, callback: Callback | None = None
) -> torch.Tensor:
    """The latents of noise z [B, ...] by the ODE solver, grid and tolerances of a `sample` section."""
    return sample_ode(
        transport,
        predict,
        z,
        method=config.sampling_method.lower(),
        steps=config.num_sampling_steps,
        shift=config.timestep_shift,
        atol=config.atol,
        rtol=config.rtol,
        callback=callback,
    )


def _fixed_steps(transport: Transport, config: SampleConfig) -> FixedSteps | None:
    """The solver of a `sample` section; None for dopri5, which has no steps of its own before it runs."""
    if config.mode == "SDE":
        return _sde_steps(transport, config)
    method = config.sampling_method.lower()
    if method == "dopri5":
        return None
    return OdeSteps(transport, method, config.num_sampling_steps, config.timestep_shift)


def _sde_steps(transport: Transport, config: SampleConfig) -> SdeSteps:
    return SdeSteps(
        transport,
        config.sampling_method.lower(),
        config.num_sampling_steps,
        config.timestep_shift,
        form=config.diffusion_form,
        norm=config.diffusion_norm,
        last_step=config.last_step,
        last_step_size=config.last_step_size,
    )


@torch.no_grad()
def sample(
    model: Network,
    transport: Transport,
    config: SampleConfig,
    y: torch.Tensor,
    indices: Sequence[int],
    *,
    shape: Sequence[int],
    null_label: int | None,
    guide: Network | None = None,
    callback: Callback | None = None,
) -> Samples:
    """The samples with these `indices` and labels y [B] (on the model's device) under a `sample` section.

    shape: (C, H, W) of one latent. null_label: None for a model without one, which only a `guide` can guide: the weaker
    network of autoguidance.
    """
    model, config = as_ode(model, config)
    predict = Denoiser(model, y, guidance_of(config, null_label, guide), guide)
    _check_indices(y, indices)
    z = sample_noise(config.seed, indices, shape, device=y.device)  # [B, C, H, W]
    if config.mode == "ODE":
        latents = solve_ode(transport, config, predict, z, callback)
    else:

        def noise(k: int) -> torch.Tensor:
            return sample_noise(config.seed, indices, shape, draw=k, device=y.device)

        latents = run_steps(_sde_steps(transport, config), predict, z, noise, callback)
    logp = _likelihood(model, transport, config, y, indices, latents) if config.likelihood else None
    return Samples(latents, predict.nfe, predict.guided_nfe, logp)


def _likelihood(
    model: Network,
    transport: Transport,
    config: SampleConfig,
    y: torch.Tensor,
    indices: Sequence[int],
    latents: torch.Tensor,
) -> torch.Tensor:
    """[B] of the latents, in nats; the network is run with gradients."""
    noise = sample_noise(config.seed, indices, latents.shape[1:], draw=1, device=y.device)
    signs = torch.where(noise < 0, -1.0, 1.0)
    return log_likelihood(transport, Denoiser(model, y), latents, signs, atol=config.atol, rtol=config.rtol)[0]


class BatchSampler:
    """`sample` for one batch after the other, with what is compiled and captured kept between them.

    Called as `sampler(y, indices)`. Arguments as `sample` takes them, and compile:

    * "none": nothing is compiled;
    * "inductor": the networks are (`kernels.compile.modes`);
    * "cudagraphs": and each kind of step of a fixed-step solver (guided or not) is captured as one CUDA graph;
    * "auto": on a CUDA device the last of these that the solver allows, else none.

    Where something is compiled, batches have one size, that of the first: a smaller one is filled up with its first
    samples again, for a larger one everything is compiled and captured anew.
    """

    def __init__(
        self,
        model: Network,
        transport: Transport,
        config: SampleConfig,
        *,
        shape: Sequence[int],
        null_label: int | None,
        guide: Network | None = None,
        compile: str = "none",
    ):
        self._asked, self._model = config, model
        _, config = as_ode(model, config)
        self._guide, self._transport, self._config = guide, transport, config
        self._shape, self._null_label, self._compile = tuple(shape), null_label, compile
        self._guidance, self._solver = guidance_of(config, null_label, guide), _fixed_steps(transport, config)
        self._runner: StepRunner | None = None
        self._networks: tuple[Network, Network | None] | None = None
        self._size = 0

    @torch.no_grad()
    def __call__(self, y: torch.Tensor, indices: Sequence[int]) -> Samples:
        """The samples with these indices and labels y [B] on the networks' device.

        Raises ValueError for cudagraphs without a CUDA device, or with dopri5, which chooses its steps as it goes.
        """
        _check_indices(y, indices)
        mode, count = self.mode(y.device), len(y)
        self._size = max(self._size, count)
        if mode != "none":
            places = [i % count for i in range(self._size)]
            y, indices = y[torch.tensor(places, device=y.device)], [indices[i] for i in places]
        made = self._fixed(mode, y, indices) if self._solver is not None else self._adaptive(mode, y, indices)
        latents, logp = made.latents[:count], None
        if self._config.likelihood:
            logp = _likelihood(self._model, self._transport, self._config, y[:count], indices[:count], latents)
        return Samples(latents, made.nfe, made.guided_nfe, logp)

    def mode(self, device: torch.device) -> str:
        """What `compile` comes to on this device; raises ValueError where that cannot be."""
        asked, cuda = self._compile, device.type == "cuda"
        if asked == "auto":
            return "none" if not cuda else "inductor" if self._solver is None else "cudagraphs"
        if asked == "cudagraphs" and not cuda:
            raise ValueError(f"compile is cudagraphs, but the networks are on {device}; a CUDA device is needed")
        if asked == "cudagraphs" and self._solver is None:
            raise ValueError("compile is cudagraphs, but dopri5 chooses its steps as it goes; allowed: none, inductor")
        return asked

    def _compiled(self, mode: str) -> tuple[Network, Network | None]:
        if self._networks is None:
            # Captured is the whole step, so Inductor's own graphs stay off.
            kind = "inductor" if mode == "cudagraphs" else mode
            model, _ = as_ode(compiled(self._model, kind), self._asked)
            self._networks = model, self._guide and compiled(self._guide, kind)
        return self._networks

    def _fixed(self, mode: str, y: torch.Tensor, indices: Sequence[int]) -> Samples:
        assert self._solver is not None
        if self._runner is None:
            model, guide = self._compiled(mode)
            capture = cuda_graphs() if mode == "cudagraphs" else None
            self._runner = StepRunner(self._solver, model, self._guidance, guide, capture)

        def noise(k: int) -> torch.Tensor:
            return sample_noise(self._config.seed, indices, self._shape, draw=k, device=y.device)

        latents = self._runner(noise(0), y, noise)
        return Samples(latents, self._runner.nfe, self._runner.guided_nfe)

    def _adaptive(self, mode: str, y: torch.Tensor, indices: Sequence[int]) -> Samples:
        model, guide = self._compiled(mode)
        config = self._config.model_copy(update={"likelihood": False})
        null_label, shape = self._null_label, self._shape
        return sample(model, self._transport, config, y, indices, shape=shape, null_label=null_label, guide=guide)
