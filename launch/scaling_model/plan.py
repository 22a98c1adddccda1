"""A run on some number of GPUs: the parts of its step, its hours, and what it sends, saves and loses."""

from dataclasses import dataclass, replace

from launch.config_files import ConfigError
from launch.scaling_model.failures import Failures
from launch.scaling_model.gpu import FORWARD, Gpu
from launch.scaling_model.network import Network, collective, nodes_of
from launch.scaling_model.zero import bucket_sizes, exchanges, exposed_seconds, step_traffic

#: Bytes of a checkpoint for each trained parameter: weights, average and both moments in float32.
CHECKPOINT_BYTES = 16
MTBF_SOURCE = "arXiv 2407.21783, section 3.3.4: 419 unexpected interruptions of 16,384 H100 in 54 days"
MTBF_HOURS = 16_384 * 54 * 24 / 419


@dataclass(frozen=True)
class Workload:
    """The run, whatever it runs on.

    Fields:
        parameters: trained ones. images: that training goes through in all, with the file's own batch.
        weight_bytes, gradient_bytes: of one parameter, as they travel.
        overlapped: by ZeRO stage, whether sums of gradients travel during the backward pass. bucket: parameters of one.
        ckpt_every: steps between two saves in the file.
    """

    parameters: int
    flops_per_image: float
    images: float
    global_batch: int
    micro_batch: int
    stage: int
    weight_bytes: int
    gradient_bytes: int
    overlapped: tuple[bool, ...]
    bucket: int
    ckpt_every: int


@dataclass(frozen=True)
class Surroundings:
    """Storage and failures: host_rate and storage_rate in bytes/s, times in hours. host_rate: of one GPU's copy to its
    host; storage_rate: of all together to the disk."""

    mtbf: float = MTBF_HOURS
    restart: float = 10 / 60
    host_rate: float = 25e9
    storage_rate: float = 2e9
    critical_batch: float | None = None


@dataclass(frozen=True)
class Step:
    """One optimizer step on `gpus`; times in seconds. exposed: what is waited for of all that is sent, which would take
    `sending` alone. efficiency: against as many single GPUs at the rate that was measured or given."""

    gpus: int
    global_batch: int
    per_gpu: int
    micro_batch: int
    accumulation: int
    compute: float
    optimizer: float
    sending: float
    exposed: float
    intra_bytes: float
    inter_bytes: float
    efficiency: float

    @property
    def seconds(self) -> float:
        return self.compute + self.optimizer + self.exposed

    @property
    def images_per_second(self) -> float:
        return self.global_batch / self.seconds


@dataclass(frozen=True)
class Training:
    """A whole run of such steps, in hours. interval: of work between two saves that loses least; lost: share that saves
    and failures add, lost_as_set with the file's `ckpt_every`; growth: factor of images needed at this batch."""

    steps: float
    hours: float
    growth: float
    checkpoint_bytes: float
    pause_seconds: float
    write_seconds: float
    mean_time: float
    interval: float
    lost: float
    lost_as_set: float

    @property
    def total(self) -> float:
        return self.hours * (1 + self.lost)


def why_not(work: Workload, gpus: int, network: Network) -> str | None:
    """Why a number of GPUs cannot share the file's global batch, or None."""
    try:
        nodes_of(gpus, network)
    except ConfigError as e:
        return str(e)
    if gpus > work.global_batch:
        return f"a global batch of {work.global_batch:,} is less than one image for each GPU"
    if work.global_batch % gpus:
        return f"a global batch of {work.global_batch:,} is no multiple of {gpus:,} GPUs"
    return None


def plan_step(work: Workload, gpu: Gpu, network: Network, gpus: int, stage: int | None = None) -> Step:
    """The step of this run's global batch; the micro-batch is the file's, or the largest part of it that divides the
    images of a GPU. Raises ConfigError where the GPUs cannot share the batch."""
    if reason := why_not(work, gpus, network):
        raise ConfigError(reason)
    stage = work.stage if stage is None else stage
    per_gpu = work.global_batch // gpus
    micro = next(size for size in range(min(work.micro_batch, per_gpu), 0, -1) if per_gpu % size == 0)
    accumulation = per_gpu // micro
    seconds = gpu.seconds(micro)
    compute = seconds * accumulation
    optimizer = gpu.optimizer / (gpus if stage else 1)
    exchanged = exchanges(stage, accumulation, work.weight_bytes, work.gradient_bytes)
    traffic = step_traffic(work.parameters, gpus, network, exchanged)
    sending, waited = _sending(work, network, gpus, stage, accumulation, seconds)
    step = Step(
        gpus,
        work.global_batch,
        per_gpu,
        micro,
        accumulation,
        compute,
        optimizer,
        sending,
        waited,
        traffic.intra,
        traffic.inter,
        0.0,
    )
    return replace(step, efficiency=step.images_per_second / (gpus * gpu.images_per_second))


