"""Baseline of training steps and samplers: LightningDiT as it is usually written, in PyTorch's own operators.

float32 weights under bfloat16 autocast as the published code trains, attention by torch's own choice of kernel, norms
by `F.rms_norm`, fused AdamW, and a moving average over lists of tensors (the published one loops in Python). It reads
the parameters of our network, so both can be given the same weights. Its sampler is the published loop.

Tangents are those of `torch.func.jvp`. The fused kernels of attention have no forward mode, so attention with tangents
is torch's "math", which keeps its scores; and norms with tangents are written out. In torch 2.11 every product with a
tangent is made a second time, by the tangent of its weights, which is zero.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.forward_mode import Dual
from lightningdit.duals import Value, value_of
from lightningdit.model import EPS, Block, DeferredBiasLinear, LightningDiT, unpatchify

Norm = Callable[[Tensor, torch.Size, Tensor, float], Tensor]


class PlainLightningDiT(nn.Module):
    """`network`, taken over, operator by operator: RMSNorm, SwiGLU, RoPE, no QK norm, as the published large ones.

    autocast: dtype of products and attention; None leaves the weights' own.
    Raises ValueError for a network of other parts.
    """

    def __init__(self, network: LightningDiT, autocast: torch.dtype | None = torch.bfloat16):
        super().__init__()
        config = network.config
        if not (config.use_rmsnorm and config.use_swiglu and config.use_rope) or config.use_qknorm or config.wo_shift:
            raise ValueError(
                f"the plain model has RMSNorm, SwiGLU, RoPE and shifts, no QK norm; the config is {config}"
            )
        self.network, self.autocast = network, autocast
        for module in network.modules():
            if isinstance(module, DeferredBiasLinear):
                module.defer_bias = False  # layers add their own biases here

    def forward(self, x: Value, t: Value, y: Tensor, r: Tensor | None = None) -> Value:
        """As `LightningDiT.forward`; float32 result, or float64 of float64 weights. Tangents of both x and t, or none.

        The result's tangent is a constant to autograd: what was kept for its gradient is given back.
        """
        if not isinstance(x, Dual) or not isinstance(t, Dual):
            return self._predict(value_of(x), value_of(t), y, r)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return self._predict(x, t, y, r, rms_norm)

        with sdpa_kernel(SDPBackend.MATH):
            value, tangent, *_ = torch.func.jvp(predict, (x.value, t.value), (x.tangent, t.tangent))
        return Dual(value, tangent.detach())

    def _predict(self, x: Tensor, t: Tensor, y: Tensor, r: Tensor | None, norm: Norm = F.rms_norm) -> Tensor:
        network = self.network
        with torch.autocast(x.device.type, enabled=False):
            c = network.t_embedder(t.to(x.dtype)) + network.y_embedder(y)
            if network.r_embedder is not None:
                c = c + network.r_embedder((t if r is None else r).to(x.dtype) - t.to(x.dtype))
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            x = network.x_embedder(x) + network.pos_embed
            cos, sin = network.feat_rope.freqs_cos, network.feat_rope.freqs_sin
            for block in network.blocks:
                x = self._block(block, x, c, cos, sin, norm)
            shift, scale = network.final_layer.adaLN_modulation(c)
            x = network.final_layer.linear(modulate(x, network.final_layer.norm_final.weight, shift, scale, norm))
        return unpatchify(x.to(c.dtype), network.config.patch_size)[:, : network.config.in_channels]

    def _block(self, block: Block, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor, norm: Norm) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = block.adaLN_modulation(c)
        y = modulate(x, block.norm1.weight, shift, scale, norm)
        qkv = block.attn.qkv(y).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (apply_rope(part, cos, sin) for part in qkv[:2])
        attention = F.scaled_dot_product_attention(q, k, qkv[2]).transpose(1, 2).flatten(2)
        x = x + gate[:, None] * block.attn.proj(attention)
        a, b = block.mlp.w12(modulate(x, block.norm2.weight, shift_mlp, scale_mlp, norm)).chunk(2, dim=-1)
        return x + gate_mlp[:, None] * block.mlp.w3(F.silu(a) * b)


@torch.no_grad()
def plain_euler(
    network: PlainLightningDiT,
    z: Tensor,
    y: Tensor,
    times: Tensor,
    null_label: int,
    scale: float,
    interval_start: float,
    channels: int,
) -> Tensor:
    """Euler's method from noise z [B, C, S, S] over the times [points], guided as the published sampler guides.

    Every call has both halves, labels y [B] and null labels; below `interval_start` the unconditional one is thrown
    away, on the device. The first `channels` channels are guided, the others stay conditional.
    """
    labels = torch.cat([y, torch.full_like(y, null_label)])
    for t, after in pairwise(times):
        output = network(torch.cat([z, z]), t.expand(len(labels)), labels)
        cond, uncond = output.chunk(2)
        guided = uncond[:, :channels] + scale * (cond[:, :channels] - uncond[:, :channels])
        guided = torch.where(t < interval_start, cond[:, :channels], guided)
        z = z + (after - t) * torch.cat([guided, cond[:, channels:]], dim=1)
    return z


def modulate(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, norm: Norm) -> Tensor:
    return norm(x, weight.shape, weight, EPS) * (1 + scale[:, None]) + shift[:, None]


def rms_norm(x: Tensor, shape: torch.Size, weight: Tensor, eps: float) -> Tensor:
    """`F.rms_norm` over the last axis, by operators that have a forward mode on every device."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def apply_rope(u: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of neighbours rotated by the tables [N, d]; u [B, H, N, d], its dtype kept."""
    even, odd = u.unflatten(-1, (-1, 2)).unbind(-1)
    return (u * cos + torch.stack((-odd, even), dim=-1).flatten(-2) * sin).to(u.dtype)
