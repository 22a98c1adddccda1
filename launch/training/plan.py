"""The figures of a run that is not made, and how they are said."""

from dataclasses import dataclass, field

from launch.training.memory import (
    CONTEXT,
    FLOAT32,
    FRAGMENTATION,
    GIB,
    OPTIMIZER_STATES,
    STAGES,
    Memory,
    NetworkCost,
    Setup,
    latents_bytes,
    memory_of,
    save_bytes,
    usable,
)
from launch.training.micro_batches import Fit

GPUS_PER_MACHINE = 8
#: Columns of the table of memory, in the order of `Memory.backward`.
PARTS = ("weights", "gradients", "states", "buckets", "activations", "frozen", "latents")


@dataclass(frozen=True)
class RunPlan:
    """The figures of one run.

    Fields:
        networks: those that are trained, as the run's own `use_checkpoint` has them.
        setup: what else decides about memory.
        stages_allowed: the ZeRO stages that the run could have.
        processes_note: why so many processes, where nothing says how many.
        fit: what fits a card of the memory that was asked for.
        background_save: whether a checkpoint is written while training goes on, from a copy in the host's memory.
        pinned: whether that memory is page-locked, as it is for GPUs.
        latents: channels and size of the latents. stored: what the disk has of each number, and in how many bytes.
        latent_store: sentences on latents kept on the device.
        keep_checkpoints, checkpoints: how many of the newest are kept (None: all), and how many are written, every
            `ckpt_every` steps and at the end. keep_every: those of every so many steps are kept beside them.
        reading: how images are decoded, and how fast.
        absent: what the run needs and this machine has not. downloads: what it would download first.
        losses: the stages of the loss. remarks: what has no effect, or contradicts the run's length.
    """

    title: str
    networks: tuple[NetworkCost, ...]
    num_images: int
    images_assumed: bool
    steps: int
    global_batch_size: int
    micro_batch_size: int
    setup: Setup
    stage: int
    stages_allowed: tuple[int, ...] = STAGES
    processes_note: str | None = None
    fit: Fit | None = None
    background_save: bool = True
    pinned: bool = True
    latents: tuple[int, int] | None = None
    stored: tuple[str, int] = ("float32", FLOAT32)
    latent_store: tuple[str, ...] = ()
    keep_checkpoints: int | None = None
    checkpoints: int = 1
    ckpt_every: int = 1
    keep_every: int | None = None
    reading: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    downloads: tuple[str, ...] = ()
    losses: tuple[str, ...] = field(default=())
    remarks: tuple[str, ...] = ()

    @property
    def processes(self) -> int:
        return self.setup.processes

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step on each process."""
        return self.global_batch_size // (self.micro_batch_size * self.processes)

    @property
    def most_checkpoints(self) -> int:
        """How many lie on the disk at once; one is removed when the next is whole."""
        if self.keep_checkpoints is None:
            return self.checkpoints
        newest = min(self.keep_checkpoints + 1, self.checkpoints)
        older = (self.checkpoints - newest) * self.ckpt_every
        return newest + (older // self.keep_every if self.keep_every is not None else 0)

    def memory(self, stage: int) -> Memory:
        """Memory of one process under a ZeRO stage, else as the run is."""
        return memory_of(self.networks, self.setup, stage, self.micro_batch_size, self.accumulation)

    def lines(self) -> list[str]:
        """The plan, line by line, for a person."""
        return [
            self.title,
            *([f"  {self.processes_note}"] if self.processes_note else []),
            *self._work_lines(),
            *(f"  {line}" for line in self.losses),
            *self._memory_lines(),
            *(self._fit_lines(self.fit) if self.fit is not None else []),
            *self._storage_lines(),
            *(f"  {line}" for line in self.reading),
            *(f"  not on this machine, so no run yet: {what}" for what in self.absent),
            *(f"  to be downloaded by the run: {what}" for what in self.downloads),
            *(f"  note: {remark}" for remark in self.remarks),
        ]

    def _work_lines(self) -> list[str]:
        epochs = self.steps * self.global_batch_size / self.num_images
        source = "assumed, `data.num_images`" if self.images_assumed else "counted"
        per_gpu = self.global_batch_size // self.processes
        images = f"{per_gpu:,} image{'s' * (per_gpu != 1)}"
        flops = sum(n.flops for n in self.networks) * self.global_batch_size
        lines = [f"  {n.name}: {n.parameters:,} parameters, {n.trainable:,} of them trained" for n in self.networks]
        if self.setup.frozen:
            lines.append(f"  frozen helpers: {self.setup.frozen:,} parameters")
        return [
            *lines,
            f"  {self.steps:,} steps = {epochs:.1f} epochs of {self.num_images:,} images ({source})",
            f"  global batch {self.global_batch_size:,} = {self.processes} process{'es' * (self.processes != 1)} × "
            f"micro-batch {self.micro_batch_size} × {self.accumulation} accumulated; {images} per GPU and step",
            f"  {flops / 1e12:,.2f} TFLOP per step (training), {flops * self.steps / 1e18:,.3f} EFLOP in all",
        ]

    def _memory_lines(self) -> list[str]:
        rows = {stage: self.memory(stage) for stage in self.stages_allowed}
        names = [name for name in PARTS if any(getattr(row, name) for row in rows.values())]
        precision = "bfloat16" if self.setup.bf16 else "float32"
        head = "".join(f"{name:>12}" for name in names)
        lines = [f"  memory per GPU in {precision}, GiB (estimated):", f"           {head}        peak"]
        for stage, row in rows.items():
            cells = "".join(f"{getattr(row, name) / GIB:>12,.1f}" for name in names)
            where = "" if row.peak_moment == "backward pass" else f" ({row.peak_moment})"
            mark = "   ← this run" if stage == self.stage else ""
            lines.append(f"    ZeRO {stage}:{cells}{row.peak / GIB:>12,.1f}{where}{mark}")
        offloaded = rows[self.stage].host
        if offloaded:
            lines.append(f"    in the host's memory, for what is offloaded: {offloaded / GIB:,.1f} GiB per process")
        return lines

    def _fit_lines(self, fit: Fit) -> list[str]:
        peak, room = self.memory(self.stage).peak / GIB, usable(fit.card) / GIB
        verdict = "fits" if peak <= room else "does not fit"
        hint = "" if peak <= room else "; nothing makes it fit but more or larger GPUs, or a smaller model"
        if (suggestion := fit.suggestion(self.micro_batch_size)) is not None:
            hint = f"; {'more images at once' if peak <= room else 'it fits'} with: {suggestion}"
        return [
            f"  on GPUs of {fit.card / GIB:g} GiB it {verdict}: {peak:,.1f} GiB of the {room:,.1f} that are counted on "
            f"(less {CONTEXT / GIB:g} GiB for CUDA, cuBLAS and NCCL and {FRAGMENTATION:.0%} for fragmentation){hint}",
            f"  largest micro-batch that fits and divides the {fit.per_process:,} images of a process:",
            *fit.table(),
        ]

    def _storage_lines(self) -> list[str]:
        lines = []
        if self.background_save:
            held = save_bytes(self.networks, self.processes, self.stage, pinned=self.pinned) / GIB
            here = min(self.processes, GPUS_PER_MACHINE) if self.stage > 0 else 1
            machine = f", {held * here:,.1f} GiB on a machine of {here}" if here > 1 else ""
            who = "per process" if self.stage > 0 else "on the main process"
            rounded = " (pinned, in blocks of powers of two)" if self.pinned else ""
            lines.append(f"  host memory for a save in the background: {held:,.1f} GiB {who}{machine}{rounded}")
        size = (OPTIMIZER_STATES + 1) * FLOAT32 * sum(n.parameters for n in self.networks)
        kept = self.most_checkpoints
        lines.append(
            f"  checkpoints on disk: {size / 1e9:,.1f} GB each, at most {kept} at once: {kept * size / 1e9:,.1f} GB"
        )
        if self.latents is not None:
            (channels, side), (what, width) = self.latents, self.stored
            disk = latents_bytes(self.num_images, channels, side, width)
            lines.append(f"  latents on disk: {disk / 1e9:,.1f} GB ({what} {channels}×{side}×{side}, two per image)")
        return lines + [f"  {line}" for line in self.latent_store]
