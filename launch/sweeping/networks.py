"""The networks that all settings of a sweep share, loaded once by each process, and the samples of a setting."""

import copy
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launch.config import LightningDiTRun, select_ops
from launch.guides import guide_network
from launch.sampling.generator import SampleGenerator
from launch.sampling.labels import protocol_labels
from launch.sampling.pipeline import Pipeline
from launch.sampling.units import batch_size
from launch.trained import (
    build_diffusion,
    build_tokenizer,
    diffusion_weights,
    require_average_velocities,
    require_transport,
    sampling_settings,
)
from lightningdit.config import SampleConfig
from lightningdit.flow import Transport
from lightningdit.model import LightningDiT
from vavae.weights import fingerprint


@dataclass(frozen=True)
class Samples:
    """images: uint8 `[N, H, W, 3]`. nfe, guided_nfe: calls of the network, means over the batches."""

    images: Tensor
    nfe: float
    guided_nfe: float


class SharedNetworks:
    """Network, tokenizer and statistics of a run on a device, and the networks that guide in `settings`.

    Attributes:
        versions: of what computes, and the device.
        facts: what samples depend on beside labels and settings, as JSON has it: hashes of the weights among it.

    Raises ValueError where weights are missing or do not fit.
    """

    def __init__(self, run: LightningDiTRun, device: torch.device, settings: Iterable[SampleConfig] = ()):
        ops, found = select_ops(run.kernels), diffusion_weights(run)
        source = str(run.ckpt_path or run.train.directory)
        settings = list(settings)
        require_transport(found, run.transport, source)
        require_average_velocities(found, settings, source)
        tokenizer = build_tokenizer(run, ops, found.config.in_channels)
        model = build_diffusion(found, ops, source)
        self.facts: dict[str, Any] = {
            "hashes": {"model": fingerprint(model), "tokenizer": fingerprint(tokenizer)},
            "step": found.step,
            "weights": found.weights,
            "latents": found.latents.to_json(),
            "transport": run.transport.model_dump(mode="json"),
            "kernels": run.kernels,
        }
        self._float32: dict[_Guide | None, LightningDiT] = {None: model.to(device)}
        guides: list[dict[str, Any]] = []
        for each in {_guide_of(setting): setting for setting in settings if setting.guided_by_network}.values():
            guide = guide_network(run, each, ops, found)
            assert guide is not None
            self._float32[_guide_of(each)] = guide.network.to(device)
            guides.append(guide.facts)
        if guides:
            self.facts["guides"] = guides
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.versions = {"python": platform.python_version(), "torch": torch.__version__, "device": name}
        transport = Transport.from_config(run.transport)
        self._device, self._image_size = device, run.data.image_size
        self._rounded: dict[tuple[_Guide | None, str], LightningDiT] = {}
        self._generator = SampleGenerator(
            model,
            tokenizer.to(device),
            found.latents,
            transport,
            sampling_settings(run),
            source,
            str(run.vae.ckpt_path),
        )

    def sample(self, settings: SampleConfig, labels: Sequence[int]) -> Samples:
        """The images of a `sample` section, of indices 0 to len(labels) − 1; raises ValueError for one not finite."""
        model = self._in(None, settings.precision)
        guide = self._in(_guide_of(settings), settings.precision) if settings.guided_by_network else None
        generator = replace(self._generator, settings=settings, labels=np.asarray(labels), model=model, guide=guide)
        size = batch_size(
            settings.per_proc_batch_size,
            self._device,
            model.config,
            self._image_size,
            weight_bytes=next(model.parameters()).element_size(),
            workers=1,
        )
        parts = []
        with Pipeline(generator.solve, generator.decode, self._device, workers=1) as pipeline:
            for start in range(0, len(labels), size):
                made = pipeline.start(start, min(start + size, len(labels)))
                parts.append(generator.checked(start, made()))
        images = torch.cat([torch.from_numpy(part["images"]) for part in parts])
        nfe, guided = (sum(part[name].sum() for part in parts) / len(labels) for name in ("nfe", "guided_nfe"))
        return Samples(images, float(nfe), float(guided))

    def _in(self, which: "_Guide | None", precision: str) -> LightningDiT:
        """The sampled network (None) or one that guides in a precision, each rounded from float32."""
        if precision == "float32":
            return self._float32[which]
        if (which, precision) not in self._rounded:
            made = copy.deepcopy(self._float32[which]).to(dtype=getattr(torch, precision))
            self._rounded[which, precision] = made
        return self._rounded[which, precision]


_Guide = tuple[str | None, int | None, str]


def _guide_of(settings: SampleConfig) -> _Guide:
    return settings.guide_ckpt_path, settings.guide_step, settings.guide_weights


def labels_of(settings: SampleConfig, num_classes: int) -> list[int]:
    """The labels of a setting's samples, by the section's protocol, as `sample` gives them."""
    return protocol_labels(settings.labels, settings.fid_num, num_classes, settings.seed).tolist()
