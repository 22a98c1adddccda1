"""The tokenizer's loss: reconstruction, perceptual, KL, GAN and VF terms (arXiv 2501.01423, 3.2; arXiv 2112.10752).

All terms are computed in float32 (or float64) whatever the networks' dtype. Adaptive weights, ratios of the gradients'
norms at one layer, balance the GAN and VF terms against the reconstruction; they add nothing to any `.grad`.

Gradients are linear in what a term is weighted by, so none is computed twice: LPIPS and the discriminator are walked
backwards once, to the reconstruction, where their gradients are balanced and added; the encoder once. The decoder is
walked once as well, unless the VF and the GAN term are both balanced: the weight of the first needs the gradient of the
reconstruction error alone, at the latents, and training the sum of both (`vavae/README.md` has the table).

Shapes: B images, H and W of the images, C channels, h and w of latents and features.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lpips
import torch
from torch import nn
from torchvision.models import VGG16_Weights

from common.files import DownloadError
from common.tensors import is_downloaded, load_strict, read_tensors
from kernels.registry import Ops
from vavae.config import LossConfig
from vavae.discriminator import DISCRIMINATOR_LOSSES
from vavae.gradients import adaptive_weight, upcast, with_gradients
from vavae.model import Posterior
from vavae.watch import Logs, latent_activity

Ends = tuple[
    tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]
]  # where a backward pass goes on, and from which gradients
VGG = VGG16_Weights.IMAGENET1K_V1
MAX_GAN_WEIGHT = 1e4
MAX_VF_WEIGHT = 1e8


class Perceptual(nn.Module):
    """Frozen LPIPS on VGG-16 (arXiv 1801.03924): distances [B, 1, 1, 1] between batches [B, 3, H, W] in [−1, 1].

    Args:
        net: of the `lpips` package.
    """

    def __init__(self, net: lpips.LPIPS):
        super().__init__()
        self.net = net
        self.eval().requires_grad_(False)

    @classmethod
    def from_weights(cls, backbone: str | None) -> "Perceptual":
        """With the linear heads inside the `lpips` wheel (version 0.1).

        Args:
            backbone: local VGG-16 weights in torchvision's layout; None downloads torchvision's ImageNet weights.

        Raises:
            DownloadError: the backbone could not be downloaded.
            ValueError: the local file does not fit.
        """
        vgg = read_tensors(backbone) if backbone is not None else _download_vgg()
        shipped = Path(lpips.__file__).parent / "weights/v0.1/vgg.pth"
        heads = read_tensors(shipped)
        net = lpips_network("cpu")
        # torchvision's `features.<layer>.<kind>` is here `slice<n>.<layer>.<kind>`.
        names = {key: f"features.{key.split('.', 1)[1]}" for key in net.net.state_dict()}
        convolutions = {key: vgg[name] for key, name in names.items() if name in vgg}
        load_strict(net.net, convolutions, f"{backbone or 'of torchvision'} as VGG-16")
        for index, head in enumerate(net.lins):
            load_strict(head, {"model.1.weight": heads[f"lin{index}.model.1.weight"]}, shipped)
        return cls(net)

    def cast(self, dtype: torch.dtype) -> None:
        """Let VGG compute in `dtype`; its inputs are scaled, and its activations compared, in float32 all the same."""
        self.net.net.to(dtype)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return lpips_distance(self.net, x, y)  # [B, 1, 1, 1]


def lpips_distance(net: lpips.LPIPS, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Distances [B, 1, 1, 1] between batches [B, 3, H, W] in [−1, 1], as `net` computes them.

    Its VGG may have weights of another dtype than the images: only there they are computed with.
    """
    dtype = next(net.net.parameters()).dtype
    towers = [net.net(net.scaling_layer(image).to(dtype)) for image in (x, y)]
    distances = []
    for head, *activations in zip(net.lins, *towers, strict=True):
        a, b = (lpips.normalize_tensor(activation.to(x.dtype)) for activation in activations)  # [B, C, H', W']
        distances.append(head((a - b).square()).mean((2, 3), keepdim=True))  # [B, 1, 1, 1]
    return torch.stack(distances).sum(0)