def _sending(
    work: Workload, network: Network, gpus: int, stage: int, accumulation: int, seconds: float
) -> tuple[float, float]:
    """Seconds of a step that collectives take, and those that are waited for. seconds: of one micro-batch's passes."""
    if gpus == 1:
        return 0.0, 0.0
    sending, waited, backward = 0.0, 0.0, seconds * (1 - FORWARD)
    sizes = bucket_sizes(work.parameters, work.bucket)
    hidden = {"forward": 0.0, "backward": 0.0}
    for each in exchanges(stage, accumulation, work.weight_bytes, work.gradient_bytes):
        buckets = [collective(each.operation, n * each.bytes_per_parameter, gpus, network).seconds for n in sizes]
        sending += sum(buckets) * each.times
        if stage == 3:
            hidden[each.when] += sum(buckets)
        else:
            overlapped = each.when == "backward" and work.overlapped[stage]
            waited += exposed_seconds(buckets, backward, overlapped=overlapped) * each.times
    if stage == 3:  # weights come layer by layer, ahead of both passes
        passes = {"forward": seconds * FORWARD, "backward": backward}
        waited = sum(max(0.0, hidden[when] - passes[when] * work.overlapped[3]) for when in passes) * accumulation
    return sending, waited


def plan_training(work: Workload, step: Step, around: Surroundings, reference_batch: int) -> Training:
    """The run of such steps. reference_batch: the batch of the file, whose images are known to be enough."""
    growth = 1.0
    if around.critical_batch is not None:  # images needed at a batch B: E (1 + B/B_crit)
        growth = (1 + step.global_batch / around.critical_batch) / (1 + reference_batch / around.critical_batch)
    steps = work.images * growth / step.global_batch
    hours = steps * step.seconds / 3600
    size = CHECKPOINT_BYTES * work.parameters
    pause = size / (step.gpus if work.stage else 1) / around.host_rate
    written = size / around.storage_rate
    failures = Failures(around.mtbf / step.gpus, pause / 3600, around.restart, written / 3600)
    interval = failures.best_interval()
    return Training(
        steps,
        hours,
        growth,
        size,
        pause,
        written,
        failures.mean_time,
        interval,
        failures.overhead(interval),
        failures.overhead(max(work.ckpt_every * step.seconds / 3600, (pause + written) / 3600)),
    )


def weak(work: Workload, gpu: Gpu, gpus: int) -> Workload:
    """The run with as many images for each GPU as it was measured with."""
    return replace(work, global_batch=gpus * gpu.micro_batch, micro_batch=gpu.micro_batch)


def last_efficient(work: Workload, gpu: Gpu, network: Network, least: float) -> Step | None:
    """The step on the most GPUs, of those that can share the batch, whose efficiency is at least `least`."""
    counts = [n for n in range(work.global_batch, 0, -1) if why_not(work, n, network) is None]
    steps = (plan_step(work, gpu, network, n) for n in counts)
    return next((step for step in steps if step.efficiency >= least), None)


def largest_loss(step: Step, gpu: Gpu) -> str:
    """The largest part of a step by which it is longer than its images take a GPU alone."""
    slower = step.compute - step.per_gpu * gpu.seconds(gpu.micro_batch) / gpu.micro_batch
    parts = {
        "waiting for other GPUs": step.exposed,
        f"a micro-batch of {step.micro_batch}, too small to fill a GPU": slower,
        "the optimizer": step.optimizer,
    }
    name, seconds = max(parts.items(), key=lambda part: part[1])
    return f"{name}: {seconds * 1e3:.1f} ms of {step.seconds * 1e3:.1f}"
