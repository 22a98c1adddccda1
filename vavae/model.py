"""The KL autoencoder of VA-VAE (arXiv 2501.01423; the convolutional design of latent diffusion, arXiv 2112.10752).

Parameter names and layout are the published checkpoints'. Every GroupNorm followed by SiLU is the op
`group_norm_silu`; the memory format of the input (contiguous or channels-last) is kept throughout.

Shapes: B batch, C channels, H and W height and width of what a layer is given (at the ends, of the image), h and w of
the latents (H / downsample_ratio), Z z_channels, E embed_dim.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import log, pi

import torch
from torch import nn
from torch.nn import functional as F

from kernels.compile.recompute import recomputed
from kernels.registry import Ops
from vavae.config import GROUPS, AutoencoderConfig

EPS = 1e-6  # of every GroupNorm


class GroupNormSilu(nn.Module):
    """GroupNorm with gain and bias, then SiLU, in one op. Parameters are named as nn.GroupNorm's."""

    def __init__(self, channels: int, ops: Ops):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.ops = ops

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.group_norm_silu(x, self.weight, self.bias, GROUPS, EPS)  # [B, C, H, W]


class ResnetBlock(nn.Module):
    """Two 3×3 convolutions, each after a norm; the shortcut is a 1×1 convolution where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float, ops: Ops):
        super().__init__()
        self.norm1 = GroupNormSilu(in_channels, ops)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNormSilu(out_channels, ops)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(self.norm1(x))  # [B, out_channels, H, W]
        h = self.conv2(self.dropout(self.norm2(h)))  # [B, out_channels, H, W]
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Self-attention over all positions with a single head of C channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=EPS)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)  # [B, C, H, W]
        # [B, 1, H·W, C] each
        q, k, v = (conv(y).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)  # [B, 1, H·W, C]
        y = y.squeeze(1).transpose(1, 2).reshape(x.shape)  # [B, C, H, W]
        return x + self.proj_out(y)


class Downsample(nn.Module):
    """Halves the size by a strided 3×3 convolution, padded by one row below and one column on the right."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # [B, C, H / 2, W / 2]


def upsample_nearest_2x(x: torch.Tensor) -> torch.Tensor:
    """Nearest-neighbour upsampling [B, C, H, W] → [B, C, 2H, 2W] in the same memory format.

    The same numbers as `F.interpolate`, whose gradient a compiler turns into atomic additions; this one's is a sum over
    an axis of expanded copies, which is deterministic.
    """
    B, C, H, W = x.shape
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(B, H, 2, W, 2, C)
        upsampled = pixels.reshape(B, 2 * H, 2 * W, C).permute(0, 3, 1, 2)  # [B, C, 2H, 2W]
        return upsampled.contiguous(memory_format=torch.channels_last)
    # contiguous(): for H = W = 1 the reshape is still an expanded view.
    return x[:, :, :, None, :, None].expand(B, C, H, 2, W, 2).reshape(B, C, 2 * H, 2 * W).contiguous()


class Upsample(nn.Module):
    """Doubles the size by nearest-neighbour upsampling, then a 3×3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(upsample_nearest_2x(x))  # [B, C, 2H, 2W]


class Level(nn.Module):
    """The layers at one resolution: residual blocks, each followed by attention if `attention`.

    Encoder and decoder replace one of the identities by their resampling to the next resolution.
    """

    def __init__(self, in_channels: int, out_channels: int, blocks: int, attention: bool, dropout: float, ops: Ops):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        pairs = pairwise(widths)
        self.block = nn.ModuleList(ResnetBlock(i, o, dropout, ops) for i, o in pairs)
        self.attn = nn.ModuleList(AttnBlock(out_channels) if attention else nn.Identity() for _ in range(blocks))
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block, attn in zip(self.block, self.attn, strict=True):
            x = attn(block(x))  # [B, out_channels, H, W]
        return self.upsample(self.downsample(x))


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the latents' resolution."""

    def __init__(self, channels: int, dropout: float, ops: Ops):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout, ops)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels, dropout, ops)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))  # [B, C, h, w]


