"""The LightningDiT network: blocks, attention, feed-forward layers, adaLN-zero, final layer (arXiv 2501.01423).

It maps a noisy latent, a time and a label to a velocity, and is given its ops. With a second time, it maps them to the
average velocity between the two times (MeanFlow, arXiv 2505.13447). Each branch's gated residual is added by
the norm that follows it, in the same pass: the attention branch by its block's norm2, the feed-forward branch by norm1
of the next block or by the final layer's norm. Blocks therefore pass on the stream and a `PendingResidual`: the branch
not yet added to it, the bias of the projection that made the branch, and the branch's gate. Biases are added where the
next op reads the product: their gradients, sums over all tokens, cost nothing there and a pass over memory of
their own elsewhere. The modulation vectors of all blocks are computed before the first. Where parameters exist only
while their own module runs (ZeRO 3), `params_gathered=False` leaves biases and modulations to their modules.

Shapes: B samples, C latent channels, S input_size, P patch_size, N = (S / P)² tokens, D hidden_size, H heads,
d head_dim, M feed-forward width (`mlp_hidden`).
"""

import math
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.compile.recompute import recomputed, recomputes
from kernels.registry import Ops
from lightningdit.config import ModelConfig
from lightningdit.duals import (
    DeferredBiasLinear,
    LayerNorm,
    Linear,
    Value,
    add,
    differentiated,
    linear_map,
    stack,
    subtract,
    value_of,
)
from lightningdit.embeddings import (
    Float32Tables,
    LabelEmbedder,
    PatchEmbed,
    RotaryTables,
    TimestepEmbedder,
    position_embedding,
)
from lightningdit.modulation import Modulation, Vectors, modulations

EPS = 1e-6  # of every norm but the affine QK LayerNorm, which keeps torch's 1e-5


class PendingResidual(NamedTuple):
    """A residual that is not yet added to the stream [B, N, D]: `gate · (branch + bias)`."""

    branch: Value  # [B, N, D]
    bias: Tensor | None  # [D]
    gate: Value  # [B, D]


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class ModulatedRMSNorm(nn.Module):
    """Adds the pending residual to the stream, then RMSNorm, scale and shift: both in one pass of one op."""

    def __init__(self, hidden_size: int, ops: Ops):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.ops = ops

    def forward(
        self, x: Value, shift: Value | None, scale: Value, pending: PendingResidual | None = None
    ) -> tuple[Value, Value]:
        """Stream x [B, N, D], shift and scale [B, D] → (new stream, its modulated norm in scale's dtype) [B, N, D]."""
        if pending is None:
            y = self.ops.adaln_rms_norm(x, self.weight, shift, scale, EPS, out_dtype=scale.dtype)  # [B, N, D]
            return x, y
        branch, bias, gate = pending
        return self.ops.gated_residual_adaln_rms_norm(x, branch, gate, self.weight, shift, scale, EPS, branch_bias=bias)


