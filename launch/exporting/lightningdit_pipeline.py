# SPDX-License-Identifier: Apache-2.0
"""LightningDiT (arXiv 2501.01423) for diffusers: the network and the class-conditional pipeline, in one file.

Needs torch and diffusers, nothing else. `export --format diffusers` of the project lightningdit copies this file beside
the weights, and `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` runs it.

Times: the network is given t in [0, 1], 0 being noise and 1 data, and predicts the velocity data − noise of the path
x_t = t·data + (1 − t)·noise. diffusers' flow-matching schedulers count the other way: sigma = 1 − t, timestep
1000·sigma, velocity noise − data. The pipeline converts.

Shapes: B samples, C latent channels, S input_size, P patch_size, N = (S / P)² tokens, D hidden_size, H heads,
d = D / H, M width of the feed-forward layer.
"""

import inspect
import math
import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn

EPS = 1e-6  # of every norm but the QK LayerNorm, which has torch's 1e-5


def positions(hidden_size: int, grid: int) -> Tensor:
    """Sin-cos embedding [1, N, D] float32: first half by column, second by row, in each sines, then cosines."""
    quarter = hidden_size // 4
    frequencies = 1.0 / 10_000 ** (torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    angles = torch.outer(torch.arange(grid, dtype=torch.float64, device="cpu"), frequencies)  # [grid, D / 4]
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, D / 2]
    columns, rows = line.repeat(grid, 1), line.repeat_interleave(grid, dim=0)  # [N, D / 2] both
    return torch.cat([columns, rows], dim=1).float()[None]


def rotations(head_dim: int, grid: int) -> tuple[Tensor, Tensor]:
    """cos, sin [N, d] float32 of 2-D RoPE: by row in the first half of d, by column in the second; pairs share one."""
    half = head_dim // 2
    frequencies = 1.0 / 10_000 ** (torch.arange(0, half, 2, dtype=torch.float32, device="cpu") / half)  # [d / 4]
    angles = torch.outer(torch.arange(grid, dtype=torch.float32, device="cpu"), frequencies)
    angles = angles.repeat_interleave(2, dim=1)  # [grid, d / 2]
    rows, columns = angles[:, None].expand(-1, grid, -1), angles[None].expand(grid, -1, -1)
    angles = torch.cat([rows, columns], dim=-1).reshape(grid**2, head_dim)  # [N, d]
    return angles.cos(), angles.sin()


def rms_normalized(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm over the last axis, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + EPS) * weight.float()


class RMSNorm(nn.Module):
    """The weight of an RMSNorm [width]; the result is float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalized(x, self.weight)


class LayerNorm(nn.Module):
    """A LayerNorm without weights; the result is float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:], eps=EPS)


