"""Time loading latents for the training loop, in latents per second, against the published way of reading them.

    python -m bench.data [--out FILE]        a set of its own, made for the run, or --directory with extracted latents
    python -m bench.data --images            image files in the place of latents: see bench/images.py

The loader is measured as the trainer uses it, in the global shuffled order, with and without workers, from files in the
page cache. The published way opens a file for every sample. Both are first compared on the same samples. A third row is
of latents that lie in the memory of the device, a GPU's where there is one, and whose batches are made there; its first
batches are compared with the loader's. A row's times are of one latent.
"""

import argparse
import sys
import tempfile
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from safetensors import safe_open
from torch.utils.data import DataLoader, Dataset, RandomSampler

from bench import images
from bench.measure import program
from bench.measure.comparison import Comparison
from bench.measure.host import host
from bench.measure.progress import Ready
from bench.measure.rows import Log, Row, version
from bench.measure.timing import HostDevice, Iteration
from bench.workloads.latents import write_latents
from launch.training.device_batches import DeviceBatches
from launch.training.loader import BatchSplit, SampleOrder, Streams, micro_batches
from lightningdit.data import LatentDataset
from lightningdit.device_latents import DeviceLatents

SHAPE = (32, 16, 16)
FOREVER = 10**9
#: Batches of an iteration: more than workers have ready when it begins.
BATCHES = 16
OURS, PUBLISHED, ON_DEVICE = "latents", "file-per-sample", "latents-device"


class FilePerSample(Dataset):
    """The samples of `data` in the published way: each opens its file, reads one row and normalises it by itself.

    As there, every sample draws from NumPy's global generator whether it comes mirrored.
    """

    def __init__(self, data: LatentDataset):
        self._paths, self._firsts = sorted(data.path.glob("*.safetensors")), [0]
        for path in self._paths:
            with safe_open(path, "pt") as f:
                self._firsts.append(self._firsts[-1] + f.get_slice("labels").get_shape()[0])
        self._mean, self._std = (v.view(-1, 1, 1) for v in (data.statistics.mean, data.statistics.std))
        self._multiplier = data.statistics.multiplier

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        shard = bisect_right(self._firsts, index) - 1
        row = index - self._firsts[shard]
        name = "latents" if np.random.uniform(0, 1) > 0.5 else "latents_flip"
        with safe_open(self._paths[shard], "pt") as f:
            x, y = f.get_slice(name)[row : row + 1][0], f.get_slice("labels")[row : row + 1][0]
        return (x - self._mean) / self._std * self._multiplier, y


@dataclass(frozen=True)
class LoaderJob:
    """The latents of a set, read in both ways, each with every number of workers."""

    data: LatentDataset
    batch_size: int
    workers: tuple[int, ...]

    @property
    def providers(self) -> tuple[str, ...]:
        read = tuple(f"{way}-{workers}" for way in WAYS for workers in self.workers)
        return (*read, f"{ON_DEVICE}-0")

    def __str__(self) -> str:
        return f"{self.data.path} batch {self.batch_size}"


def _ours(data: LatentDataset | Streams, batch_size: int, workers: int) -> Iterator:
    order, split = SampleOrder(len(data), batch_size, 0), BatchSplit(batch_size, 1, batch_size)
    return micro_batches(
        data,
        order,
        split,
        0,
        first_step=1,
        last_step=FOREVER,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )


def _published(data: LatentDataset, batch_size: int, workers: int) -> Iterator:
    samples = FilePerSample(data)
    return iter(
        DataLoader(
            samples,
            batch_size,
            sampler=RandomSampler(samples, num_samples=FOREVER),
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
        )
    )


#: Way to read → what its time covers, the package whose version a row states, and batches of so many samples by so
#: many workers.
WAYS: dict[str, tuple[str, str, Callable[[LatentDataset, int, int], Iterator]]] = {
    OURS: ("LatentDataset through launch.training.loader", "torch", _ours),
    PUBLISHED: ("one file opened per sample; DataLoader, default collate", "safetensors", _published),
}


def disagreement(data: LatentDataset, published: Dataset, count: int = 64, seed: int = 0) -> str:
    """Differences between both ways on the same samples, bit for bit, in words; "" where there are none."""
    indices = np.random.default_rng(seed).integers(0, len(data), count)
    np.random.seed(seed)
    x, y = (torch.stack(parts) for parts in zip(*(published[i] for i in indices.tolist()), strict=True))
    np.random.seed(seed)
    flips = np.random.uniform(0, 1, count) <= 0.5
    batch = data.batch(np.zeros(count, np.int64), indices, flips)
    wrong = [name for name, value in (("x", x), ("y", y)) if not torch.equal(batch[name], value)]
    return "" if not wrong else f"{' and '.join(wrong)} differ from the published way's"


def device() -> str:
    """Where the latents of the third row lie."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def difference_on_device(made: Streams, data: LatentDataset, batch_size: int, count: int = 4) -> str:
    """Differences between the first batches made on the device and the loader's, bit for bit; "" if there are none."""
    for ours, loaded in zip(*(islice(_ours(each, batch_size, 0), count) for each in (made, data)), strict=True):
        if wrong := [name for name, value in loaded.items() if not torch.equal(ours[name].cpu(), value)]:
            return f"{' and '.join(wrong)} differ from the loader's"
    return ""


