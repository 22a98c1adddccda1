"""From labels and indices to images: network, sampler settings, statistics, tokenizer."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from launch.sampling.pipeline import Arrays
from launch.sampling.units import decoded_at_once
from lightningdit.config import SampleConfig
from lightningdit.flow import Transport
from lightningdit.latents import LatentStatistics
from lightningdit.model import LightningDiT
from lightningdit.sampler import BatchSampler, Samples
from lightningdit.solvers import SolverError
from vavae.images import to_uint8
from vavae.model import AutoencoderKL


@dataclass
class ImageDecoder:
    """Latents as the tokenizer takes them → images. `source`: where its weights are from, for messages."""

    tokenizer: AutoencoderKL
    source: str = "the tokenizer"

    def __call__(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """z [b, C, h, w] → uint8 [b, H, W, 3], and bool [b]: whether an image is finite, which 8 bits do not show.

        The tokenizer is called with so many at once as the size of the images says; see `decoded_at_once`.
        """
        size = z.shape[-1] * self.tokenizer.config.downsample_ratio
        parts = []
        for chunk in z.split(decoded_at_once(z.device, size)):
            decoded = self.tokenizer.decode(chunk)
            pixels = to_uint8(decoded).permute(0, 2, 3, 1).contiguous()
            parts.append((pixels, decoded.isfinite().flatten(1).all(1)))
        images, finite = zip(*parts, strict=True)
        return torch.cat(images), torch.cat(finite)

    def decode(self, made: Arrays) -> Arrays:
        """What was made, with `images` and `finite_images` in the place of `z`; the second stage of a `Pipeline`."""
        images, finite = self(made["z"])
        return {name: v for name, v in made.items() if name != "z"} | {"images": images, "finite_images": finite}

    def checked(self, start: int, made: Arrays) -> Arrays:
        """What was decoded of the samples from `start` on; raises ValueError where an image is not finite."""
        require_finite("decoded images", made["finite_images"], start, self.source)
        return {name: values for name, values in made.items() if name != "finite_images"}


@dataclass
class SampleGenerator:
    """From labels and indices to images, in the two stages of a `Pipeline`.

    tokenizer: None where latents are all that is wanted. model_from, tokenizer_from: where their weights are from, for
    messages. guide: the network of autoguidance.
    """

    model: LightningDiT
    tokenizer: AutoencoderKL | None
    statistics: LatentStatistics
    transport: Transport
    settings: SampleConfig
    model_from: str = "the network"
    tokenizer_from: str = "the tokenizer"
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    guide: LightningDiT | None = None
    _of_thread: threading.local = field(default_factory=threading.local, init=False, repr=False)

    def to(self, device: torch.device) -> None:
        """Move the networks, all but the tokenizer in the precision asked for."""
        self.model.to(device, getattr(torch, self.settings.precision))
        if self.guide is not None:
            self.guide.to(device, getattr(torch, self.settings.precision))
        if self.tokenizer is not None:
            self.tokenizer.to(device)

    def solve(self, indices: Sequence[int]) -> Arrays:
        """Samples with these indices, of their labels: `z` [b, C, h, w] as the tokenizer takes them, and facts [b].

        Indices past the last sample fill up a unit: their noise is their own, their label the index modulo the number
        of classes. Raises ValueError, naming samples and weights, where the solver finds no step.
        """
        try:
            made = self._sampler(self._labels_of(indices), indices)
        except SolverError as error:
            wanted = [index for index in indices if index < len(self.labels)]
            raise ValueError(f"samples {some(wanted)} of {self.model_from}: {error}") from None
        found: Arrays = {
            "z": self.statistics.denormalise(made.latents),
            "finite_latents": made.latents.isfinite().flatten(1).all(1),
            "nfe": np.full(len(indices), made.nfe),
            "guided_nfe": np.full(len(indices), made.guided_nfe),
        }
        if made.log_likelihood is not None:
            found["log_likelihood"] = made.log_likelihood
        return found

    def decode(self, made: Arrays) -> Arrays:
        """What `solve` found with `images` uint8 [b, H, W, 3], where there is a tokenizer, in the place of `z`."""
        if self.tokenizer is None:
            return {"latents" if name == "z" else name: value for name, value in made.items()}
        return ImageDecoder(self.tokenizer, self.tokenizer_from).decode(made)

    def checked(self, start: int, made: Arrays) -> Arrays:
        """What was made of the samples from `start` on, without what says whether it is finite.

        Raises ValueError, naming samples and weights, where something is not.
        """
        model = f"{self.model_from} in {self.settings.precision}"
        require_finite("latents", made["finite_latents"], start, model)
        if self.tokenizer is not None:
            made = ImageDecoder(self.tokenizer, self.tokenizer_from).checked(start, made)
        if "log_likelihood" in made:
            require_finite("log-likelihoods", np.isfinite(made["log_likelihood"]), start, model)
        return {name: values for name, values in made.items() if not name.startswith("finite_")}

    @torch.no_grad()
    def pixels(self, latents: torch.Tensor) -> np.ndarray:
        """uint8 [b, H, W, 3] of normalised latents [b, C, h, w]."""
        assert self.tokenizer is not None, "a generator of images"
        return ImageDecoder(self.tokenizer)(self.statistics.denormalise(latents))[0].cpu().numpy()

    def _labels_of(self, indices: Sequence[int]) -> torch.Tensor:
        config, i = self.model.config, np.asarray(indices)
        within = np.minimum(i, len(self.labels) - 1)
        y = torch.from_numpy(np.where(i < len(self.labels), self.labels[within], i % config.num_classes))
        device = self.model.pos_embed.device
        return y.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else y

    @property
    def _sampler(self) -> Callable[[torch.Tensor, Sequence[int]], Samples]:
        """Labels y [b] on the device and indices → samples; the same for all batches, one for each thread."""
        if not hasattr(self._of_thread, "sampler"):
            self._of_thread.sampler = self._make_sampler()
        return self._of_thread.sampler

    def _make_sampler(self) -> Callable[[torch.Tensor, Sequence[int]], Samples]:
        config = self.model.config
        shape = (config.in_channels, config.input_size, config.input_size)
        return BatchSampler(
            self.model,
            self.transport,
            self.settings,
            shape=shape,
            null_label=config.null_label,
            guide=self.guide,
            compile=self.settings.compile,
        )


def require_finite(what: str, finite: np.ndarray, start: int, source: str) -> None:
    """Raise ValueError for NaN and infinity: `finite` [b] says of which samples from `start` on there are none."""
    if not finite.all():
        wrong = (np.flatnonzero(~finite) + start).tolist()
        raise ValueError(f"the {what} of samples {some(wrong)} are not finite; they come from {source}")


def some(indices: Sequence[int]) -> str:
    """The first of these indices, for a message."""
    return ", ".join(map(str, indices[:8])) + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")