def lpips_network(device: torch.device | str) -> lpips.LPIPS:
    """LPIPS with uninitialised weights: initialising the whole VGG-16 that it is cut from would take seconds."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # torchvision's, about an argument that lpips still uses
        net = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    for part in (net.net, *net.lins):
        part.to_empty(device=device)
    return net.to(device)


def to_download(loss: LossConfig) -> str | None:
    """Description of what `Perceptual` would download for a loss; None for a local file or one in the cache."""
    if loss.perceptual != "lpips" or loss.perceptual_weights is not None or is_downloaded(VGG.url):
        return None
    return "VGG-16 for LPIPS (or name a local copy in loss.perceptual_weights)"


def _download_vgg() -> dict[str, torch.Tensor]:
    try:
        return VGG.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise DownloadError(
            f"could not download VGG-16 for LPIPS ({error}): name a local copy in "
            "loss.perceptual_weights, or set loss.perceptual to none"
        ) from error


@dataclass(frozen=True)
class AutoencoderOutput:
    """One forward pass of the autoencoder, as the loss takes it.

    Fields:
        images, reconstruction: [B, 3, H, W].
        posterior: of the images.
        z: the sample [B, E, h, w] that was decoded.
        latents, features: the arguments of the VF loss after the projection, [B, C, h, w]; None without it.
        encoder_layer, decoder_layer: weights whose gradients the adaptive weights compare, `encoder.conv_out.weight`
            and `decoder.conv_out.weight`.
        decoder_parameters: all trained weights between `z` and `reconstruction`.
    """

    images: torch.Tensor
    reconstruction: torch.Tensor
    posterior: Posterior
    z: torch.Tensor
    latents: torch.Tensor | None
    features: torch.Tensor | None
    encoder_layer: torch.Tensor
    decoder_layer: torch.Tensor
    decoder_parameters: tuple[torch.Tensor, ...]


def reconstruction_nll(
    config: LossConfig,
    images: torch.Tensor,
    reconstruction: torch.Tensor,
    perceptual: Callable[..., torch.Tensor] | None,
) -> tuple[torch.Tensor, Logs]:
    """Negative log likelihood of each image, [B], and the mean errors to log.

    `(|x − y| + perceptual_weight · LPIPS) / exp(logvar) + logvar`, summed (or averaged, see
    `LossConfig.reconstruction`) over pixels and channels.
    """
    images, reconstruction = upcast(images), upcast(reconstruction)
    error = (images - reconstruction).abs()  # [B, 3, H, W]
    logs = {"rec": error.detach().mean()}
    if perceptual is not None and config.perceptual_weight > 0:
        distance = perceptual(images, reconstruction)  # [B, 1, 1, 1]
        logs["perceptual"] = distance.detach().mean()
        error = error + config.perceptual_weight * distance
    nll = error * math.exp(-config.logvar) + config.logvar  # [B, 3, H, W]
    return (nll.sum if config.reconstruction == "sum" else nll.mean)(dim=(1, 2, 3)), logs


def kl_term(config: LossConfig, posterior: Posterior) -> torch.Tensor:
    """KL to the standard normal, mean over the batch; with `reconstruction: mean` twice its mean over dimensions."""
    if config.reconstruction == "sum":
        return posterior.kl().mean()
    return 2.0 * posterior.kl().mean() / posterior.mean[0].numel()


def vf_term(config: LossConfig, ops: Ops, latents: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, Logs]:
    """The VF loss (arXiv 2501.01423, equations 1 to 5) of two [B, C, h, w] maps, and its two parts to log."""
    distmat, cos = ops.vf_loss(latents, features, config.distmat_margin, config.cos_margin)  # scalars
    distmat, cos = upcast(distmat), upcast(cos)
    logs = {"vf_distmat": distmat.detach(), "vf_cos": cos.detach()}
    return config.distmat_weight * distmat + config.cos_weight * cos, logs


def generator_loss(
    config: LossConfig,
    ops: Ops,
    output: AutoencoderOutput,
    perceptual: Callable[..., torch.Tensor] | None,
    discriminator: Callable[..., torch.Tensor] | None,
) -> tuple[torch.Tensor, Logs]:
    """The autoencoder's loss, and its terms to log (detached scalars).

    Args:
        config: weights of the terms.
        ops: of `kernels.select`; `vf_loss` is used where `output` has features.
        output: of the autoencoder; its graph must reach both layers. Where the VF term alone is balanced, the part
            from `z` to the reconstruction is walked in here, and freed.
        perceptual: distances [B, 1, 1, 1] between two batches; None without the term.
        discriminator: logits of images, its parameters frozen; None without the GAN term or before it begins.
    """
    # No leaf: counters of FLOPs hook the inputs of modules, and cannot when a leaf's gradient alone is asked for.
    pixels = upcast(output.reconstruction.detach()).requires_grad_().view_as(output.reconstruction)  # [B, 3, H, W]
    nll, logs = reconstruction_nll(config, output.images, pixels, perceptual)
    nll, kl = nll.mean(), kl_term(config, output.posterior)
    logs |= {"nll": nll.detach(), "kl": kl.detach()}
    logs |= latent_activity(output.posterior.mean)
    (nll_gradient,) = torch.autograd.grad(nll, pixels)  # [B, 3, H, W]
    value, gradient = nll.detach(), nll_gradient
    if discriminator is not None:
        gan = -upcast(discriminator(pixels)).mean()
        (gan_gradient,) = torch.autograd.grad(gan, pixels)  # [B, 3, H, W]
        ours, theirs = (_at_layer(output.reconstruction, g, output.decoder_layer) for g in (nll_gradient, gan_gradient))
        weight = config.disc_weight * adaptive_weight(ours, theirs, MAX_GAN_WEIGHT)
        value = value + config.disc_factor * weight * gan.detach()
        gradient = nll_gradient + config.disc_factor * weight * gan_gradient
        logs |= {"g_loss": gan.detach(), "d_weight": weight}
    ends: Ends = ((output.reconstruction,), (gradient.to(output.reconstruction.dtype),))
    rest = torch.zeros_like(value)
    if output.latents is not None and output.features is not None:
        vf, vf_logs = vf_term(config, ops, output.latents, output.features)
        assert config.vf_weight is not None  # see check_sections
        weight = torch.full_like(vf, config.vf_weight)
        if config.adaptive_vf:
            balanced, reached = _balance_vf(output, vf, nll_gradient, trains=discriminator is None)
            weight = weight * balanced
            if reached is not None:
                ends = reached
        rest = rest + weight * vf
        logs |= vf_logs | {"vf_weight": weight}
    if config.kl_weight > 0:
        rest = rest + config.kl_weight * kl
    total = with_gradients(value, *ends) + rest
    return total, logs | {"loss": total.detach()}


def _balance_vf(
    output: AutoencoderOutput, vf: torch.Tensor, nll_gradient: torch.Tensor, *, trains: bool
) -> tuple[torch.Tensor, Ends | None]:
    """The adaptive weight of the VF term, for which the decoder is walked backwards from the gradient of the NLL.

    With `trains` there is no other gradient at the reconstruction: then this walk is the decoder's only one, and the
    tensors where it ends are returned with their gradients, else None.
    """
    inputs = (output.z, *output.decoder_parameters) if trains else (output.z,)
    gradients = torch.autograd.grad(
        output.reconstruction, inputs, nll_gradient.to(output.reconstruction.dtype), retain_graph=not trains
    )
    (vf_gradient,) = torch.autograd.grad(vf, output.encoder_layer, retain_graph=True)
    weight = adaptive_weight(_at_layer(output.z, gradients[0], output.encoder_layer), vf_gradient, MAX_VF_WEIGHT)
    return weight, (inputs, gradients) if trains else None


def _at_layer(end: torch.Tensor, gradient: torch.Tensor, layer: torch.Tensor) -> torch.Tensor:
    """The gradient at a layer's weights of what has `gradient` at `end`, whose graph stays."""
    return torch.autograd.grad(end, layer, gradient.to(end.dtype), retain_graph=True)[0]


def discriminator_loss(config: LossConfig, real: torch.Tensor, fake: torch.Tensor) -> tuple[torch.Tensor, Logs]:
    """The discriminator's loss, from its logits for images and for reconstructions, and its terms to log."""
    loss = config.disc_factor * DISCRIMINATOR_LOSSES[config.disc_loss](real, fake)
    means = {"logits_real": real.detach().float().mean(), "logits_fake": fake.detach().float().mean()}
    return loss, {"d_loss": loss.detach(), **means}
