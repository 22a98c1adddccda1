"""How many latents per second reach the training loop, beside the published way of reading them.

    python -m bench.data [--out FILE]        a set of its own, made for the run, or --directory with extracted latents

The loader is measured as the trainer uses it, in the global shuffled order, with and without workers, from files in the
page cache. The published way opens a file for every sample. Both are first compared on the same samples. A row's times
are of one latent.
"""

import argparse
import os
import platform
import sys
import tempfile
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch.utils.data import DataLoader, Dataset, RandomSampler

from bench.measure.rows import Log, Row, version
from bench.measure.timing import Device, HostDevice, Iteration, Timing, interleave
from launch.training.loader import BatchSplit, SampleOrder, micro_batches
from lightningdit.data import LatentDataset
from lightningdit.latents_writer import LatentsWriter, finish

SHAPE = (32, 16, 16)
FOREVER = 10**9
#: Batches of an iteration: more than workers have ready when it begins.
BATCHES = 16
OURS, PUBLISHED = "latents", "file-per-sample"


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
class Provider:
    """One way to read, with so many workers."""

    name: str
    includes: str
    package: str
    stream: Callable[[LatentDataset, int, int], Iterator]  # of batches of so many samples, by so many workers
    workers: int

    def __str__(self) -> str:
        return f"{self.name}-{self.workers}"


def providers(workers: list[int]) -> list[Provider]:
    """Both ways, each with every number of workers."""
    ours = partial(
        Provider, OURS, includes="LatentDataset through launch.training.loader", package="torch", stream=_ours
    )
    published = partial(Provider, PUBLISHED, includes="one file opened per sample; DataLoader, default collate",
                        package="safetensors", stream=_published)  # fmt: skip
    return [way(workers=count) for way in (ours, published) for count in workers]


def _ours(data: LatentDataset, batch_size: int, workers: int) -> Iterator:
    order, split = SampleOrder(len(data), batch_size, 0), BatchSplit(batch_size, 1, batch_size)
    return micro_batches(data, order, split, 0, first_step=1, last_step=FOREVER, num_workers=workers,
                         pin_memory=torch.cuda.is_available())  # fmt: skip


def _published(data: LatentDataset, batch_size: int, workers: int) -> Iterator:
    samples = FilePerSample(data)
    return iter(DataLoader(samples, batch_size, sampler=RandomSampler(samples, num_samples=FOREVER),
                           num_workers=workers, pin_memory=torch.cuda.is_available()))  # fmt: skip


def disagreement(data: LatentDataset, published: Dataset, count: int = 64, seed: int = 0) -> str:
    """What differs between both ways on the same samples, bit for bit; "" where nothing does."""
    indices = np.random.default_rng(seed).integers(0, len(data), count)
    np.random.seed(seed)
    x, y = (torch.stack(parts) for parts in zip(*(published[i] for i in indices.tolist()), strict=True))
    np.random.seed(seed)
    flips = np.random.uniform(0, 1, count) <= 0.5
    batch = data.batch(np.zeros(count, np.int64), indices, flips)
    wrong = [name for name, value in (("x", x), ("y", y)) if not torch.equal(batch[name], value)]
    return "" if not wrong else f"{' and '.join(wrong)} differ from the published way's"


@dataclass(frozen=True)
class LoaderComparison:
    """seconds: of samples, for each provider."""

    device: Device
    log: Log
    batch_size: int = 128
    seconds: float = 4.0

    def run(self, data: LatentDataset, workers: list[int]) -> list[Row]:
        """A row for each provider, written to the log; without times where both ways disagree."""
        present, machine = providers(workers), host()
        wrong = disagreement(data, FilePerSample(data))
        if wrong:
            return [self._write(c, machine, status="incorrect", reason=wrong) for c in present]
        timings = self._timings(data, present)
        size = 4 * int(np.prod(data.shape))
        return [self._write(c, machine, **figures(str(c), timings, size)) for c in present]

    def _timings(self, data: LatentDataset, present: list[Provider]) -> dict[str, Timing]:
        iterations = {}
        for provider in present:
            stream = provider.stream(data, self.batch_size, provider.workers)
            iterations[str(provider)] = Iteration(partial(read, stream), BATCHES * self.batch_size, method="host clock")
        return interleave(iterations, self.device, self.seconds)

    def _write(self, provider: Provider, machine: Row, **figures) -> Row:
        row = {"kind": "data", "provider": provider.name, "workers": provider.workers, "status": "ok", "reason": "",
               "batch_size": self.batch_size, "includes": provider.includes, "version": version(provider.package),
               "pinned": torch.cuda.is_available(), **machine}  # fmt: skip
        return self.log.write(row | figures)


