"""The estimate that --dry-run prints: steps, parameters, memory, FLOPs and disk of a run, without running it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import kernels
import lightningdit.cost as dit_cost
from launch.config import ConfigError, LightningDiTRun, Run, VavaeRun
from launch.training.build import open_dataset
from launch.training.checks import check_run, network_on_meta
from launch.training.loader import BatchSplit
from lightningdit.task import check_classes
from vavae.decoders.choice import choose_decoder, lacking

if TYPE_CHECKING:
    from vavae.data import ImageDataset

GIB = 2**30
FLOAT32, BFLOAT16 = 4, 2
BYTES = {"bfloat16": BFLOAT16, "float32": FLOAT32}
OPTIMIZER_STATES = 3  # exp_avg, exp_avg_sq, ema: float32 each


@dataclass(frozen=True)
class NetworkCost:
    """One trained network: parameters, and what one image costs in it.

    `flops` counts a training step's (forward and backward) per image; `activation_bytes` what is kept for the backward
    pass per image in the run's precision.
    """

    name: str
    parameters: int
    trainable: int
    flops: float
    activation_bytes: float


def state_bytes(trainable: int, stage: int, processes: int, bf16: bool) -> float:
    """Bytes per process of weights, gradients, master weights and optimizer states under a ZeRO stage.

    In bf16 the weights and gradients take 2 bytes and a float32 master copy is kept beside the states; in float32 that
    copy exists only where ZeRO partitions it (stages 1 to 3). Stage 1 shards master and states, 2 also gradients, 3
    also weights (Rajbhandari et al., arXiv 1910.02054).
    """
    weight = BFLOAT16 if bf16 else FLOAT32
    master = FLOAT32 if bf16 or stage > 0 else 0
    shares = [(weight, 3), (weight, 2), (master + OPTIMIZER_STATES * FLOAT32, 1)]  # bytes, sharded from stage
    return trainable * sum(size / processes if stage >= first else size for size, first in shares)


def latents_bytes(num_images: int, channels: int, size: int) -> int:
    """Disk for the latents: an image and its mirror image, float32 `[channels, size, size]`, and an int64 label."""
    return num_images * (2 * channels * size * size * FLOAT32 + 8)


@dataclass(frozen=True)
class RunPlan:
    """The figures of one run."""

    title: str
    networks: tuple[NetworkCost, ...]
    frozen_parameters: int
    num_images: int
    images_assumed: bool
    steps: int
    global_batch_size: int
    micro_batch_size: int
    processes: int
    stage: int
    bf16: bool
    latents: tuple[int, int] | None = None  # channels, size
    reading: tuple[str, ...] = ()  # how images are decoded, and how fast
    absent: tuple[str, ...] = ()  # what the run needs and this machine has not
    downloads: tuple[str, ...] = ()  # what the run would download first

    def lines(self) -> list[str]:
        """The plan, line by line, for a person."""
        epochs = self.steps * self.global_batch_size / self.num_images
        source = "assumed, `data.num_images`" if self.images_assumed else "counted"
        accumulation = self.global_batch_size // (self.micro_batch_size * self.processes)
        per_gpu = self.global_batch_size // self.processes
        flops = sum(n.flops for n in self.networks) * self.global_batch_size
        lines = [
            self.title,
            *(f"  {n.name}: {n.parameters:,} parameters, {n.trainable:,} of them trained" for n in self.networks),
        ]
        if self.frozen_parameters:
            lines.append(f"  frozen helpers: {self.frozen_parameters:,} parameters")
        lines += [
            f"  {self.steps:,} steps = {epochs:.1f} epochs of {self.num_images:,} images ({source})",
            f"  global batch {self.global_batch_size:,} = {self.processes} process{'es' * (self.processes != 1)} × "
            f"micro-batch {self.micro_batch_size} × {accumulation} accumulated; {per_gpu} images per GPU and step",
            f"  {flops / 1e12:,.2f} TFLOP per step (training), {flops * self.steps / 1e18:,.3f} EFLOP in all",
            *self._memory_lines(),
        ]
        if self.latents is not None:
            channels, size = self.latents
            disk = latents_bytes(self.num_images, channels, size)
            lines.append(f"  latents on disk: {disk / 1e9:,.1f} GB (float32 {channels}×{size}×{size}, two per image)")
        lines += [f"  {line}" for line in self.reading]
        lines += [f"  not on this machine, so no run yet: {what}" for what in self.absent]
        lines += [f"  to be downloaded by the run: {what}" for what in self.downloads]
        return lines

    def _memory_lines(self) -> list[str]:
        activations = sum(n.activation_bytes for n in self.networks) * self.micro_batch_size
        dtype = "bfloat16" if self.bf16 else "float32"
        lines = [f"  memory per GPU in {dtype} (estimated; activations {activations / GIB:,.1f} GiB of it):"]
        for stage in range(4):
            state = sum(state_bytes(n.trainable, stage, self.processes, self.bf16) for n in self.networks)
            total = (state + activations + self.frozen_parameters * BYTES[dtype]) / GIB
            mark = "   ← this run" if stage == self.stage else ""
            lines.append(f"    ZeRO {stage}: {total:7,.1f} GiB{mark}")
        return lines


def plan_run(run: Run, kind: str, processes: int) -> RunPlan:
    """The figures of a run on so many processes, without making any of it.

    Raises ValueError for what the run itself would refuse, but that its data or a backend is missing: the plan may be
    for another machine, and says so.
    """
    check_run(run)
    train, absent = run.train, _backends_missing(run)
    num_images, assumed = run.data.num_images, True
    opened: list = []
    if isinstance(run, VavaeRun) and (why := lacking(run.data.decoder, _device())):
        absent.append(f"data.decoder {run.data.decoder} ({why})")
    for key in ("data_path", "valid_path"):
        folder = getattr(run.data, key)
        if folder is None:
            continue
        if not _is_here(run, folder):
            absent.append(f"data.{key} {folder}")
            continue
        opened.append(open_dataset(_to_look_at(run), key, _device()))
        if key == "data_path":
            num_images, assumed = len(opened[0]), False
    if kind == "lightningdit" and len(opened) == 2:
        check_classes(*opened)
    networks, frozen, latents = _vavae_costs(run) if isinstance(run, VavaeRun) else _lightningdit_costs(run)
    if train.global_batch_size % processes:
        raise ConfigError(f"train.global_batch_size {train.global_batch_size} is no multiple of {processes} processes")
    reading: tuple[str, ...] = ()
    if isinstance(run, VavaeRun):
        flops = sum(network.flops for network in networks)
        gpus = min(processes, max(torch.cuda.device_count(), 1))
        reading = _reading(run, None if assumed else opened[0], gpus, flops)
    steps = train.steps(num_images)
    micro_batch_size = train.micro_batch_size or train.global_batch_size // processes
    BatchSplit(train.global_batch_size, processes, micro_batch_size)
    return RunPlan(
        title=f"plan for {kind} ({getattr(run.model, 'model_type', None) or 'sizes of its own'}), "
        f"preset {run.preset}, {train.precision}",
        networks=networks,
        frozen_parameters=frozen,
        num_images=num_images,
        images_assumed=assumed,
        steps=steps,
        global_batch_size=train.global_batch_size,
        micro_batch_size=micro_batch_size,
        processes=processes,
        stage=run.deepspeed.zero_stage,
        bf16=train.precision == "bfloat16",
        latents=latents,
        reading=reading,
        absent=tuple(absent),
        downloads=_downloads(run),
    )


def _is_here(run: Run, path: str) -> bool:
    if isinstance(run, LightningDiTRun):
        return Path(path).exists()
    from vavae.sources import source_exists  # imports Pillow: seconds of its own

    return source_exists(path)


def _reading(run: VavaeRun, images: "ImageDataset | None", gpus: int, flops_per_image: float) -> tuple[str, ...]:
    """What decodes a run's images, and how fast; without images here only the first. gpus: that share this machine."""
    from launch.training.image_rate import describe_rate, measure_images  # imports torchvision: seconds of its own

    if lacking(run.data.decoder, _device()):  # on this machine
        return ()
    data, device = run.images(), _device()
    name, reason = choose_decoder(data.decoder, device, crop=data.crop, cached=data.cache)
    decoder = f"images decoded by {name} on {device} ({reason}), {run.data.num_workers} workers"
    if images is None:
        return (decoder,)
    if run.data.cache:
        return (decoder, "images/s: not measured, they are kept in memory")
    try:
        measured = measure_images(images, run.data.num_workers)
    except ValueError as e:  # such as an unreadable file, which a run may never come to
        return (decoder, f"images/s: not measured, and a run stops there: {e}")
    return (decoder, describe_rate(measured, flops_per_image, run.train.precision, gpus))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _to_look_at(run: Run) -> Run:
    """The run with its images left on the disk, by a decoder that is here."""
    if isinstance(run, LightningDiTRun):
        return run
    here = {"decoder": "auto"} if lacking(run.data.decoder, _device()) else {}
    return run.model_copy(update={"data": run.data.model_copy(update={"cache": False, **here})})