@dataclass(frozen=True)
class LoaderComparison(Comparison):
    """Without times where two ways disagree."""

    seconds: float = 4.0
    rounds: int = 8

    kind: ClassVar[str] = "data"
    unit: ClassVar[tuple[str, float]] = ("us", 1e6)
    early: ClassVar[bool] = False

    def named(self, job: LoaderJob, name: str) -> Row:
        way, _, workers = name.rpartition("-")
        includes, package = WAYS[way][:2] if way in WAYS else (f"DeviceLatents in memory of {device()}", "torch")
        return {
            "provider": way,
            "workers": int(workers),
            "batch_size": job.batch_size,
            "includes": includes,
            "version": version(package),
            "memory": device() if way == ON_DEVICE else "cpu",
            "pinned": torch.cuda.is_available(),
            **host(),
        }

    def set_up(self, job: LoaderJob) -> str:
        """Differences between both ways."""
        facts = host()
        print(f"{facts['cpu']}, {facts['cores']} cores, load {facts['load']}; batches of {job.batch_size}")
        print(f"{'':16} {'workers':>7} {'latents/s':>10} {'p20 to p80':>19} {'GB/s':>6}")
        return disagreement(job.data, FilePerSample(job.data))

    def prepare(self, job: LoaderJob, name: str, shared: str) -> Ready:
        if shared:
            return Ready({}, shared)
        way, _, workers = name.rpartition("-")
        if way == ON_DEVICE:
            made = DeviceBatches(DeviceLatents(job.data, device()))
            if why := difference_on_device(made, job.data, job.batch_size):
                return Ready({}, why)
            stream, close = _ours(made, job.batch_size, 0), made.close
        else:
            stream, close = WAYS[way][2](job.data, job.batch_size, int(workers)), lambda: None
        iteration = Iteration(partial(read, stream), BATCHES * job.batch_size, method="host clock")
        return Ready({"": iteration}, "", {"calls": iteration.calls, "method": iteration.method}, close=close)

    def wrong(self, job: LoaderJob, values: Mapping[str, str], shared: str) -> dict[str, str]:
        return {name: why for name, why in values.items() if why}

    def figures(self, job: LoaderJob, ready: Ready) -> Row:
        return {"latents_per_second": 1 / ready.seconds(), "bytes": 4 * int(np.prod(job.data.shape))}

    def label(self, row: Row) -> str:
        return f"{row['provider']:16} {row['workers']:7}"

    def measured(self, row: Row) -> str:
        rate, between = row["latents_per_second"], f"{1e6 / row['p80_us']:,.0f} to {1e6 / row['p20_us']:,.0f}"
        return f"{rate:10,.0f} {between:>19} {rate * row['bytes'] / 1e9:6.2f}"

    def conclude(self, rows: list[Row]) -> None:
        """Print the best of ours against the best of the published way, and the device's against ours."""
        rates = {
            way: max(
                (row["latents_per_second"] for row in rows if (row["provider"], row["status"]) == (way, "ok")),
                default=0,
            )
            for way in (OURS, PUBLISHED, ON_DEVICE)
        }
        if rates[OURS] and rates[PUBLISHED]:
            print(f"best against best: {rates[OURS] / rates[PUBLISHED]:.1f}x the way that opens one file per sample")
        if rates[OURS] and rates[ON_DEVICE]:
            print(f"in memory of {device()}: {rates[ON_DEVICE] / rates[OURS]:.1f}x the loader's best")


def read(stream: Iterator) -> None:
    """One iteration, to its end where batches are made on a GPU."""
    last = deque(islice(stream, BATCHES), maxlen=1)
    if isinstance(last[0], dict) and last[0]["x"].is_cuda:
        torch.cuda.synchronize()


def parse(argv: list[str] | None) -> argparse.Namespace:
    positive, natural = program.whole_number(1), program.whole_number(0)
    parser = program.parser("bench.data", __doc__, seconds=4.0, gpu=False)
    parser.add_argument("--directory", type=Path, help="latents to read (default: random ones, made for the run)")
    parser.add_argument("--samples", type=positive, default=8192, help="of the set made for the run (default 8192)")
    parser.add_argument("--batch-size", type=positive, default=128, help="of one process (default 128)")
    parser.add_argument("--workers", type=natural, action="append", help="repeatable (default: 0 and 2)")
    parser.add_argument("--images", action="store_true", help="image files instead; see --images --help")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if "--images" in words:
        return images.main([word for word in words if word != "--images"])
    options = parse(words)
    device = HostDevice()
    comparison = LoaderComparison(device, Log(device.kind, options.out), None, options.seconds)
    with tempfile.TemporaryDirectory() as own:
        directory = options.directory or Path(own)
        if options.directory is None:
            write_latents(directory, SHAPE, options.samples, 1000, shard_size=-(-options.samples // 4))
        for path in directory.iterdir():  # read everything once, into the page cache
            with path.open("rb") as file:
                deque(iter(partial(file.read, 1 << 24), b""), maxlen=0)
        data = LatentDataset(directory, verify=False)
        if data.store == "moments" or data.dtype != torch.float32:
            print(f"{directory} stores {data.store} in {data.dtype}: the published way reads latents in float32 alone")
            return 2
        workers = tuple(options.workers or (0, 2))
        return program.work_through(comparison, [LoaderJob(data, options.batch_size, workers)])


if __name__ == "__main__":
    sys.exit(main())