class Coder(nn.Module):
    """What encoder and decoder have in common: a last convolution apart from the rest, and activation checkpointing.

    `hidden` is what is compiled. The last convolution stays outside of that graph: the gradients that balance the terms
    of the loss are taken at its weights, and a compiled backward pass always runs whole.

    Args:
        dropout: of the blocks.

    Attributes:
        use_checkpoint: as `train.use_checkpoint`: false, true (each level saves its input alone) or "pointwise"
            (convolutions save their results, norms and activations are computed again).
    """

    conv_out: nn.Conv2d
    use_checkpoint: bool | str = False

    def __init__(self, dropout: float):
        super().__init__()
        self._random = dropout > 0

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """The input of the last convolution."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_out(self.hidden(x))

    def run(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """`block(x)`, computed again in the backward pass where `use_checkpoint` says so."""
        if self.use_checkpoint and self.training and torch.is_grad_enabled():
            return recomputed(block, (), self.use_checkpoint, x, random=self._random)
        return block(x)


class Encoder(Coder):
    """Images [B, in_channels, H, W] → [B, 2Z, h, w]."""

    def __init__(self, config: AutoencoderConfig, ops: Ops):
        super().__init__(config.dropout)
        widths = [config.ch] + [config.ch * multiple for multiple in config.ch_mult]
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for index, size in enumerate(config.level_resolutions):
            attention = size in config.attn_resolutions
            level = Level(widths[index], widths[index + 1], config.num_res_blocks, attention, config.dropout, ops)
            if index < len(config.ch_mult) - 1:
                level.downsample = Downsample(widths[index + 1])
            self.down.append(level)
        self.mid = MidBlock(widths[-1], config.dropout, ops)
        self.norm_out = GroupNormSilu(widths[-1], ops)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)  # [B, ch, H, W]
        for level in self.down:
            x = self.run(level, x)  # [B, ch · ch_mult[level], H / 2, W / 2], the last at h and w as its input
        return self.norm_out(self.run(self.mid, x))  # [B, ch · ch_mult[-1], h, w]


class Decoder(Coder):
    """[B, Z, h, w] → images [B, out_ch, H, W]. `up` is indexed as `down`: the last runs first."""

    def __init__(self, config: AutoencoderConfig, ops: Ops):
        super().__init__(config.dropout)
        resolutions = config.decoder_attn_resolutions
        resolutions = config.attn_resolutions if resolutions is None else resolutions
        widths = [config.ch * multiple for multiple in config.ch_mult]
        widths.append(widths[-1])
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = MidBlock(widths[-1], config.dropout, ops)
        self.up = nn.ModuleList()
        for index, size in enumerate(config.level_resolutions):
            attention = size in resolutions
            level = Level(widths[index + 1], widths[index], config.num_res_blocks + 1, attention, config.dropout, ops)
            if index > 0:
                level.upsample = Upsample(widths[index])
            self.up.append(level)
        self.norm_out = GroupNormSilu(widths[0], ops)
        self.conv_out = nn.Conv2d(widths[0], config.out_ch, 3, padding=1)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        x = self.run(self.mid, self.conv_in(x))  # [B, ch · ch_mult[-1], h, w]
        for level in reversed(self.up):
            x = self.run(level, x)  # [B, ch · ch_mult[level], 2H, 2W], the last (`up[0]`) at H and W as its input
        return self.norm_out(x)  # [B, ch · ch_mult[0], H, W]


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over latents, in float32 or float64."""

    mean: torch.Tensor  # [B, E, h, w]
    logvar: torch.Tensor  # [B, E, h, w], clamped to [−30, 20]

    @classmethod
    def from_moments(cls, moments: torch.Tensor) -> "Posterior":
        """From mean and unclamped log variance stacked along the channels, [B, 2E, h, w] of any float dtype."""
        moments = moments.to(torch.promote_types(moments.dtype, torch.float32))
        mean, logvar = moments.chunk(2, dim=1)  # [B, E, h, w] both
        return cls(mean, logvar.clamp(-30.0, 20.0))

    @property
    def std(self) -> torch.Tensor:
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> torch.Tensor:
        return torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | None = None, *, noise: torch.Tensor | None = None) -> torch.Tensor:
        """`mean + std·noise` [B, E, h, w]; the standard normal noise is the one given, or drawn from the generator."""
        if noise is None:
            noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.dtype)

    def mode(self) -> torch.Tensor:
        return self.mean

    def kl(self, other: "Posterior | None" = None) -> torch.Tensor:
        """KL divergence in nats to `other` (default: the standard normal), summed over all but the batch: [B]."""
        if other is None:
            terms = self.mean.square() + self.var - 1.0 - self.logvar
        else:
            distance = (self.mean - other.mean).square() + self.var
            terms = distance / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.sum(dim=(1, 2, 3))

    def nll(self, sample: torch.Tensor) -> torch.Tensor:
        """Negative log density of `sample` in nats, summed over all but the batch: [B]."""
        terms = log(2 * pi) + self.logvar + (sample - self.mean).square() / self.var
        return 0.5 * terms.sum(dim=(1, 2, 3))


class AutoencoderKL(nn.Module):
    """The tokenizer: encoder, decoder and the 1×1 convolutions between them and the latents.

    Args:
        config: sizes.
        ops: of `kernels.select(...)`; `group_norm_silu` is used.
    """

    def __init__(self, config: AutoencoderConfig, ops: Ops):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, ops)
        self.decoder = Decoder(config, ops)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def moments(self, images: torch.Tensor) -> torch.Tensor:
        """Posterior mean and log variance of images in [−1, 1], stacked: [B, 2E, h, w] in the weights' dtype.

        Raises:
            ValueError: images of another number of channels, or of a size that is no multiple of the down-sampling.
        """
        channels, ratio = self.config.in_channels, self.config.downsample_ratio
        if images.ndim != 4 or images.shape[1] != channels or images.shape[2] % ratio or images.shape[3] % ratio:
            want = f"[B, {channels}, H, W] with H and W multiples of {ratio}"
            raise ValueError(f"expected images {want}, got {list(images.shape)}")
        h = self.encoder(images.to(self.quant_conv.weight.dtype))  # [B, 2Z, h, w]
        return self.quant_conv(h)  # [B, 2E, h, w]

    def encode(self, images: torch.Tensor) -> Posterior:
        """The posterior of images [B, in_channels, H, W] in [−1, 1]."""
        return Posterior.from_moments(self.moments(images))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Images [B, out_ch, H, W] of latents [B, E, h, w]: about [−1, 1], not clamped, in the weights' dtype."""
        if z.ndim != 4 or z.shape[1] != self.config.embed_dim:
            raise ValueError(f"expected latents [B, {self.config.embed_dim}, h, w], got {list(z.shape)}")
        z = self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype))  # [B, Z, h, w]
        return self.decoder(z)  # [B, out_ch, H, W]

    def forward(self, images: torch.Tensor, *, noise: torch.Tensor | None = None) -> tuple[torch.Tensor, Posterior]:
        """Reconstructions, from the posterior's sample under `noise` or from its mode without, and the posterior."""
        posterior = self.encode(images)
        z = posterior.mode() if noise is None else posterior.sample(noise=noise)  # [B, E, h, w]
        return self.decode(z), posterior
