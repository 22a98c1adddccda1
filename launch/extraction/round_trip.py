"""The round trip of some images: through the tokenizer before an extraction, and from what was stored after it."""

from dataclasses import dataclass

import torch

from common.text import printable
from launch.config import ConfigError
from launch.extraction.encoding import ImagesWithNoise, encode
from lightningdit.data import LatentDataset, draw_noise
from lightningdit.latents import LatentsError, Store
from lightningdit.latents_statistics import check_statistics
from vavae.images import psnr, to_uint8
from vavae.model import AutoencoderKL

IMAGES = 16
_CHUNK = 8  # images encoded or decoded at once

#: What stored latents may lose against the start, in dB: at 3 the error added is as large as the tokenizer's own. The
#: start took the same noise, so that only rounding is left: a bfloat16 encoder and 16-bit storage cost less than 0.3 in
#: the tests. Latents of another image, or of the mirror image, are as far from an image as those images are.
MARGIN = 3.0
#: Of images that come back better than this (flat ones) no more is asked, as rounding alone would show in them.
ENOUGH = 30.0


@dataclass(frozen=True)
class RoundTrip:
    """Some images, spread over all: uint8 [K, 2, 3, S, S], plain and mirrored, and the PSNR [K, 2] of both (dB)."""

    indices: torch.Tensor
    names: list[str]
    images: torch.Tensor
    psnr: torch.Tensor

    @property
    def least(self) -> torch.Tensor:
        """The PSNR [K, 2] that is asked of latents of these images."""
        return self.psnr.clamp_max(ENOUGH) - MARGIN


def try_tokenizer(
    tokenizer: AutoencoderKL, images: ImagesWithNoise, store: Store, least: float, source: str, count: int = IMAGES
) -> RoundTrip:
    """Encode `count` images as the extraction does, in the tokenizer's own precision, and decode them.

    Of moments the sample that training would draw in its first epoch is decoded. Raises ConfigError where the mean PSNR
    is below `least`.
    """
    count = min(count, len(images.images))
    indices = (torch.arange(count) * (len(images.images) - 1)) // max(count - 1, 1)
    seen, found = [], []
    for chunk in indices.split(_CHUNK):
        batch = images.of(chunk)
        stored = torch.stack(encode(tokenizer, batch["image"], batch["noise"], store), 1)  # [b, 2, C or 2·C, h, w]
        latents = _drawn(stored, images.seed, chunk) if store == "moments" else stored
        x = torch.stack([batch["image"], batch["image"].flip(-1)], 1).cpu()  # [b, 2, 3, S, S]
        seen.append(to_uint8(x))
        found.append(psnr(seen[-1].flatten(0, 1), _decode(tokenizer, latents.flatten(0, 1))).view(-1, 2))
    names = [printable(images.images.source.relative_name(index)) for index in indices.tolist()]
    trip = RoundTrip(indices, names, torch.cat(seen), torch.cat(found))
    if not (mean := trip.psnr.mean().item()) >= least:
        raise ConfigError(
            f"{source} reconstructs these images at {mean:.1f} dB, below {least:g} (--least-psnr): "
            "it is untrained, or not the tokenizer for such images"
        )
    return trip


def try_stored(tokenizer: AutoencoderKL, latents: LatentDataset, trip: RoundTrip, least: float) -> torch.Tensor:
    """Decode the latents that were stored of the images of `trip` → PSNR [K, 2] (dB), plain and mirrored.

    They are read as training reads them, normalised, and decoded as sampling decodes, with the statistics of the set.
    Raises LatentsError where those do not fit the latents (`check_statistics`), where the mean PSNR is below `least`,
    or where that of one image is more than 3 dB below what the tokenizer made of it at the start.
    """
    check_statistics(latents)
    decoded = torch.stack([_decode_stored(tokenizer, latents, trip.indices, flip) for flip in (False, True)], 1)
    found = psnr(trip.images.flatten(0, 1), decoded.flatten(0, 1)).view(-1, 2)  # [K, 2]
    wrong = ~(found >= trip.least)
    if wrong.any():
        place = int((trip.least - found).masked_fill(~wrong, -torch.inf).nan_to_num(torch.inf).argmax())
        raise LatentsError(f"{latents.path} is not what was extracted: {_describe(trip, decoded, found, place)}")
    if not (mean := found.mean().item()) >= least:
        raise LatentsError(f"{latents.path} decodes to these images at {mean:.1f} dB, below {least:g} (--least-psnr)")
    return found


def _drawn(moments: torch.Tensor, seed: int, indices: torch.Tensor) -> torch.Tensor:
    """Samples [b, 2, C, h, w] of moments [b, 2, 2·C, h, w] as `LatentDataset` draws them in epoch 0."""
    mean, std = moments.chunk(2, 2)
    noise = torch.empty_like(mean[:, 0], memory_format=torch.contiguous_format)
    for row, index in zip(noise, indices.tolist(), strict=True):
        draw_noise(row, seed, 0, index)
    return mean + std * noise[:, None]


def _decode_stored(
    tokenizer: AutoencoderKL, latents: LatentDataset, indices: torch.Tensor, mirrored: bool
) -> torch.Tensor:
    """uint8 [K, 3, S, S]."""
    batch = latents.batch(torch.zeros_like(indices), indices, [mirrored] * len(indices))
    return _decode(tokenizer, latents.statistics.denormalise(batch["x"]))


@torch.no_grad()
def _decode(tokenizer: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Latents [n, C, h, w] as uint8 images [n, 3, S, S] on the CPU."""
    weight = tokenizer.quant_conv.weight
    chunks = latents.split(_CHUNK)
    return torch.cat([to_uint8(tokenizer.decode(chunk.to(weight)).float()).cpu() for chunk in chunks])


def _describe(trip: RoundTrip, decoded: torch.Tensor, found: torch.Tensor, place: int) -> str:
    """What is wrong at `place` of K · 2, by comparison with all images of the trip and their mirror images."""
    row, side = divmod(place, 2)
    sides = ("plain", "mirrored")
    candidates = trip.images.flatten(0, 1)
    scores = psnr(candidates, decoded[row, side].expand_as(candidates))
    best = int((scores - trip.least.flatten()).argmax())
    other, other_side = divmod(best, 2)
    if not scores[best] >= trip.least.flatten()[best]:
        why = f"It fits none of the {len(trip.names)} images looked at: it is another tokenizer's, or was changed since"
    elif other == row:
        why = f"It fits the {sides[other_side]} image: plain and mirrored latents are exchanged"
    else:
        what = f"the {sides[other_side]} image {int(trip.indices[other])} ({trip.names[other]})"
        why = f"It fits {what}: latents and images are in different orders"
    return (
        f"the {sides[side]} latent of image {int(trip.indices[row])} ({trip.names[row]}) decodes at "
        f"{found[row, side]:.1f} dB, where the tokenizer had {trip.psnr[row, side]:.1f} dB at the start. {why}. Delete "
        "the directory and extract again"
    )
