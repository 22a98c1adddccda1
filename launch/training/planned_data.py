"""What a plan looks at of a run's data: how many images there are, and how fast they are read here."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from launch.config import LightningDiTRun, Run, VavaeRun
from launch.training.build import open_dataset
from launch.training.memory import FLOAT32, GIB
from lightningdit.data import LatentDataset
from lightningdit.device_latents import device_bytes
from lightningdit.latents_shards import parts_of
from lightningdit.task import check_classes
from vavae.decoders.choice import choose_decoder, lacking

if TYPE_CHECKING:
    from vavae.data import ImageDataset


def device_here() -> str:
    """Where images would be decoded on this machine."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def open_data(run: Run, kind: str, absent: list[str]) -> dict:
    """The data sets that are here, by their keys; the others are added to `absent`."""
    opened: dict = {}
    for key in ("data_path", "valid_path"):
        folder = getattr(run.data, key)
        if folder is None:
            continue
        if _is_here(run, folder):
            opened[key] = open_dataset(_to_look_at(run), key, device_here())
        else:
            absent.append(f"data.{key} {folder}")
    if kind == "lightningdit" and len(opened) == 2:
        check_classes(*opened.values())
    return opened


def stored_width(run: Run, data: "LatentDataset | ImageDataset | None") -> tuple[str, int]:
    """What is stored of each number of a latent, and its bytes: of the data here, else float32 samples are assumed."""
    if not isinstance(data, LatentDataset):
        return "float32", FLOAT32
    kind = "moments in " if data.store == "moments" else ""
    return f"{kind}{_name(data.dtype)}", parts_of(data.store) * data.dtype.itemsize


def latents_on_device(
    run: Run, data: "LatentDataset | ImageDataset | None", shape: tuple[int, int], num_images: int, processes: int
) -> tuple[float, tuple[str, ...]]:
    """Bytes of a process's share of the latents where the run says that they are on the device, and what to say.

    data: the set, which tells what is held of each number; where it is not here, float32 samples are assumed.
    """
    if not isinstance(run, LightningDiTRun) or run.data.placement == "host":
        return 0.0, ()
    here = data if isinstance(data, LatentDataset) else None
    dtype = here.memory_dtype if here else getattr(torch, run.data.latent_dtype)
    held = device_bytes(
        num_images,
        here.shape if here else (*shape, shape[-1]),
        parts=parts_of(here.store) if here else 1,
        mirrors=run.data.latent_flip,
        dtype=dtype,
        processes=processes,
    )
    what = "moments" if here and here.store == "moments" else "latents"
    amount = f"{held / GIB:,.1f} GiB per GPU of {what} in {_name(dtype)}"
    amount += "" if here else " (assumed: shards of float32 samples)"
    if run.data.placement == "device":
        return held, (f"data.placement device: {amount}, counted above",)
    return 0.0, (f"data.placement auto: {amount} where they fit beside the above, else they are read from files",)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def reading_lines(run: VavaeRun, images: "ImageDataset | None", gpus: int, flops_per_image: float) -> tuple[str, ...]:
    """What decodes a run's images, and how fast; without images here only the first. gpus: that share this machine."""
    from launch.training.image_rate import describe_rate, measure_images  # imports torchvision: seconds of its own

    if lacking(run.data.decoder, device_here()):  # on this machine
        return ()
    data, device = run.images(), device_here()
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


def _is_here(run: Run, path: str) -> bool:
    if isinstance(run, LightningDiTRun):
        return Path(path).exists()
    from vavae.sources import source_exists  # imports Pillow: seconds of its own

    return source_exists(path)


def _to_look_at(run: Run) -> Run:
    """The run with its images left on the disk, by a decoder that is here."""
    if isinstance(run, LightningDiTRun):
        return run
    here = {"decoder": "auto"} if lacking(run.data.decoder, device_here()) else {}
    if run.data.cache:  # which decides about the decoder, and is left out here
        here = {"decoder": choose_decoder(run.data.decoder, device_here(), crop=run.data.crop, cached=True)[0]}
    return run.model_copy(update={"data": run.data.model_copy(update={"cache": False, **here})})