def read(stream: Iterator) -> None:
    """One iteration."""
    deque(islice(stream, BATCHES), maxlen=0)


def figures(name: str, timings: dict[str, Timing], size: int) -> Row:
    """The numbers of a row; size: bytes of a latent."""
    mine = timings[name]
    return {
        **{f"p{q}_us": mine.quantile(q / 100) * 1e6 for q in (20, 50, 80)},
        "latents_per_second": 1 / mine.median, "bytes": size, "spread": mine.spread, "samples": len(mine.samples),
        "calls": mine.calls, "method": mine.method,
        "times_faster_than": {other: t.median / mine.median for other, t in timings.items() if other != name},
    }  # fmt: skip


def host() -> Row:
    """The CPU, how many of its cores this process may use, and how many processes wanted one in the last minute."""
    model = platform.processor() or None
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text("utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
        model = names[0] if names else model
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 2)}


def table(rows: list[Row]) -> str:
    """The rows to read, and the best of ours against the best of the published way."""
    first = rows[0]
    lines = [f"{first['cpu']}, {first['cores']} cores, load {first['load']}; batches of {first['batch_size']}",
             f"{'':16} {'workers':>7} {'latents/s':>10} {'p20 to p80':>19} {'GB/s':>6}"]  # fmt: skip
    best: dict[str, float] = {}
    for row in rows:
        head = f"{row['provider']:16} {row['workers']:7}"
        if row["status"] != "ok":
            lines.append(f"{head} {row['status']}: {row['reason']}")
            continue
        rate, between = row["latents_per_second"], f"{1e6 / row['p80_us']:,.0f} to {1e6 / row['p20_us']:,.0f}"
        lines.append(f"{head} {rate:10,.0f} {between:>19} {rate * row['bytes'] / 1e9:6.2f}")
        best[row["provider"]] = max(rate, best.get(row["provider"], 0))
    if len(best) == 2:
        lines.append(f"best against best: {best[OURS] / best[PUBLISHED]:.1f}x the way that opens one file per sample")
    return "\n".join(lines)


def make_set(directory: Path, count: int) -> None:
    """A finished set of random latents in four shards."""
    writer, random = LatentsWriter(directory, shard_size=-(-count // 4)), torch.Generator().manual_seed(0)
    for start in range(0, count, 512):
        x = torch.randn(min(512, count - start), *SHAPE, generator=random)
        writer.add(x, x.flip(-1), torch.arange(start, start + len(x)) % 1000)
    writer.close()
    finish(directory, expected=count)


def warm(directory: Path) -> None:
    """Read everything once, into the page cache."""
    for path in directory.iterdir():
        with path.open("rb") as f:
            while f.read(1 << 24):
                pass


def parse(argv: list[str] | None) -> argparse.Namespace:
    def at_least(least: int, text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least}")
        return int(text)

    positive, natural = partial(at_least, 1), partial(at_least, 0)
    parser = argparse.ArgumentParser(prog="python -m bench.data", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--directory", type=Path, help="latents to read (default: random ones, made for the run)")
    parser.add_argument("--samples", type=positive, default=8192, help="of the set made for the run (default 8192)")
    parser.add_argument("--batch-size", type=positive, default=128, help="of one process (default 128)")
    parser.add_argument("--workers", type=natural, action="append", help="repeatable (default: 0 and 2)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of samples for each provider (default 4)")
    parser.add_argument("--out", type=Path, help="append rows to this file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    device = HostDevice()
    bench = LoaderComparison(device, Log(device.kind, options.out), options.batch_size, options.seconds)
    with tempfile.TemporaryDirectory() as own:
        directory = options.directory or Path(own)
        if options.directory is None:
            make_set(directory, options.samples)
        warm(directory)
        rows = bench.run(LatentDataset(directory, verify=False), options.workers or [0, 2])
    print(table(rows))
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