class ModulatedLayerNorm(nn.Module):
    """The same with a LayerNorm without weights, as the published model has where use_rmsnorm is off."""

    def forward(
        self, x: Value, shift: Value | None, scale: Value, pending: PendingResidual | None = None
    ) -> tuple[Value, Value]:
        branch, bias, gate = (None, None, None) if pending is None else pending
        return differentiated(self._compute, x, shift, scale, branch, bias, gate)

    def _compute(
        self,
        x: Tensor,
        shift: Tensor | None,
        scale: Tensor,
        branch: Tensor | None,
        bias: Tensor | None,
        gate: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        acc_dtype = at_least_float32(x.dtype)
        if branch is not None and gate is not None:
            branch, gate = branch.to(acc_dtype), gate.to(acc_dtype)  # [B, N, D], [B, D]
            branch = branch if bias is None else branch + bias.to(acc_dtype)
            x = (x.to(acc_dtype) + gate[:, None] * branch).to(x.dtype)  # [B, N, D]
        y = F.layer_norm(x.to(acc_dtype), x.shape[-1:], eps=EPS)  # [B, N, D]
        y = y * (1 + scale[:, None].to(acc_dtype))
        if shift is not None:
            y = y + shift[:, None].to(acc_dtype)
        return x, y.to(scale.dtype)


def modulated_norm(config: ModelConfig, ops: Ops) -> nn.Module:
    return ModulatedRMSNorm(config.hidden_size, ops) if config.use_rmsnorm else ModulatedLayerNorm()


class QKRMSNorm(nn.Module):
    """The weight of a QK RMSNorm, which the op `rope_attention` applies."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))


class Attention(nn.Module):
    """Self-attention with 2-D RoPE and optional QK norm; the next norm adds the bias of `proj`.

    The op adds the bias of `qkv`, unless a LayerNorm reads queries and keys before it.
    """

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.num_heads, self.ops = config.num_heads, ops
        linear = Linear if config.use_qknorm and not config.use_rmsnorm else DeferredBiasLinear
        self.qkv = linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = DeferredBiasLinear(config.hidden_size, config.hidden_size)
        norm = QKRMSNorm if config.use_rmsnorm else LayerNorm
        self.q_norm = norm(config.head_dim) if config.use_qknorm else None
        self.k_norm = norm(config.head_dim) if config.use_qknorm else None

    def forward(self, x: Value, cos: Tensor | None, sin: Tensor | None) -> Value:
        """x [B, N, D], RoPE tables [N, d] → [B, N, D], without the bias of `proj` where that is deferred."""
        B, N, D = x.shape
        qkv = linear_map(  # [B, N, 3, H, d]
            lambda projected: projected.reshape(B, N, 3, self.num_heads, D // self.num_heads), self.qkv(x)
        )
        bias = self.qkv.deferred_bias if isinstance(self.qkv, DeferredBiasLinear) else None
        q_weight = k_weight = None
        if isinstance(self.q_norm, QKRMSNorm) and isinstance(self.k_norm, QKRMSNorm):
            q_weight, k_weight = self.q_norm.weight, self.k_norm.weight  # [d]
        elif self.q_norm is not None and self.k_norm is not None:
            q, k, v = (linear_map(partial(Tensor.select, dim=2, index=i), qkv) for i in range(3))  # [B, N, H, d] each
            qkv = stack((self.q_norm(q), self.k_norm(k), v), dim=2)  # [B, N, 3, H, d]
        out = self.ops.rope_attention(qkv, cos, sin, q_weight, k_weight, eps=EPS, bias=bias)  # [B, N, D]
        return self.proj(out)


class SwiGLUMLP(nn.Module):
    """SwiGLU feed-forward layer (arXiv 2002.05202); the next norm adds the bias of its last linear layer."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.ops = ops
        self.w12 = DeferredBiasLinear(config.hidden_size, 2 * config.mlp_hidden)
        self.w3 = DeferredBiasLinear(config.mlp_hidden, config.hidden_size)

    @property
    def last(self) -> DeferredBiasLinear:
        return self.w3

    def forward(self, x: Value) -> Value:
        gate_up = self.w12(x)  # [B, N, 2M]
        activated = self.ops.swiglu(gate_up, bias=self.w12.deferred_bias)  # [B, N, M]
        return self.w3(activated)  # [B, N, D]


class GELUMLP(nn.Module):
    """GELU feed-forward layer of DiT (arXiv 2212.09748); the next norm adds the bias of its last linear layer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.mlp_hidden)
        self.fc2 = DeferredBiasLinear(config.mlp_hidden, config.hidden_size)

    @property
    def last(self) -> DeferredBiasLinear:
        return self.fc2

    def forward(self, x: Value) -> Value:
        activated = differentiated(lambda h: F.gelu(h, approximate="tanh"), self.fc1(x))  # [B, N, M]
        return self.fc2(activated)  # [B, N, D]


class Block(nn.Module):
    """Transformer block with adaLN-zero: attention and feed-forward layer, each modulated before and gated after."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.norm1 = modulated_norm(config, ops)
        self.attn = Attention(config, ops)
        self.norm2 = modulated_norm(config, ops)
        self.mlp = SwiGLUMLP(config, ops) if config.use_swiglu else GELUMLP(config)
        self.adaLN_modulation = Modulation(config.hidden_size, config.modulation_parts)

    def forward(
        self, x: Value, pending: PendingResidual | None, modulation: Vectors, cos: Tensor | None, sin: Tensor | None
    ) -> tuple[Value, PendingResidual]:
        """Stream x [B, N, D] and its pending residual (None at the first block) → both for the next block.

        modulation: the output of this block's `adaLN_modulation`, vectors [B, D]. cos, sin: RoPE tables [N, d].
        """
        shift_attn: Value | None
        shift_mlp: Value | None
        if len(modulation) == 6:
            shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        else:
            shift_attn = shift_mlp = None
            scale_attn, gate_attn, scale_mlp, gate_mlp = modulation
        x, y = self.norm1(x, shift_attn, scale_attn, pending)  # [B, N, D] both
        attention = PendingResidual(self.attn(y, cos, sin), self.attn.proj.deferred_bias, gate_attn)
        x, y = self.norm2(x, shift_mlp, scale_mlp, attention)  # [B, N, D] both
        return x, PendingResidual(self.mlp(y), self.mlp.last.deferred_bias, gate_mlp)


class FinalLayer(nn.Module):
    """The last gated residual, norm and modulation, then the linear layer from tokens to patches."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.norm_final = modulated_norm(config, ops)
        self.linear = Linear(config.hidden_size, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = Modulation(config.hidden_size, 2)

    def forward(self, x: Value, pending: PendingResidual, c: Value) -> Value:
        """Stream x [B, N, D], condition c [B, D] → [B, N, P·P·out_channels]."""
        shift, scale = self.adaLN_modulation(c)  # [B, D] both
        _, y = self.norm_final(x, shift, scale, pending)  # [B, N, D]
        return self.linear(y)


def unpatchify(x: Tensor, patch_size: int) -> Tensor:
    """Tokens [B, N, P·P·C] in row-major order, channels innermost → [B, C, S, S]."""
    B, N, width = x.shape
    P, grid, C = patch_size, math.isqrt(N), width // patch_size**2
    return x.reshape(B, grid, grid, P, P, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, grid * P, grid * P)


class LightningDiT(Float32Tables):
    """The network of `config`, computing with `ops` (`kernels.select`); keys and shapes as published.

    residual_dtype: dtype of the residual stream, or the weights' where that is wider. The module may be cast to
    bfloat16 or float16: timestep embedding, condition, norms, RoPE and the output stay float32.
    params_gathered: whether every parameter is whole at any time; false under ZeRO 3, which gathers a module's
    parameters only while it runs.
    """

    tables = ("pos_embed",)

    def __init__(
        self, config: ModelConfig, ops: Ops, residual_dtype: torch.dtype = torch.float32, params_gathered: bool = True
    ):
        super().__init__()
        self.config, self.residual_dtype, self.params_gathered = config, residual_dtype, params_gathered
        self.ops = ops
        self.saved_operators = ops.saved_operators() if config.use_checkpoint == "pointwise" else []
        self.x_embedder = PatchEmbed(config)
        self.pos_embed = nn.Parameter(position_embedding(config.hidden_size, config.grid_size), requires_grad=False)
        self.t_embedder = TimestepEmbedder(config.hidden_size)
        self.y_embedder = LabelEmbedder(config)
        self.feat_rope = RotaryTables(config) if config.use_rope else None
        self.blocks = nn.ModuleList(Block(config, ops) for _ in range(config.depth))
        self.final_layer = FinalLayer(config, ops)
        with torch.random.fork_rng(devices=[]):  # its constructor draws too
            self.r_embedder = TimestepEmbedder(config.hidden_size) if config.time_pairs else None
        for module in self.modules():
            if isinstance(module, DeferredBiasLinear):
                module.defer_bias = params_gathered
        self.initialize()

    @property
    def regions(self) -> list[nn.Module]:
        """Modules for regional compilation, each compiled by itself.

        The rest runs eagerly: the addition of `pos_embed`, the label embedding, the modulations of all blocks.
        """
        second = [] if self.r_embedder is None else [self.r_embedder]
        return [self.x_embedder, self.t_embedder, *second, *self.blocks, self.final_layer]

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw the weights from torch's default generator; the network then computes zeros.

        The second time adds nothing to the condition yet, and its weights are drawn last: the others are those of the
        same network without one.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                if not name.startswith("r_embedder."):
                    nn.init.xavier_uniform_(module.weight.flatten(1))
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in self.t_embedder.linears:
            nn.init.normal_(layer.weight, std=0.02)
        zeroed = [module.linear for module in self.modules() if isinstance(module, Modulation)]
        for linear in (*zeroed, self.final_layer.linear):
            nn.init.zeros_(linear.weight)
        if self.r_embedder is not None:
            first, last = self.r_embedder.linears
            nn.init.normal_(first.weight, std=0.02)
            nn.init.zeros_(last.weight)

    def forward(self, x: Value, t: Value, y: Tensor, r: Tensor | None = None) -> Value:
        """x [B, C, S, S] any float, t [B] in [0, 1], y [B] int64 labels → [B, C, S, S], float32 or wider.

        r: the other end [B] of each interval of time (`time_pairs`), t itself where it is None. It is known to the
        network as r - t, the best of the inputs compared in MeanFlow (arXiv 2505.13447, table 1c). Where x or t has a
        tangent, so has the result: its derivative along the two, at constant r; gradients flow through values alone.

        Draws no random numbers and never waits for the device: that labels are in range is checked with the data.
        """
        self._check(value_of(x), value_of(t), y, r)
        weights_dtype = self.x_embedder.proj.weight.dtype
        acc_dtype = at_least_float32(weights_dtype)
        rope = self.feat_rope
        cos, sin = (None, None) if rope is None else (rope.freqs_cos, rope.freqs_sin)  # [N, d]
        c = self._condition(linear_map(lambda times: times.to(acc_dtype), t), y, r, acc_dtype)  # [B, D]
        x = self.x_embedder(linear_map(lambda latents: latents.to(weights_dtype), x))  # [B, N, D]
        x = add(x, self.pos_embed.to(acc_dtype))  # [B, N, D]
        stream_dtype = torch.promote_types(weights_dtype, self.residual_dtype)
        x = linear_map(lambda tokens: tokens.to(stream_dtype), x)  # [B, N, D]
        adaln = cast(list[Modulation], [block.adaLN_modulation for block in self.blocks])
        vectors = modulations(adaln, c, self.ops) if self.params_gathered else (m(c) for m in adaln)  # [B, D] each
        pending: PendingResidual | None = None
        kind = self.config.use_checkpoint if self.training and torch.is_grad_enabled() else False
        for number, (block, modulation) in enumerate(zip(self.blocks, vectors, strict=True)):
            if recomputes(kind, number):
                x, pending = recomputed(block, self.saved_operators, kind, x, pending, modulation, cos, sin)
            else:
                x, pending = block(x, pending, modulation, cos, sin)
        x = self.final_layer(x, pending, c)  # [B, N, P·P·out_channels]
        patch_size, channels = self.config.patch_size, self.config.in_channels
        return linear_map(lambda patches: unpatchify(patches, patch_size).to(acc_dtype)[:, :channels], x)

    def _condition(self, t: Value, y: Tensor, r: Tensor | None, dtype: torch.dtype) -> Value:
        """c [B, D] of the time or the pair of times, and the label, in `dtype`."""
        c = add(self.t_embedder(t), self.y_embedder(y).to(dtype))  # [B, D]
        if self.r_embedder is None:
            return c
        interval = subtract(value_of(t) if r is None else r.to(dtype), t)  # [B]
        return add(c, self.r_embedder(interval))  # [B, D]

    def _check(self, x: Tensor, t: Tensor, y: Tensor, r: Tensor | None) -> None:
        config = self.config
        latent = (config.in_channels, config.input_size, config.input_size)
        if x.dim() != 4 or tuple(x.shape[1:]) != latent:
            raise ValueError(f"x is {tuple(x.shape)}; this model takes [B, {', '.join(map(str, latent))}]")
        if r is not None and not config.time_pairs:
            raise ValueError("a second time r is given to a network that was made without time_pairs")
        for name, value in (("t", t), ("y", y), ("r", t if r is None else r)):
            if tuple(value.shape) != (x.shape[0],):
                raise ValueError(f"{name} is {tuple(value.shape)}; one per sample is [{x.shape[0]}]")

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float,
        cfg_interval: bool | None = None,
        cfg_interval_start: float | None = None,
        cfg_channels: int | None = None,
    ) -> Tensor:
        """Classifier-free guidance on a doubled batch, as the published method of this name, without host reads.

        The first half of y [2B] are labels, the second null labels; the second half of x [2B, C, S, S] is ignored. In
        the first `cfg_channels` channels (None: all; published: 3) both halves of the result are
        `uncond + cfg_scale·(cond - uncond)`, or cond where cfg_interval is on and t < cfg_interval_start; in the other
        channels each half keeps its own prediction.
        """
        if x.shape[0] % 2:
            raise ValueError(f"forward_with_cfg takes an even batch, got {x.shape[0]}")
        if cfg_interval and cfg_interval_start is None:
            raise ValueError("cfg_interval needs cfg_interval_start")
        half = x[: x.shape[0] // 2]  # [B, C, S, S]
        output = self(torch.cat([half, half]), t, y)  # [2B, C, S, S]
        channels = output.shape[1] if cfg_channels is None else cfg_channels
        cond, uncond = output[:, :channels].chunk(2)  # [B, channels, S, S] both
        guided = uncond + cfg_scale * (cond - uncond)
        if cfg_interval and cfg_interval_start is not None:
            below = t[: len(half)].reshape(-1, 1, 1, 1) < cfg_interval_start
            guided = torch.where(below, cond, guided)
        return torch.cat([torch.cat([guided, guided]), output[:, channels:]], dim=1)
