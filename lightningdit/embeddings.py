"""Embeddings of patches, timesteps and labels, and the fixed tables of positions: sin-cos and 2-D RoPE.

Shapes: B samples, C latent channels, S input_size, P patch_size, N tokens, D hidden_size, d head_dim.
"""

import math
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightningdit.config import ModelConfig
from lightningdit.duals import CastLinear, Value, differentiated, linear, linear_map


class Float32Tables(nn.Module):
    """A module whose named tables stay float32 (or float64) when `.bfloat16()`, `.half()` or `.to(dtype)` casts it."""

    tables: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        originals = {name: getattr(self, name).detach() for name in self.tables}
        super()._apply(fn, recurse)
        for name, original in originals.items():
            cast = getattr(self, name)
            if cast.dtype.itemsize < 4:
                cast.data = original.to(cast.device)
        return self


class PatchProjection(nn.Conv2d):
    """A convolution with stride = kernel, written as a matrix product over patches: the same sums, deterministic."""

    def forward(self, x: Value) -> Value:  # type: ignore[override]
        """[B, C, S, S] → [B, N, D], row by row."""
        return linear(linear_map(self._patches, x), self.weight.flatten(1), self.bias)  # [B, N, D]

    def _patches(self, x: Tensor) -> Tensor:
        B, C, S, _ = x.shape
        P = self.kernel_size[0]
        x = x.reshape(B, C, S // P, P, S // P, P)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * P * P)  # [B, N, C·P·P]


class PatchEmbed(nn.Module):
    """Latents [B, C, S, S] → tokens [B, N, D]; holds the projection under its published key `x_embedder.proj`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        size = config.patch_size
        self.proj = PatchProjection(config.in_channels, config.hidden_size, size, stride=size)

    def forward(self, x: Value) -> Value:
        return self.proj(x)  # [B, N, D]


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of times t [B] → [B, dim]: cosines, then sines, then a zero where dim is odd. t is used unscaled."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(max_period) / half)
    angles = t[:, None] * exponents.exp().to(t.dtype)  # [B, dim / 2]
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


class TimestepEmbedder(nn.Module):
    """Times [B] → [B, D], in float32 or wider: bfloat16 keeps only about 300 different times between 0 and 1."""

    frequencies = 256

    def __init__(self, hidden_size: int):
        super().__init__()
        first, second = CastLinear(self.frequencies, hidden_size), CastLinear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        first, _, last = self.mlp
        return cast(nn.Linear, first), cast(nn.Linear, last)

    def forward(self, t: Value) -> Value:
        first, last = self.linears
        embedded = differentiated(lambda times: timestep_embedding(times, self.frequencies), t)  # [B, frequencies]
        return last(differentiated(F.silu, first(embedded)))  # [B, D]


class DeterministicEmbedding(torch.autograd.Function):
    """Rows of a table [rows, D] by index [B] → [B, D], with a deterministic gradient.

    On a GPU that of `F.embedding` may add up the rows of an index that repeats (the null label is in nearly every
    batch) by atomics, in whatever order they arrive. Here it is a product of one-hot rows, [rows, B] by [B, D]: the
    same sums, in the order of a matrix product; for XL and 128 images 0.3 of the step's 91,000 GFLOP.
    """

    @staticmethod
    def forward(table: Tensor, index: Tensor) -> Tensor:
        return F.embedding(index, table)  # [B, D]

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        table, index = inputs
        ctx.save_for_backward(index)
        ctx.rows = len(table)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (index,) = ctx.saved_tensors
        one_hot = torch.arange(ctx.rows, device=index.device)[:, None] == index  # [rows, B]
        return one_hot.to(gradient.dtype) @ gradient, None


class LabelTable(nn.Embedding):
    """nn.Embedding [rows, D] with the gradient of `DeterministicEmbedding`."""

    def forward(self, y: Tensor) -> Tensor:
        return DeterministicEmbedding.apply(self.weight, y)  # [B, D]


class LabelEmbedder(nn.Module):
    """Labels [B] → [B, D]; the last row is the null label's, where the model has one."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        rows = config.num_classes + (config.null_label is not None)
        self.embedding_table = LabelTable(rows, config.hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)  # [B, D]


def rope_tables(head_dim: int, grid_size: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """cos, sin [N, d] float32 of 2-D RoPE: angles follow the row in the first half of d, the column in the second.

    Within a half, neighbouring entries form a pair and share an angle, position · theta^(-2k / (d / 2)).
    """
    half = head_dim // 2
    frequencies = 1.0 / theta ** (torch.arange(0, half, 2, dtype=torch.float32, device="cpu") / half)  # [d / 4]
    positions = torch.arange(grid_size, dtype=torch.float32, device="cpu")
    angles = torch.outer(positions, frequencies).repeat_interleave(2, dim=1)  # [grid, d / 2]
    rows, columns = angles[:, None].expand(-1, grid_size, -1), angles[None].expand(grid_size, -1, -1)
    angles = torch.cat([rows, columns], dim=-1).reshape(grid_size**2, head_dim)  # [N, d]
    return angles.cos(), angles.sin()


class RotaryTables(Float32Tables):
    """The RoPE tables [N, d] as buffers, which the published state dict has too."""

    tables = ("freqs_cos", "freqs_sin")

    def __init__(self, config: ModelConfig):
        super().__init__()
        cos, sin = rope_tables(config.head_dim, config.grid_size)
        self.register_buffer("freqs_cos", cos)
        self.register_buffer("freqs_sin", sin)


def position_embedding(hidden_size: int, grid_size: int) -> Tensor:
    """Fixed sin-cos embedding [1, N, D] float32: first half by column, second by row, in each sines, then cosines."""
    quarter = hidden_size // 4
    frequencies = 1.0 / 10_000 ** (np.arange(quarter, dtype=np.float64) / quarter)  # [D / 4]
    angles = np.outer(np.arange(grid_size, dtype=np.float64), frequencies)  # [grid, D / 4]
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # [grid, D / 2]
    columns, rows = np.tile(line, (grid_size, 1)), np.repeat(line, grid_size, axis=0)  # [N, D / 2] both
    return torch.from_numpy(np.concatenate([columns, rows], axis=1)).float()[None]
