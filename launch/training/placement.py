"""Where training reads latents from, files or the devices' memory, by what the memory has room for."""

import logging
from pathlib import Path

import torch

from launch.config import ConfigError, LightningDiTRun
from launch.runtime.processes import Processes
from launch.training.costs import lightningdit_costs, setup_of
from launch.training.device_batches import DeviceBatches
from launch.training.loader import BatchSplit
from launch.training.memory import GIB, memory_of
from lightningdit.data import LatentDataset
from lightningdit.device_latents import DeviceLatents

log = logging.getLogger(__name__)

#: Of the free memory, left to what estimates do not count: workspaces, collectives' buffers, fragments.
SPARE = 1 / 8
MEMORY_INFO = Path("/proc/meminfo")


def place_latents(run: LightningDiTRun, latents: LatentDataset, processes: Processes) -> DeviceBatches | None:
    """The training set in the devices' memory, still to be read, where `data.placement` says so; else None.

    All processes come to the same, by the least memory that one of them has. The choice and its figures are logged.
    Raises ConfigError where it is asked for and there is no room for the latents alone; that by the estimate there is
    none for training beside them is a warning.
    """
    asked, device = run.data.placement, processes.device
    if asked == "host" or (asked == "auto" and device.type == "cpu"):  # where it would lie in the same memory
        return None
    placed = DeviceLatents(latents, device, processes.rank, processes.world_size)
    free = min(processes.all_gather(free_bytes(device, processes.world_size)))
    training = run_bytes(run, processes.world_size)
    figures = (
        f"{placed.bytes / GIB:,.2f} GiB of latents beside an estimated {training / GIB:,.2f} GiB of training in the "
        f"{free / GIB:,.2f} GiB of free memory of each process"
    )
    if asked == "device" and placed.bytes > free:
        raise ConfigError(
            f"data.placement is device, but there is no room for {figures}: use placement host, "
            f"{_smaller(latents)}more processes or a smaller train.micro_batch_size"
        )
    if asked == "auto" and not fits_on_device(placed.bytes, free, training):
        log.info("data.placement auto: latents are read from files, as %s would not leave 1/8 of it spare", figures)
        return None
    log.info("data.placement %s: latents in the memory of %s: %s", asked, device.type, figures)
    if placed.bytes + training > free:  # an estimate: states may be offloaded
        log.warning("by this estimate memory will run out: %sa smaller train.micro_batch_size helps", _smaller(latents))
    workers = "threads draw the noise of moments" if latents.store == "moments" else "has no effect on training"
    log.info("data.num_workers %s %s, which reads no files", run.data.num_workers, workers)
    return DeviceBatches(placed)


def fits_on_device(latents: int, free: int, training: int) -> bool:
    """Whether latents and training, in bytes of a process, leave the spare part of what is free."""
    return latents + training <= free * (1 - SPARE)


def free_bytes(device: torch.device, processes: int) -> int:
    """Bytes that this process may take on its device; on a CPU its share of what the system has available."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    available = next(line for line in MEMORY_INFO.read_text("utf-8").splitlines() if line.startswith("MemAvailable:"))
    return 1024 * int(available.split()[1]) // processes


def run_bytes(run: LightningDiTRun, processes: int) -> int:
    """Estimated bytes of training on one process at its peak, as `--dry-run` counts them, latents apart."""
    train = run.train
    micro = train.micro_batch_size or max(train.global_batch_size // processes, 1)
    accumulation = BatchSplit(train.global_batch_size, processes, micro).accumulation
    networks = list(lightningdit_costs(run, [run.network().use_checkpoint]).values())
    return int(memory_of(networks, setup_of(run, processes), run.deepspeed.zero_stage, micro, accumulation).peak)


def _smaller(latents: LatentDataset) -> str:
    return "data.latent_dtype bfloat16, " if latents.memory_dtype == torch.float32 else ""