def modulated(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """A normalised x [B, N, D] float32, scaled and shifted by [B, D] → scale's dtype."""
    y = x * (1 + scale.float()[:, None])
    return (y if shift is None else y + shift.float()[:, None]).to(scale.dtype)


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, hidden_size: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # [B, N, D], row by row


class TimestepEmbedder(nn.Module):
    """Times t [B], unscaled → [B, D] in float32 whatever the weights' dtype: bfloat16 would round the times."""

    def __init__(self, hidden_size: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequencies // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10_000) / half)
        angles = t.float()[:, None] * exponents.exp()  # [B, 128]
        x = torch.cat([angles.cos(), angles.sin()], dim=1)  # [B, 256]
        first, activation, second = self.mlp
        x = activation(F.linear(x, first.weight.float(), first.bias.float()))
        return F.linear(x, second.weight.float(), second.bias.float())


class LabelEmbedder(nn.Module):
    def __init__(self, rows: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(rows, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)  # [B, D]


class Attention(nn.Module):
    """Self-attention with 2-D RoPE and, where asked for, norms of queries and keys."""

    def __init__(self, hidden_size: int, num_heads: int, use_qknorm: bool, use_rmsnorm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        norm = RMSNorm if use_rmsnorm else nn.LayerNorm
        self.q_norm = norm(hidden_size // num_heads) if use_qknorm else nn.Identity()
        self.k_norm = norm(hidden_size // num_heads) if use_qknorm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, H, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, d] each
        q, k = self.q_norm(q).float(), self.k_norm(k).float()
        if cos is not None:
            q, k = (rotated(u, cos, sin) for u in (q, k))
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)  # [B, H, N, d]
        return self.proj(out.transpose(1, 2).flatten(2))


def rotated(u: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of neighbours of u [..., N, d] turned by the angle of its position."""
    even, odd = u.unflatten(-1, (-1, 2)).unbind(-1)
    return u * cos + torch.stack((-odd, even), dim=-1).flatten(-2) * sin


class SwiGLUMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.w12 = nn.Linear(hidden_size, 2 * width)
        self.w3 = nn.Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w12(x).float().chunk(2, dim=-1)  # [B, N, M] both
        return self.w3((F.silu(gate) * up).to(x.dtype))


class GELUMLP(nn.Module):
    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, width)
        self.fc2 = nn.Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Modulation(nn.Sequential):
    """The condition c [B, D] float32 → `parts` vectors [B, D] in the weights' dtype."""

    def __init__(self, hidden_size: int, parts: int):
        super().__init__(nn.SiLU(), nn.Linear(hidden_size, parts * hidden_size))
        self.parts = parts

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        activation, linear = self
        return linear(activation(c).to(linear.weight.dtype)).chunk(self.parts, dim=1)


class Block(nn.Module):
    """Transformer block with adaLN-zero (arXiv 2212.09748); the residual stream x [B, N, D] stays float32."""

    def __init__(self, config):
        super().__init__()
        D, self.wo_shift = config.hidden_size, config.wo_shift
        self.norm1 = RMSNorm(D) if config.use_rmsnorm else LayerNorm()
        self.attn = Attention(D, config.num_heads, config.use_qknorm, config.use_rmsnorm)
        self.norm2 = RMSNorm(D) if config.use_rmsnorm else LayerNorm()
        width = int(D * config.mlp_ratio)
        self.mlp = SwiGLUMLP(D, int(2 / 3 * width)) if config.use_swiglu else GELUMLP(D, width)
        self.adaLN_modulation = Modulation(D, 4 if config.wo_shift else 6)

    def forward(self, x: Tensor, c: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        vectors = self.adaLN_modulation(c)  # [B, D] each
        shifts = (None, None) if self.wo_shift else (vectors[0], vectors[3])
        scale_attn, gate_attn, scale_mlp, gate_mlp = vectors if self.wo_shift else (*vectors[1:3], *vectors[4:])
        y = self.attn(modulated(self.norm1(x), shifts[0], scale_attn), cos, sin)
        x = x + gate_attn.float()[:, None] * y.float()
        y = self.mlp(modulated(self.norm2(x), shifts[1], scale_mlp))
        return x + gate_mlp.float()[:, None] * y.float()


class FinalLayer(nn.Module):
    def __init__(self, config, width: int):
        super().__init__()
        self.norm_final = RMSNorm(config.hidden_size) if config.use_rmsnorm else LayerNorm()
        self.linear = nn.Linear(config.hidden_size, width)
        self.adaLN_modulation = Modulation(config.hidden_size, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulated(self.norm_final(x), *self.adaLN_modulation(c)))  # [B, N, width]


class LightningDiTTransformer2DModel(ModelMixin, ConfigMixin):
    """The network; arguments and parameters have their published names.

    The tables of positions follow from the sizes: they are made anew in float32, and those of a file are left out.
    """

    _no_split_modules = ["Block"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"^pos_embed$", r"^feat_rope\."]  # noqa: RUF012
    _tables = ("pos_embed", "freqs_cos", "freqs_sin")

    @register_to_config
    def __init__(
        self,
        input_size: int = 16,
        patch_size: int = 1,
        in_channels: int = 32,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = False,
        use_qknorm: bool = False,
        use_swiglu: bool = True,
        use_rope: bool = True,
        use_rmsnorm: bool = True,
        wo_shift: bool = False,
    ):
        super().__init__()
        config, grid = self.config, input_size // patch_size
        self.x_embedder = PatchEmbed(in_channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes + (class_dropout_prob > 0), hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(depth))
        self.final_layer = FinalLayer(config, patch_size**2 * in_channels * (2 if learn_sigma else 1))
        cos, sin = rotations(hidden_size // num_heads, grid) if use_rope else (None, None)
        for name, table in zip(self._tables, (positions(hidden_size, grid), cos, sin), strict=True):
            self.register_buffer(name, table, persistent=False)

    def _apply(self, fn, recurse=True):
        """The tables stay float32 when the module is cast."""
        tables = {name: getattr(self, name) for name in self._tables}
        super()._apply(fn, recurse)
        for name, table in tables.items():
            if table is not None and getattr(self, name).dtype != table.dtype:
                setattr(self, name, table.to(getattr(self, name).device))
        return self

    @property
    def null_label(self) -> int | None:
        """The label of the unconditional model; None for one without."""
        return self.config.num_classes if self.config.class_dropout_prob > 0 else None

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Latents x [B, C, S, S], times t [B] in [0, 1] (0: noise), labels [B] → velocity [B, C, S, S] float32."""
        config, dtype = self.config, self.x_embedder.proj.weight.dtype
        c = self.t_embedder(timestep) + self.y_embedder(class_labels).float()  # [B, D]
        x = self.x_embedder(hidden_states.to(dtype)) + self.pos_embed  # [B, N, D] float32
        for block in self.blocks:
            x = block(x, c, self.freqs_cos, self.freqs_sin)
        x = self.final_layer(x, c).float()  # [B, N, P·P·C], or twice as many with learn_sigma
        grid, P = config.input_size // config.patch_size, config.patch_size
        x = x.unflatten(1, (grid, grid)).unflatten(-1, (P, P, -1)).permute(0, 5, 1, 3, 2, 4)
        x = x.reshape(len(x), -1, config.input_size, config.input_size)[:, : config.in_channels]
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)


def whole(value) -> int | None:
    """A whole number of any type (int, NumPy's, a tensor without axes) as an int; None for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def is_between(value, least: float, most: float) -> bool:
    """Whether a value is a number, and not nan, from `least` to `most`."""
    try:
        return not isinstance(value, str) and least <= float(value) <= most
    except (TypeError, ValueError):
        return False


#: Share of the scale − 1 at time t.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: t,
    "cosine": lambda t: (1 - math.cos(math.pi * t)) / 2,
}


class LightningDiTPipeline(DiffusionPipeline):
    """Images by class label: flow matching with classifier-free guidance.

    What `__call__` does without being told is what `model_index.json` says: `num_inference_steps`, `guidance_scale`,
    the times `guidance_start` and `guidance_end` between which guidance is on, `guidance_schedule` (how the scale grows
    from 1 at noise to what is given at data: see `SCHEDULES`), `guidance_channels` (how many leading channels of the
    latents are guided; None: all), and `id2label`, names of classes by number, as text.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        transformer: ModelMixin,  # LightningDiTTransformer2DModel, which diffusers may load from this file anew
        vae: AutoencoderKL,
        scheduler: SchedulerMixin,
        id2label: dict[str, str] | None = None,
        num_inference_steps: int = 249,
        guidance_scale: float = 1.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        guidance_schedule: str = "constant",
        guidance_channels: int | None = None,
    ):
        super().__init__()
        if guidance_schedule not in SCHEDULES:
            raise ValueError(f"guidance_schedule is {guidance_schedule!r}; allowed: {', '.join(SCHEDULES)}")
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(
            id2label=id2label,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_start=guidance_start,
            guidance_end=guidance_end,
            guidance_schedule=guidance_schedule,
            guidance_channels=guidance_channels,
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_channels: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[[int, float, Tensor], None] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """One image for each of `class_labels`, numbers or names.

        Args:
            num_inference_steps: evaluations of the network by Euler's method, guided ones counted once.
            guidance_scale: 1 or more; 1 is without guidance.
            guidance_interval: times (0: noise, 1: data) between which, both included, guidance is on.
            guidance_channels: 0 for all of them, whatever `model_index.json` says.
            generator: of the noise; with a list, image i depends on generator i alone.
            latents: the noise itself, standard normal [B, C, S, S].
            output_type: "pil", "np" ([B, H, W, 3] in [0, 1]), "pt" ([B, 3, H, W] in [0, 1]) or "latent" (normalised).
            callback: called with the number of steps done, the time reached and the latents.

        Raises:
            ValueError: naming an argument (or a value of `model_index.json`), its value, and what is allowed.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type is {output_type!r}; allowed: pil, np, pt, latent")
        config = self.config
        given = (num_inference_steps, guidance_scale, guidance_interval, guidance_channels)
        steps, scale, interval, channels = self._settings(*given)
        self._require_statistics()
        y = torch.tensor(self.label_numbers(class_labels), device=self._execution_device)  # [B]
        x = self._noise(len(y), generator, latents)  # [B, C, S, S] float32
        self._set_times(steps)
        total = self.scheduler.config.num_train_timesteps
        for number, timestep in enumerate(self.progress_bar(self.scheduler.timesteps), start=1):
            t = 1 - float(timestep) / total
            # The scheduler's times are rounded: 1e-6 of them count as reached.
            guided = scale != 1 and interval[0] - 1e-6 <= t <= interval[1] + 1e-6
            scale_now = 1 + (scale - 1) * SCHEDULES[config.guidance_schedule](t) if guided else 1.0
            velocity = self._velocity(x, t, y, scale_now, channels)
            x = self.scheduler.step(-velocity, timestep, x, return_dict=False)[0]
            if callback is not None:
                callback(number, t, x)
        images = x if output_type == "latent" else self._images(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _settings(self, steps, scale, interval, channels) -> tuple[int, float, tuple[float, float], int | None]:
        """What is given, or in place of None what `model_index.json` says, if it is allowed."""
        config, most = self.config, self.transformer.config.in_channels
        steps = config.num_inference_steps if steps is None else steps
        scale = config.guidance_scale if scale is None else scale
        interval = (config.guidance_start, config.guidance_end) if interval is None else interval
        channels = config.guidance_channels if channels is None else channels
        if whole(steps) is None or whole(steps) < 1:
            raise ValueError(f"num_inference_steps is {steps!r}; allowed: whole numbers from 1 on")
        if not is_between(scale, 1, math.inf) or scale == math.inf:
            raise ValueError(f"guidance_scale is {scale!r}; allowed: numbers from 1 (no guidance) on")
        pair = tuple(interval) if isinstance(interval, tuple | list) else ()
        if len(pair) != 2 or not all(is_between(time, 0, 1) for time in pair) or pair[0] > pair[1]:
            raise ValueError(f"guidance_interval is {interval!r}; allowed: two times, 0 <= from <= to <= 1")
        if channels is not None and (whole(channels) is None or not 0 <= whole(channels) <= most):
            raise ValueError(f"guidance_channels is {channels!r}; allowed: 1 to {most}, or 0 for all of them")
        return whole(steps), float(scale), pair, whole(channels)

    def _require_statistics(self) -> None:
        """Raise ValueError where the VAE's config has one of the two that latents are normalised by."""
        config = self.vae.config
        if (config.latents_mean is None) != (config.latents_std is None):
            raise ValueError(
                f"latents_mean is {config.latents_mean} and latents_std {config.latents_std} in the config of vae; "
                "allowed: both, or neither"
            )

    def label_numbers(self, labels: int | str | list[int | str]) -> list[int]:
        """Numbers of classes given by number or by name (or one of the names that stand between commas)."""
        numbers = {}
        for number, names in (self.config.id2label or {}).items():
            numbers |= {name.strip(): int(number) for name in [names, *names.split(",")]}
        found = []
        count = self.transformer.config.num_classes
        for label in [labels] if isinstance(labels, str) or whole(labels) is not None else labels:
            if isinstance(label, str) and label not in numbers:
                raise ValueError(f"class_labels: no class is called {label!r}; id2label of the pipeline has the names")
            found.append(numbers[label] if isinstance(label, str) else whole(label))
            if found[-1] is None:
                raise ValueError(f"class_labels: {label!r}; allowed: whole numbers from 0 to {count - 1}, and names")
        if not found:
            raise ValueError("class_labels is empty; allowed: one label at least")
        if wrong := [label for label in found if not 0 <= label < count]:
            raise ValueError(f"class_labels {wrong}: classes are 0 to {count - 1}")
        return found

    def _noise(self, count: int, generator, latents: Tensor | None) -> Tensor:
        config = self.transformer.config
        shape = (count, config.in_channels, config.input_size, config.input_size)
        if isinstance(generator, list | tuple) and len(generator) != count:
            raise ValueError(
                f"generator is a list of {len(generator)}; allowed: one generator, or one for each of {count}"
            )
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents are {tuple(latents.shape)}; these labels take {shape}")
        return latents.to(self._execution_device, torch.float32)

    def _set_times(self, steps: int) -> None:
        """`steps` equal steps of sigma from 1 to 0, which the scheduler shifts, or what another scheduler chooses."""
        if "sigmas" in inspect.signature(self.scheduler.set_timesteps).parameters:
            sigmas = torch.linspace(0, 1, steps + 1)[:-1].neg().add(1).tolist()
            self.scheduler.set_timesteps(sigmas=sigmas, device=self._execution_device)
        else:
            self.scheduler.set_timesteps(steps, device=self._execution_device)

    def _velocity(self, x: Tensor, t: float, y: Tensor, scale: float, channels: int | None) -> Tensor:
        """The network's velocity at time t, guided where `scale` is not 1: unconditional + scale·difference."""
        if scale == 1:
            return self.transformer(x, x.new_full((len(x),), t), y).sample
        if (null := self.transformer.null_label) is None:
            raise ValueError(f"guidance_scale is {scale}, but the network was trained without a null label: use 1")
        both = torch.cat([y, torch.full_like(y, null)])  # [2B]
        cond, uncond = self.transformer(torch.cat([x, x]), x.new_full((2 * len(x),), t), both).sample.chunk(2)
        guided = uncond + scale * (cond - uncond)
        return torch.cat([guided[:, :channels], cond[:, channels:]], dim=1) if channels else guided

    def _images(self, x: Tensor, output_type: str):
        """Normalised latents → images; the statistics of the latents are those of the VAE's config."""
        config = self.vae.config
        mean, std = config.latents_mean, config.latents_std
        if mean is None or std is None:
            z = x / config.scaling_factor + (config.shift_factor or 0.0)
        else:
            mean, std = (x.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))  # [1, C, 1, 1]
            z = x * std / config.scaling_factor + mean
        if config.force_upcast and self.vae.dtype.itemsize < 4:
            self.vae.to(torch.float32)
        images = self.vae.decode(z.to(self.vae.dtype)).sample.float()  # [B, 3, H, W] in [−1, 1]
        if output_type != "pil":
            images = (images / 2 + 0.5).clamp(0, 1)
            return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()
        pixels = (127.5 * images + 128).clamp(0, 255).to(torch.uint8)
        return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]
