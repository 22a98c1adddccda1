"""Baseline of the tokenizer's training step: VA-VAE's losses as they are usually written, in PyTorch's own operators.

Float32, `F.group_norm` and SiLU, LPIPS as its package has it, and for each of the two adaptive weights two calls of
`torch.autograd.grad` through whatever lies between, after which the weighted sum is walked backwards once more (VQGAN,
arXiv 2012.09841, as latent diffusion and VA-VAE train it). It reads the parameters of our networks, so that both can be
given the same.
"""

import math
from types import MethodType

import lpips
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vavae.config import LossConfig
from vavae.model import EPS, GROUPS, GroupNormSilu
from vavae.task import AlignedAutoencoder


class PlainAutoencoder(nn.Module):
    """`network`, taken over, with its loss.

    Args:
        network: norms of it are replaced.
        perceptual: the network of the LPIPS package, or None.
        discriminator: logits of images; None without the GAN term.
    """

    def __init__(
        self,
        network: AlignedAutoencoder,
        loss: LossConfig,
        perceptual: lpips.LPIPS | None,
        discriminator: nn.Module | None,
    ):
        super().__init__()
        if loss.reconstruction != "sum" or loss.disc_loss != "hinge":
            raise ValueError(
                f"the plain formulation sums errors and has a hinge loss; the config has reconstruction "
                f"{loss.reconstruction} and disc_loss {loss.disc_loss}"
            )
        self.network, self.loss = network, loss
        self.perceptual, self._discriminator = perceptual, [discriminator]  # in a list: no part of this network
        for module in network.modules():
            if isinstance(module, GroupNormSilu):
                module.forward = MethodType(group_norm_silu, module)  # type: ignore[method-assign]

    def forward(self, images: Tensor, noise: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor, dict]:
        """The loss of images [B, 3, H, W] with a graph, the reconstructions (detached), and scalars."""
        net, loss = self.network, self.loss
        mean, logvar = net.quant_conv(net.encoder(images)).chunk(2, dim=1)
        logvar = logvar.clamp(-30.0, 20.0)
        z = mean + (0.5 * logvar).exp() * noise
        reconstruction = net.decoder(net.post_quant_conv(z))
        error = (images - reconstruction).abs()
        if self.perceptual is not None and loss.perceptual_weight > 0:
            error = error + loss.perceptual_weight * self.perceptual(images, reconstruction)
        nll = (error / math.exp(loss.logvar) + loss.logvar).sum() / len(images)
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum() / len(images)
        total, logs = nll + loss.kl_weight * kl, {"nll": nll, "kl": kl}
        if features is not None:
            assert loss.vf_weight is not None
            pair = (net.linear_proj(z), features) if net.reverse else (z, net.linear_proj(features))
            distmat, cos = vf_terms(pair[0], pair[1], loss)
            vf = loss.distmat_weight * distmat + loss.cos_weight * cos
            balanced = adaptive_weight(nll, vf, net.encoder.conv_out.weight, 1e8) if loss.adaptive_vf else 1.0
            total = total + loss.vf_weight * balanced * vf
            logs |= {"vf_distmat": distmat, "vf_cos": cos, "vf_weight": torch.as_tensor(loss.vf_weight * balanced)}
        if self._discriminator[0] is not None:
            gan = -self._discriminator[0](reconstruction).mean()
            weight = loss.disc_weight * adaptive_weight(nll, gan, net.decoder.conv_out.weight, 1e4)
            total, logs = total + loss.disc_factor * weight * gan, logs | {"d_weight": weight}
        return total, reconstruction.detach(), {name: value.detach() for name, value in logs.items()}


def group_norm_silu(module: GroupNormSilu, x: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, module.weight, module.bias, EPS))


def adaptive_weight(nll: Tensor, term: Tensor, layer: Tensor, limit: float) -> Tensor:
    norms = [torch.autograd.grad(value, layer, retain_graph=True)[0].norm() for value in (nll, term)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0.0, limit).detach()


def vf_terms(z: Tensor, f: Tensor, loss: LossConfig) -> tuple[Tensor, Tensor]:
    """Equations 1 to 5 of arXiv 2501.01423 for two maps [B, C, h, w], by whole matrices of cosines: distmat and cos."""
    cosines = [torch.einsum("bcm,bcn->bmn", *[F.normalize(x.flatten(2), dim=1)] * 2) for x in (z, f)]
    distmat = F.relu((cosines[0] - cosines[1]).abs() - loss.distmat_margin).mean()
    cos = F.relu(1.0 - loss.cos_margin - F.cosine_similarity(z, f, dim=1)).mean()
    return distmat, cos


def discriminator_loss(loss: LossConfig, discriminator: nn.Module, images: Tensor, reconstruction: Tensor) -> Tensor:
    """The hinge loss (arXiv 1705.02894)."""
    real, fake = discriminator(images), discriminator(reconstruction)
    return 0.5 * loss.disc_factor * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
