"""Reconstructions of a tokenizer: as a source of images, and their figures against the originals."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.seeds import generator
from common.tensors import is_downloaded
from launch.evaluation.features import Extractor
from launch.evaluation.image_source import ImageSource, image_sides, image_size
from launch.evaluation.notes import check_count
from launch.evaluation.one_pass import measure_together
from launch.evaluation.pixel_figures import psnr, ssim
from launch.evaluation.reference import require_one_size
from launch.evaluation.result import make_result
from launch.evaluation.runner import named_distance
from launch.evaluation.shares import ALONE, Share, rows_on_main
from launch.runtime.processes import Processes
from vavae import seeds
from vavae.images import to_float_batch, to_uint8
from vavae.loss import VGG, Perceptual
from vavae.model import AutoencoderKL


class Reconstructions:
    """Images that a tokenizer encodes and decodes, as an image source in the order of the originals.

    Args:
        originals: images whose sides are multiples of the tokenizer's down-sampling.
        tokenizer: in evaluation mode, on its device.
        posterior: `sample` (as latents are stored; the noise depends on the seed and the image's index only) or `mode`.
    """

    def __init__(self, originals: ImageSource, tokenizer: AutoencoderKL, *, posterior: str = "sample", seed: int = 0):
        if posterior not in ("sample", "mode"):
            raise ValueError(f"posterior {posterior!r} is not known: sample, mode")
        ratio = tokenizer.config.downsample_ratio
        if any(side % ratio for side in image_sides(originals)):
            raise ValueError(
                f"{originals.description} holds images of {image_size(originals)}; the tokenizer takes "
                f"multiples of {ratio} (--image-size crops those of folders)"
            )
        self.originals, self.tokenizer, self.posterior, self.seed = originals, tokenizer, posterior, seed
        self.description = f"{originals.description}, decoded"

    def __len__(self) -> int:
        return len(self.originals)

    @torch.no_grad()
    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """See `ImageSource.batches`."""
        device = next(self.tokenizer.parameters()).device
        for images in self.originals.batches(size, start, stop):
            encoding = self.tokenizer.encode(to_float_batch(images).to(device))
            z = encoding.mode()
            if self.posterior == "sample":
                z = encoding.sample(noise=self._noise(start, z).to(device))
            yield to_uint8(self.tokenizer.decode(z).float()).permute(0, 2, 3, 1).contiguous().cpu()
            start += len(images)

    def _noise(self, start: int, z: Tensor) -> Tensor:
        draws = [
            torch.randn(z.shape[1:], generator=generator(self.seed, seeds.POSTERIOR_NOISE, start + i))
            for i in range(len(z))
        ]
        return torch.stack(draws)


def perceptual_distance(
    weights: str | Path | None, device: torch.device | str = "cpu", download: bool = False
) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS (VGG-16) between two batches of uint8 images, `[B]`.

    weights: of the backbone, in torchvision's layout; None takes those that were downloaded before or, where
    `download` says so, are now. Raises ValueError or DownloadError where they cannot be had.
    """
    if weights is None and not download and not is_downloaded(VGG.url):
        raise ValueError("LPIPS's VGG-16 is not here: name torchvision's file, or have it downloaded with --download")
    net = Perceptual.from_weights(None if weights is None else str(weights)).to(device)

    @torch.no_grad()
    def distance(a: Tensor, b: Tensor) -> Tensor:
        return net(to_float_batch(a).to(device), to_float_batch(b).to(device)).flatten().double().cpu()

    return distance


def evaluate_reconstructions(
    originals: ImageSource,
    reconstructions: ImageSource,
    *,
    extractor: Extractor | None,
    lpips: Callable[[Tensor, Tensor], Tensor] | None,
    metadata: Mapping[str, Any],
    batch_size: int = 64,
    allow_few: bool = False,
    skipped: Mapping[str, str] | None = None,
    processes: Processes = ALONE,
) -> dict:
    """`rfid`, `psnr` (dB), `lpips` and `ssim` of 8-bit reconstructions: means over the images, in the originals' order.

    Args:
        extractor, lpips: None leaves their figures out; `skipped` says why.
        processes: that measure together, each a stretch of the images.

    Returns:
        On every process, a JSON-ready dict.

    Raises:
        ValueError: another number or size of images, or too few of them for `rfid`.
    """
    require_pairs(originals, reconstructions)
    _require_sides(originals, *(("LPIPS", 16) if lpips else ("SSIM", 11)))
    pairs = _PairSource(originals, reconstructions, lpips)
    real = decoded = None
    if extractor is None:
        share = Share.of(len(originals), batch_size, processes)
        for _ in pairs.batches(batch_size, share.start, share.stop):
            pass
    else:
        real = measure_together(originals, extractor, batch_size, processes, keep=())
        decoded = measure_together(pairs, extractor, batch_size, processes, keep=())
    values = {name: rows_on_main(processes, pairs.of(name)) for name in pairs.figures}

    def result() -> dict:
        missing, metrics, notes = dict(skipped or {}), {}, []
        if real is None or decoded is None:
            missing.setdefault("rfid", "no network was given to compare by")
        else:
            notes = check_count(real, allow_few, "images")
            names = reconstructions.description, originals.description
            metrics = {"rfid": named_distance(decoded.features.moments, real.features.moments, names)}
        if lpips is None:
            missing.setdefault("lpips", "no network was given to compare by")
        metrics |= {name: found.mean().item() for name, found in values.items() if found is not None}
        ratios = values["psnr"]
        assert ratios is not None
        if equal := int(ratios.isinf().sum()):
            del metrics["psnr"]
            missing["psnr"] = f"infinite: {equal} of {len(originals)} reconstructions are equal to their originals"
        facts = {
            "images": len(originals),
            "originals": originals.description,
            "reconstructions": reconstructions.description,
        }
        return make_result(metrics, missing, notes, facts, extractor, metadata)

    return processes.on_main(result)


def require_pairs(originals: ImageSource, reconstructions: ImageSource) -> None:
    """Raise ValueError where two sources hold different numbers of images, or images of different sizes."""
    if len(originals) != len(reconstructions):
        raise ValueError(
            f"{originals.description} holds {len(originals)} images, {reconstructions.description} "
            f"{len(reconstructions)}: they do not pair"
        )
    require_one_size(originals, reconstructions)


def _require_sides(images: ImageSource, figure: str, least: int) -> None:
    if min(image_sides(images)) < least:
        raise ValueError(
            f"{images.description} holds images of {image_size(images)}; {figure} needs at least {least} pixels a side"
        )


class _PairSource:
    """The reconstructions; going through them once also takes the figures of each pair."""

    def __init__(self, originals: ImageSource, reconstructions: ImageSource, lpips):
        self.originals, self.reconstructions = originals, reconstructions
        self.description = reconstructions.description
        self.figures = {"psnr": psnr, "ssim": ssim} | ({"lpips": lpips} if lpips else {})
        self.values: dict[str, list[Tensor]] = {}

    def __len__(self) -> int:
        return len(self.originals)

    def of(self, figure: str) -> Tensor:
        """The values of a figure, float64 [n], of the pairs that were gone through."""
        return torch.cat([value.double() for value in self.values.get(figure, [])] or [torch.empty(0).double()])

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """See `ImageSource.batches`."""
        self.values = {name: [] for name in self.figures}
        pairs = zip(
            self.originals.batches(size, start, stop), self.reconstructions.batches(size, start, stop), strict=True
        )
        for original, decoded in pairs:
            for name, figure in self.figures.items():
                self.values[name].append(figure(original, decoded))
            yield decoded
