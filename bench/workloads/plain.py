"""Baseline of training steps and samplers: LightningDiT as it is usually written, in PyTorch's own operators.

float32 weights under bfloat16 autocast as the published code trains, attention by torch's own choice of kernel, norms
by `F.rms_norm`, fused AdamW, and a moving average over lists of tensors (the published one loops in Python). It reads
the parameters of our network, so both can be given the same weights. Its sampler is the published loop.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightningdit.model import EPS, Block, DeferredBiasLinear, LightningDiT, unpatchify


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

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """As `LightningDiT.forward`; float32 result, or float64 of float64 weights."""
        network = self.network
        with torch.autocast(x.device.type, enabled=False):
            c = network.t_embedder(t.to(x.dtype)) + network.y_embedder(y)
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            x = network.x_embedder(x) + network.pos_embed
            cos, sin = network.feat_rope.freqs_cos, network.feat_rope.freqs_sin
            for block in network.blocks:
                x = self._block(block, x, c, cos, sin)
            shift, scale = network.final_layer.adaLN_modulation(c)
            x = network.final_layer.linear(modulate(x, network.final_layer.norm_final.weight, shift, scale))
        return unpatchify(x.to(c.dtype), network.config.patch_size)[:, : network.config.in_channels]

    def _block(self, block: Block, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = block.adaLN_modulation(c)
        y = modulate(x, block.norm1.weight, shift, scale)
        qkv = block.attn.qkv(y).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (apply_rope(part, cos, sin) for part in qkv[:2])
        attention = F.scaled_dot_product_attention(q, k, qkv[2]).transpose(1, 2).flatten(2)
        x = x + gate[:, None] * block.attn.proj(attention)
        a, b = block.mlp.w12(modulate(x, block.norm2.weight, shift_mlp, scale_mlp)).chunk(2, dim=-1)
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


def modulate(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS) * (1 + scale[:, None]) + shift[:, None]


def apply_rope(u: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of neighbours rotated by the tables [N, d]; u [B, H, N, d], its dtype kept."""
    even, odd = u.unflatten(-1, (-1, 2)).unbind(-1)
    return (u * cos + torch.stack((-odd, even), dim=-1).flatten(-2) * sin).to(u.dtype)
