"""Whether images are read as fast as a tokenizer's training takes them: a short measurement against an estimate."""

import time
from contextlib import closing

from launch.training.loader import BatchSplit, SampleOrder, micro_batches
from vavae.data import ImageDataset

SECONDS = 2.0
BATCH_SIZE = 32
#: FLOP/s that a GPU is taken to sustain in training: about 40 % of an H100's 989 in bfloat16, and of its 495 in TF32.
SUSTAINED = {"bfloat16": 400e12, "float32": 200e12}


def measure_images(images: ImageDataset, num_workers: int) -> float:
    """Images per second of one process with so many workers, over `SECONDS` after its first batch."""
    size = min(BATCH_SIZE, len(images))
    order, split = SampleOrder(len(images), size, images.seed), BatchSplit(size, 1, size)
    batches = micro_batches(
        images, order, split, 0, first_step=1, last_step=10**9, num_workers=num_workers, pin_memory=False
    )
    with closing(batches):
        next(batches)
        begin, read = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - begin) < SECONDS:
            next(batches)
            read += size
    return read / elapsed


def describe_rate(measured: float, flops_per_image: float, precision: str, gpus: int) -> str:
    """The images per second read here beside those that the GPUs which share this machine need."""
    needed = gpus * SUSTAINED[precision] / flops_per_image
    verdict = "enough" if measured >= needed else "too few: more data.num_workers, or another data.decoder"
    who = "a GPU" if gpus == 1 else f"{gpus} GPUs"
    return (
        f"images/s: {measured:,.0f} read here ({SECONDS:g} s, one process), needed by {who} {needed:,.0f} (at "
        f"{SUSTAINED[precision] / 1e12:,.0f} TFLOP/s each): {verdict}"
    )
