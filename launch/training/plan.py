"""What a run will take, worked out without running it: steps, parameters, memory, FLOPs, disk. Printed by --dry-run."""

from dataclasses import dataclass

GIB = 2**30
FLOAT32, BFLOAT16 = 4, 2
OPTIMIZER_STATES = 3  # exp_avg, exp_avg_sq, ema: float32 each


@dataclass(frozen=True)
class Network:
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
    networks: tuple[Network, ...]
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
            f"  global batch {self.global_batch_size:,} = {self.processes} processes × micro-batch "
            f"{self.micro_batch_size} × {accumulation} accumulated; {per_gpu} images per GPU and step",
            f"  {flops / 1e12:,.2f} TFLOP per step (training), {flops * self.steps / 1e18:,.3f} EFLOP in all",
            *self._memory_lines(),
        ]
        if self.latents is not None:
            channels, size = self.latents
            disk = latents_bytes(self.num_images, channels, size)
            lines.append(f"  latents on disk: {disk / 1e9:,.1f} GB (float32 {channels}×{size}×{size}, two per image)")
        lines += [f"  not on this machine, so no run yet: {what}" for what in self.absent]
        lines += [f"  to be downloaded by the run: {what}" for what in self.downloads]
        return lines

    def _memory_lines(self) -> list[str]:
        activations = sum(n.activation_bytes for n in self.networks) * self.micro_batch_size
        dtype = "bfloat16" if self.bf16 else "float32"
        lines = [f"  memory per GPU in {dtype} (estimated; activations {activations / GIB:,.1f} GiB of it):"]
        for stage in range(4):
            state = sum(state_bytes(n.trainable, stage, self.processes, self.bf16) for n in self.networks)
            total = (state + activations + self.frozen_parameters * FLOAT32) / GIB
            mark = "   ← this run" if stage == self.stage else ""
            lines.append(f"    ZeRO {stage}: {total:7,.1f} GiB{mark}")
        return lines
