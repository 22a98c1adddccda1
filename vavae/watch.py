"""What tells how a tokenizer's training goes: activity of its latents, figures of reconstructions, similarity maps.

Shapes: B images, E latent channels, C channels of any map, h and w positions.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from vavae.images import SSIM_WINDOW, psnr, ssim, to_float_batch

Logs = dict[str, torch.Tensor]
#: A latent unit is active where Cov_x(E[z | x]) is above (Burda, Grosse and Salakhutdinov, arXiv 1509.00519, 5.2).
ACTIVE_VARIANCE = 1e-2


def latent_activity(mean: torch.Tensor) -> Logs:
    """How far the posterior mean [B, E, h, w] of each channel moves, over the images and positions of a micro-batch.

    Returns detached scalars, made without a host read: `latent_std`, mean over the channels of their standard
    deviation, `latent_std_min`, the smallest, and `dead_channels`, the share of channels whose variance is at most
    `ACTIVE_VARIANCE`; all NaN where a mean is not finite.
    """
    variance = mean.detach().var(dim=(0, 2, 3), correction=0)  # [E]
    std = variance.sqrt()
    dead = (variance <= ACTIVE_VARIANCE).to(variance.dtype).masked_fill(~variance.isfinite(), torch.nan)
    return {"latent_std": std.mean(), "latent_std_min": std.amin(), "dead_channels": dead.mean()}


def collapse_warnings(row: Mapping[str, float | None], channels: int) -> dict[str, str]:
    """Cause → warning, where a row of means of `latent_activity` says that channels were dead all the time.

    That is on average at least one of the `channels`: one that dies in some steps alone is none.
    """
    share = row.get("dead_channels")
    if share is None or round(dead := share * channels, 3) < 1:
        return {}
    rule = f"variance of the posterior mean at most {ACTIVE_VARIANCE:g} (arXiv 1509.00519)"
    if round(dead, 3) >= channels:
        return {"collapse": f"all {channels} channels of the latents are dead: the posterior has collapsed ({rule})"}
    return {"dead channels": f"{dead:.3g} of {channels} channels of the latents are dead: {rule}"}


def reconstruction_figures(
    images: torch.Tensor, reconstructions: torch.Tensor, perceptual: Callable[..., torch.Tensor] | None
) -> Logs:
    """Means over two 8-bit batches [B, 3, H, W]: `psnr` (dB), `ssim`, `lpips`.

    Without `lpips` where `perceptual` (distances between float batches) is None, without `ssim` below 11 pixels a side.
    """
    figures = {"psnr": psnr(images, reconstructions).mean()}
    if min(images.shape[2:]) >= SSIM_WINDOW:
        figures["ssim"] = ssim(images, reconstructions).mean()
    if perceptual is not None:
        pair = (to_float_batch(x.permute(0, 2, 3, 1)) for x in (images, reconstructions))
        figures["lpips"] = perceptual(*pair).mean()
    return figures


def similarity_to_centre(x: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of each position of [B, C, h, w] to the one at (h // 2, w // 2), [B, h, w] float32.

    A row of the matrix of similarities that the VF loss aligns (arXiv 2501.01423).
    """
    unit = F.normalize(x.float(), dim=1)
    centre = unit[:, :, x.shape[2] // 2, x.shape[3] // 2]  # [B, C]
    return torch.einsum("bchw,bc->bhw", unit, centre)