def _backends_missing(run: Run) -> list[str]:
    """Backends that the run names for single ops and that cannot serve on this machine, with the reasons."""
    named = {} if isinstance(run.kernels, str) else run.kernels
    rows = [(op, backend) for op, backend in named.items() if op != "default" and backend != "auto"]
    reasons = {f"kernels.{op} {backend}": kernels.OPS[op].reasons(backend) for op, backend in rows}
    return [f"{choice} ({'; '.join(why)})" for choice, why in reasons.items() if why]


def _downloads(run: Run) -> tuple[str, ...]:
    """Weights that the run would download."""
    if isinstance(run, LightningDiTRun):
        return ()
    from vavae import foundation, loss  # import timm and lpips: seconds of their own

    features = foundation.to_download(run.features()) if run.loss.use_vf else None
    return tuple(what for what in (features, loss.to_download(run.loss)) if what is not None)


def _lightningdit_costs(run: LightningDiTRun):
    network, parameters = run.network(), list(network_on_meta(run).parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    residual_bytes = BYTES[run.train.residual_dtype]
    activations = dit_cost.activation_bytes_per_image(
        network, weight_bytes=BYTES[run.train.precision], residual_bytes=residual_bytes
    )
    _, flops = dit_cost.flops_per_image(network)
    model = NetworkCost("model", sum(p.numel() for p in parameters), trainable, flops, activations)
    return (model,), 0, (network.in_channels, network.input_size)


def _vavae_costs(run: VavaeRun):
    import vavae.cost as vae_cost  # imports timm and lpips: seconds of their own

    costs = vae_cost.training_cost(run.model, run.features(), run.loss, run.data.image_size, run.train.use_checkpoint)
    width = BYTES[run.train.precision]
    frozen = costs.pop("frozen", None)
    networks = tuple(
        NetworkCost(
            name,
            c.parameters,
            c.trainable,
            c.flops + (frozen.flops if frozen and name == "autoencoder" else 0),
            c.saved_elements * width,
        )
        for name, c in costs.items()
    )
    return (
        networks,
        frozen.parameters if frozen else 0,
        (run.model.embed_dim, run.data.image_size // run.model.downsample_ratio),
    )
