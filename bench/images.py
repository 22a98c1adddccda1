"""Time decoding and cropping image files for the tokenizer's training, in images per second, by each decoder.

    python -m bench.data --images [--out FILE]      files of its own, made for the run, or --directory with images

Files like ImageNet's, in class folders and in tars, are read as the trainer reads them, in the global shuffled order,
by each number of workers: random crops of 256 pixels, float32, on the GPU where there is one. Beside them the published
way: a file opened by Pillow for every sample. All files are in the page cache. A decoder whose pixels are not Pillow's
is not timed. A row's times are of one image.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

from bench.measure import program
from bench.measure.comparison import Comparison
from bench.measure.cutoff import CutOff, Deadline, stoppable
from bench.measure.host import cores, host
from bench.measure.progress import Ready
from bench.measure.rows import Log, Row, version
from bench.measure.timing import HostDevice, Iteration
from bench.workloads.image_loading import SIZE, Chosen, Reference, Turns
from bench.workloads.photographs import photographs, write_folder, write_tars
from kernels.backends.device import cuda_reasons

MODULE = "bench.data --images"
PUBLISHED = "file-per-sample"
#: Decoder → what reads for it, and the package whose version a row states.
DECODERS = {
    "pil": ("processes", "pillow"),
    "torchvision": ("threads, one at least", "torchvision"),
    "dali": ("threads, one at least", "nvidia-dali-cuda130"),
}
#: Batches of an iteration, at least: more than threads read ahead. Of processes each makes one at least.
BATCHES = 4


@dataclass(frozen=True)
class ImageJob:
    """The same images by each decoder and in the published way, from each source, by each number of workers.

    Attributes:
        sources: "folder", "tar" or "list" → its path.
        made: whether the files are made for the run, at these paths.
    """

    sources: Mapping[str, str]
    made: bool
    samples: int
    batch_size: int
    workers: tuple[int, ...]

    @property
    def providers(self) -> tuple[str, ...]:
        of_files = [(PUBLISHED, source) for source in self.sources if source != "tar"]
        readers = [(decoder, source) for decoder in DECODERS for source in self.sources] + of_files
        return tuple(f"{reader}-{source}-{workers}" for reader, source in readers for workers in self.workers)

    def __str__(self) -> str:
        return f"{', '.join(self.sources.values())} batch {self.batch_size}"


def parts(name: str) -> tuple[str, str, int]:
    """Reader, source and workers of a provider."""
    reader, source, workers = name.rsplit("-", 2)
    return reader, source, int(workers)


@dataclass
class Shared:
    """What the providers of a job share."""

    reference: Reference
    files: str
    turns: Turns = field(default_factory=Turns)


class HostClock(HostDevice):
    """The host's clock around iterations that end when their batches are on a device of that kind."""

    def __init__(self, kind: str):
        self.kind = kind


