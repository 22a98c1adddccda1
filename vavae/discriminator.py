"""The patch discriminator and its losses (pix2pix, arXiv 1611.07004; hinge loss, arXiv 1705.02894)."""

from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from vavae.gradients import upcast


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose arithmetic and running statistics are float32 (or float64), whatever its weights and input are.

    In bfloat16 a running mean with momentum 0.1 stops moving once its updates round to nothing.
    """

    def _apply(self, fn, recurse=True):
        statistics = {name: value for name, value in self.named_buffers() if value.is_floating_point()}
        super()._apply(fn, recurse)
        for name, value in statistics.items():
            moved = getattr(self, name)
            if torch.finfo(moved.dtype).bits < 32:
                setattr(self, name, value.to(moved.device))  # from before the cast, not rounded
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        acc_dtype = torch.promote_types(x.dtype, torch.float32)
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        assert self.momentum is not None
        y = F.batch_norm(
            x.to(acc_dtype),
            self.running_mean,
            self.running_var,
            self.weight.to(acc_dtype),
            self.bias.to(acc_dtype),
            self.training,
            self.momentum,
            self.eps,
        )
        return y.to(x.dtype)


class NLayerDiscriminator(nn.Module):
    """PatchGAN: images [B, in_channels, H, W] → a logit per patch [B, 1, about H/8, about W/8] (for 3 layers).

    Args:
        in_channels: of the images.
        ndf: width of the first convolution; it doubles with every layer, up to eight times.
        n_layers: number of strided convolutions.

    BatchNorm statistics are local to a process. Weights start at N(0, 0.02), BatchNorm gains at N(1, 0.02).
    """

    def __init__(self, in_channels: int = 3, ndf: int = 64, n_layers: int = 3):
        super().__init__()
        widths = [ndf * min(2**layer, 8) for layer in range(n_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for layer in range(1, n_layers + 1):
            stride = 2 if layer < n_layers else 1
            layers += [
                nn.Conv2d(widths[layer - 1], widths[layer], 4, stride=stride, padding=1, bias=False),
                BatchNorm2d(widths[layer]),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(_initialise)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first = self.main[0]
        assert isinstance(first, nn.Conv2d)
        return self.main(images.to(first.weight.dtype))  # [B, 1, about H/8, about W/8]


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        module.weight.normal_(0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        module.weight.normal_(1.0, 0.02)
        module.bias.zero_()


def hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Half the mean of `relu(1 − real)` plus half the mean of `relu(1 + fake)`, of logits of any float dtype."""
    return 0.5 * (F.relu(1.0 - upcast(real)).mean() + F.relu(1.0 + upcast(fake)).mean())


def vanilla_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Half the two binary cross-entropies, of logits of any float dtype."""
    return 0.5 * (F.softplus(-upcast(real)).mean() + F.softplus(upcast(fake)).mean())


DISCRIMINATOR_LOSSES = {"hinge": hinge_loss, "vanilla": vanilla_loss}


def adopt_weight(weight: float, iteration: int, threshold: int) -> float:
    """`weight` once `threshold` iterations are done, before that 0; `iteration` counts from 0."""
    return weight if iteration >= threshold else 0.0


@contextmanager
def frozen(module: nn.Module):
    """Within the context, gradients flow through the module but not to its parameters; afterwards as before."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield module
    finally:
        for p in trainable:
            p.requires_grad_(True)