@dataclass(frozen=True)
class ImageComparison(Comparison):
    seconds: float = 4.0
    rounds: int = 4

    kind: ClassVar[str] = "images"

    @property
    def _on_gpu(self) -> bool:
        return self.device.kind == "cuda"

    def named(self, job: ImageJob, name: str) -> Row:
        reader, source, workers = parts(name)
        end = f", float32 on {'the GPU' if self._on_gpu else 'the CPU'}"
        if reader == PUBLISHED:
            package = "torchvision"
            covers = "file opened by Pillow per sample; Resize, RandomCrop, ToTensor, Normalize; default collate"
        else:
            readers, package = DECODERS[reader]
            covers = f"file read, decoded, scaled and cropped in {readers}; through launch.training.loader"
        return {
            "provider": reader,
            "ours": reader != PUBLISHED,
            "source": source,
            "workers": workers,
            "batch_size": job.batch_size,
            "image_size": SIZE,
            "includes": covers + end,
            "version": version(package),
            "pinned": self._on_gpu,
            **host(),
        }

    def set_up(self, job: ImageJob) -> Shared:
        """Write the files, unless there are some; read them all; decode those that are compared."""
        files = "of its user's"
        if job.made:
            made, files = photographs(job.samples)
            for source, write in (("folder", write_folder), ("tar", write_tars)):
                write(Path(job.sources[source]), made)
        reference = Reference(next(iter(job.sources.values())), job.samples)
        facts = host()
        print(f"{facts['cpu']}, {facts['cores']} cores, load {facts['load']}; batches of {job.batch_size}")
        print(f"{len(reference.chosen)} files, {files}; {reference.bytes_per_file / 1e3:.1f} KB each")
        print(f"{'':15} {'source':6} {'workers':>7} {'images/s':>9} {'p20 to p80':>16} {'PSNR, dB, mean, least':>22}")
        return Shared(reference, files)

    def prepare(self, job: ImageJob, name: str, shared: Shared) -> Ready:
        reader, source, workers = parts(name)
        device, reference = torch.device(self.device.kind), shared.reference
        make: Callable
        if reader == PUBLISHED:
            samples = reference.file_per_sample()
            wrong, found = reference.check_published(samples)
            make = partial(samples.stream, job.batch_size, workers, self._on_gpu)
        else:
            chosen = Chosen(job.sources[source], reader, job.samples, workers, device)
            wrong, found = reference.check(chosen)
            make = partial(chosen.stream, job.batch_size, self._on_gpu)
        batches = max(BATCHES, workers)
        iteration = Iteration(
            partial(shared.turns.read, batches, device),
            batches * job.batch_size,
            partial(shared.turns.open, make),
            "host clock",
        )
        about = {"files": shared.files, "bytes_per_file": reference.bytes_per_file, "calls": iteration.calls}
        return Ready({"": iteration}, wrong, about | found | {"method": iteration.method}, close=shared.turns.close)

    def wrong(self, job: ImageJob, values: Mapping[str, str], shared: Shared) -> dict[str, str]:
        return {name: why for name, why in values.items() if why}

    def figures(self, job: ImageJob, ready: Ready) -> Row:
        return {"images_per_second": 1 / ready.seconds()}

    def label(self, row: Row) -> str:
        return f"{row['provider']:15} {row['source']:6} {row['workers']:7}"

    def measured(self, row: Row) -> str:
        between = f"{1e3 / row['p80_ms']:,.0f} to {1e3 / row['p20_ms']:,.0f}"
        psnr = "equal" if row["psnr_mean"] is None else f"{row['psnr_mean']:.1f}, {row['psnr_min']:.1f}"
        by_pillow = f", {row['by_pillow']:.0%} of them left to Pillow" if row["by_pillow"] else ""
        return f"{row['images_per_second']:9,.0f} {between:>16} {psnr:>22}{by_pillow}"

    def text(self, row: Row) -> str:
        """Without the ratios to all others, which are too many for a line."""
        return f"{self.label(row)} {self.measured(row)}" if row["status"] == "ok" else super().text(row)

    def conclude(self, rows: list[Row]) -> None:
        """Print the best of ours against the best of the published way, and each decoder against Pillow."""
        rates = {(*_names(row), row["provider"]): row["images_per_second"] for row in rows if row["status"] == "ok"}
        ours, published = (
            {name: rate for name, rate in rates.items() if (name[2] == PUBLISHED) == theirs} for theirs in (False, True)
        )
        if ours and published:
            best, other = max(ours, key=ours.__getitem__), max(published, key=published.__getitem__)
            print(
                f"best against best: {ours[best] / published[other]:.2f}x the way that opens one file per sample "
                f"({best[2]} from {best[0]}, {best[1]} workers, {ours[best]:,.0f} images/s; {other[1]} workers, "
                f"{published[other]:,.0f})"
            )
        for decoder in DECODERS:
            ratios = [
                f"{rate / rates[source, workers, 'pil']:.2f}x ({source}, {workers} workers)"
                for (source, workers, reader), rate in rates.items()
                if reader == decoder != "pil" and (source, workers, "pil") in rates
            ]
            if ratios:
                print(f"{decoder} over pil with the same workers: {', '.join(ratios)}")


def _names(row: Row) -> tuple[str, int]:
    return row["source"], row["workers"]


def kind_of(path: str) -> str:
    """Whether images at a path are in a folder, in tars or in a list of files.

    Raises what opening them raises; nothing where that cannot be tried, as a package is missing.
    """
    folder = Path(path)
    tars = any(entry.suffix.lower() == ".tar" for entry in folder.iterdir()) if folder.is_dir() else False
    with suppress(ImportError):
        from vavae.sources import open_source

        open_source(path)
    return "folder" if folder.is_dir() and not tars else "list" if path.endswith((".txt", ".tsv")) else "tar"


def parse(argv: list[str] | None) -> argparse.Namespace:
    positive, natural = program.whole_number(1), program.whole_number(0)
    parser = program.parser(MODULE, __doc__, seconds=4.0, gpu=False)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop then, with rows of what there is")
    parser.add_argument("--directory", help="images to read, as data.data_path names them (default: made for the run)")
    parser.add_argument(
        "--samples", type=positive, default=512, help="images made, or taken from all over --directory (default 512)"
    )
    parser.add_argument("--batch-size", type=positive, default=32, help="of one process (default 32)")
    parser.add_argument(
        "--workers", type=natural, action="append", help=f"repeatable (default: 0 and all cores, here {cores()})"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where batches end (default: a GPU, if there is one)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.device == "cuda" and (reasons := cuda_reasons()):
        print(f"{MODULE} --device cuda needs a GPU: {'; '.join(reasons)}", file=sys.stderr)
        return 2
    kind = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    workers = tuple(dict.fromkeys(options.workers or (0, cores())))
    try:
        with tempfile.TemporaryDirectory() as own, stoppable():
            if options.directory is None:
                sources = {name: str(Path(own, name)) for name in ("folder", "tar")}
            else:
                try:
                    sources = {kind_of(options.directory): options.directory}
                except (ValueError, OSError, RuntimeError) as error:
                    print(f"{MODULE}: --directory: {error}", file=sys.stderr)
                    return program.USAGE
            job = ImageJob(sources, options.directory is None, options.samples, options.batch_size, workers)
            log, until = Log(kind, options.out), Deadline.after(options.minutes)
            comparison = ImageComparison(HostClock(kind), log, None, options.seconds, until=until)
            return program.work_through(comparison, [job])
    except CutOff as cut:
        print(f"cut off by {cut}; whoever had been measured has a row", file=sys.stderr)
        return 128 + cut.number


if __name__ == "__main__":
    sys.exit(main())
