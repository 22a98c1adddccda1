"""`python -m launch sample CONFIG [key=value …] [--output DIR] [--labels 1,2,3] [--demo]`: images of a trained model.

`sample.fid_num` images, label of image i being i modulo the number of classes (or those of --labels, one image each),
in DIR/samples.npz: `arr_0` uint8 [N, H, W, 3] as the ADM evaluator takes it, `arr_1` the labels; what made them in
DIR/samples.json, with the names of the classes where the model knows them, a picture of the first ones in
DIR/samples.png. Image i depends on `sample.seed` and i alone: an interrupted run goes on with the images it lacks, and
the number of processes changes nothing. With `sample.likelihood` the npz also holds `log_likelihood` [N], of the
normalised latents under the model in nats.

--demo: the eight images of the published demo (scale 9, neither interval nor shift).
"""

import argparse
import shutil
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.files import FileError, atomic_write, file_entry, make_directory, open_regular, read_json, write_json
from common.sections import short
from launch.arguments import add_run_file, load_run, local_path
from launch.config import ConfigError, LightningDiTRun, select_ops
from launch.guides import guide_network
from launch.pictures import sample_grid
from launch.runtime.run_lock import lock_directory
from launch.trained import build_diffusion, build_tokenizer, diffusion_weights, sampling_settings
from lightningdit.config import SampleConfig
from lightningdit.flow import Transport
from lightningdit.latents import LatentStatistics
from lightningdit.model import LightningDiT
from lightningdit.sampler import sample
from lightningdit.solvers import SolverError
from vavae.images import to_uint8
from vavae.model import AutoencoderKL
from vavae.weights import fingerprint

DEMO_LABELS = (975, 3, 207, 387, 388, 88, 979, 279)
DEMO_SETTINGS = {"cfg_scale": 9.0, "cfg_interval_start": 0.0, "timestep_shift": 0.0}


def main(argv: list[str]) -> int:
    """Generate and say where the images are; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_file(parser, "LightningDiT file; its ckpt_path and vae.ckpt_path name the weights", "sample.cfg_scale=4")
    parser.add_argument("--output", type=local_path, help="directory (default: samples/ in the run's directory)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--labels", help="class labels, separated by commas: one image each")
    which.add_argument("--demo", action="store_true", help="the published demo's eight images")
    args = parser.parse_intermixed_args(argv)
    run = load_run(args.config, args.overrides, "lightningdit")
    settings, labels = sampling_settings(run), None
    if args.labels is not None:
        labels = _numbers(args.labels)
    if args.demo:
        settings, labels = settings.model_copy(update=DEMO_SETTINGS), DEMO_LABELS
    directory = Path(run.train.output_dir) / (run.train.exp_name or "")
    generate(run, args.output or directory / ("demo" if args.demo else "samples"), settings, labels)
    return 0


def _numbers(text: str) -> list[int]:
    try:
        return [int(label) for label in text.split(",")]
    except ValueError:
        raise ConfigError(f"--labels {short(text)}: give whole numbers separated by commas, such as 1,2,3") from None


def generate(
    run: LightningDiTRun, output: Path, settings: SampleConfig | None = None, labels: Sequence[int] | None = None
) -> Path:
    """Generate the images of a `sample` section (default: the run's) into `output` → the npz's path.

    Raises ValueError where weights are missing or do not fit, a label is no class, `output` holds images that other
    settings or weights have made, or a sample is not finite: then no part of its batch is kept.
    """
    # Imports DeepSpeed: seconds that a mistake in the config need not wait.
    from launch.training.engine import start_processes

    settings = settings or sampling_settings(run)
    labels = _labels(run, settings, labels)
    generator, facts = _prepare(run, settings, labels)
    processes = start_processes(timeout_minutes=24 * 60)  # processes wait for the slowest at the end
    npz, parts = output / "samples.npz", output / "parts"
    if _already_there(output, facts):
        if processes.is_main:
            shutil.rmtree(parts, ignore_errors=True)  # a kill may have come before it
            print(f"{npz} is already there")
        return npz
    with lock_directory(output, processes):
        _claim(parts, facts, write=processes.is_main)
        processes.barrier()
        generator.to(processes.device)
        size = settings.per_proc_batch_size
        starts = range(0, len(labels), size)
        own = starts[processes.rank :: processes.world_size]
        for start in tqdm(own, desc="batches", disable=None if processes.is_main else True):
            path = part_path(output, start)
            if not path.exists():
                made = generator.images(range(start, min(start + size, len(labels))), labels)
                with atomic_write(path) as file:
                    np.savez(file, first=start, **made)
        processes.barrier()
        if processes.is_main:
            _gather(output, starts, labels, facts)
            print(f"{len(labels):,} images in {npz}")
        processes.barrier()
        return npz


@dataclass
class SampleGenerator:
    """From labels and indices to images: network, sampler settings, statistics, tokenizer.

    model_from, tokenizer_from: where their weights are from, for messages. guide: the network of autoguidance.
    """

    model: LightningDiT
    tokenizer: AutoencoderKL
    statistics: LatentStatistics
    transport: Transport
    settings: SampleConfig
    model_from: str = "the network"
    tokenizer_from: str = "the tokenizer"
    guide: LightningDiT | None = None

    def to(self, device: torch.device) -> None:
        """Move the networks, all but the tokenizer in the precision asked for."""
        self.model.to(device, getattr(torch, self.settings.precision))
        if self.guide is not None:
            self.guide.to(device, getattr(torch, self.settings.precision))
        self.tokenizer.to(device)

    @torch.no_grad()
    def images(self, indices: Sequence[int], labels: Sequence[int]) -> dict:
        """{"images": uint8 [b, H, W, 3], "nfe", "guided_nfe"} of the samples with these indices, and where the settings
        ask for it "log_likelihood": float32 [b].

        Raises ValueError, naming samples and weights, where one is not finite.
        """
        config, device = self.model.config, self.model.pos_embed.device
        y = torch.tensor([labels[i] for i in indices], device=device)
        shape = (config.in_channels, config.input_size, config.input_size)
        try:
            made = sample(
                self.model,
                self.transport,
                self.settings,
                y,
                indices,
                shape=shape,
                null_label=config.null_label,
                guide=self.guide,
            )
        except SolverError as error:
            raise ValueError(f"samples {_some(indices)} of {self.model_from}: {error}") from None
        self._require_finite("latents", made.latents, indices)
        decoded = self._decoded(made.latents)
        self._require_finite("decoded images", decoded, indices)
        found = {"images": _pixels(decoded), "nfe": made.nfe, "guided_nfe": made.guided_nfe}
        if made.log_likelihood is None:
            return found
        self._require_finite("log-likelihoods", made.log_likelihood, indices)
        return found | {"log_likelihood": made.log_likelihood.cpu().numpy()}

    @torch.no_grad()
    def pixels(self, latents: torch.Tensor) -> np.ndarray:
        """uint8 [b, H, W, 3] of normalised latents [b, C, h, w]."""
        return _pixels(self._decoded(latents))

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        return self.tokenizer.decode(self.statistics.denormalise(latents))

    def _require_finite(self, what: str, values: torch.Tensor, indices: Sequence[int]) -> None:
        """Raise ValueError for NaN and infinity, which 8 bits would show as black."""
        finite = values.isfinite().reshape(len(values), -1).all(1)
        wrong = [index for index, good in zip(indices, finite.tolist(), strict=True) if not good]
        if wrong:
            by = self.tokenizer_from if what == "decoded images" else f"{self.model_from} in {self.settings.precision}"
            raise ValueError(f"the {what} of samples {_some(wrong)} are not finite; they come from {by}")


def _some(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices[:8])) + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")


def _pixels(decoded: torch.Tensor) -> np.ndarray:
    return to_uint8(decoded).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _labels(run: LightningDiTRun, settings: SampleConfig, labels: Sequence[int] | None) -> list[int]:
    classes = run.data.num_classes
    if labels is None:
        return _every_class(run, settings.fid_num)
    wrong = [label for label in labels if not 0 <= label < classes]
    if wrong or not labels:
        raise ConfigError(f"labels {wrong or 'none'}: classes are 0 to {classes - 1} (data.num_classes)")
    return list(labels)


def _prepare(run: LightningDiTRun, settings: SampleConfig, labels: list[int]) -> tuple[SampleGenerator, dict]:
    """The networks, and the facts that an image depends on or that a result must state."""
    ops, found = select_ops(run.kernels), diffusion_weights(run)
    tokenizer = build_tokenizer(run, ops)
    if tokenizer.config.embed_dim != found.config.in_channels:
        have, want = tokenizer.config.embed_dim, found.config.in_channels
        raise ConfigError(f"{run.vae.ckpt_path} decodes latents of {have} channels, the model makes {want}")
    source = str(run.ckpt_path or Path(run.train.output_dir) / (run.train.exp_name or ""))
    model, guide = build_diffusion(found, ops, source), guide_network(run, settings, ops, found)
    generator = SampleGenerator(
        model,
        tokenizer,
        found.latents,
        Transport.from_config(run.transport),
        settings,
        source,
        run.vae.ckpt_path,
        None if guide is None else guide.network,
    )
    facts = {
        "num_samples": len(labels),
        "labels": labels if labels != _every_class(run, len(labels)) else "index modulo number of classes",
        "solver": f"{settings.mode} {settings.sampling_method}, {settings.num_sampling_steps} points, "
        f"shift {settings.timestep_shift:g}",
        "dtype": settings.precision,
        "guidance": settings.guidance(),
        "hashes": {"model": fingerprint(model), "tokenizer": fingerprint(tokenizer)},
        "step": found.step,
        "weights": found.weights,
        "latents": found.latents.to_json(),
        "settings": settings.stated(),
    }
    if guide is not None:
        facts["guide"] = guide.facts
    if "classes" in found.extra:
        facts["classes"] = found.extra["classes"]
    return generator, facts


def _every_class(run: LightningDiTRun, count: int) -> list[int]:
    return [i % run.data.num_classes for i in range(count)]


def _already_there(output: Path, facts: dict) -> bool:
    """Whether `output` holds these very images; raises ValueError where it holds others, or they are damaged."""
    description, npz = output / "samples.json", output / "samples.npz"
    if not description.is_file() or not npz.is_file():
        return False
    # Samples of before their file was described have no such entry.
    if (said := _require_same(description, facts).get("npz")) not in (None, file_entry(npz)):
        raise FileError(f"{npz} is damaged: {description.name} says {said} of it; remove it, and it is made again")
    return True


def _claim(parts: Path, facts: dict, *, write: bool) -> None:
    """Make the directory of unfinished parts these images', or raise ConfigError (everywhere) where it is others'."""
    description = parts / "samples.json"
    if description.is_file():
        _require_same(description, facts)
    elif write:
        make_directory(parts)
        write_json(description, facts)


def _require_same(description: Path, ours: dict) -> dict:
    """The content of the description; raises ValueError where it is of other images."""
    theirs = read_json(description)
    if not isinstance(theirs, dict):
        raise FileError(f"{description} is damaged: it describes no images")
    # The names of classes change no image, and samples begun before they were kept go on.
    different = [key for key in ours if theirs.get(key) != ours[key] and key != "classes"]
    if different:
        first = different[0]
        raise ConfigError(
            f"{description.parent} holds images of other {', '.join(different)} ({first}: {theirs.get(first)} there, "
            f"{ours[first]} now); give another --output or remove it"
        )
    return theirs


def _read_part(path: Path, start: int, count: int) -> dict[str, np.ndarray]:
    """The part with images `start` to `start + count`; raises FileError for anything else."""
    advice = "remove it, and its images are made again"
    try:
        with open_regular(path) as file, np.load(file) as content:
            part = dict(content)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        first_line = str(error).partition("\n")[0]
        raise FileError(f"{path} is damaged ({first_line}): {advice}") from None
    images, numbers = part.get("images"), [part.get(name) for name in ("nfe", "guided_nfe")]
    counts_are_scalars = all(number is not None and number.shape == () for number in numbers)
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or len(images) != count or not counts_are_scalars:
        raise FileError(f"{path} does not hold {count} images: {advice}")
    if int(part.get("first", start)) != start:  # parts of before it was kept have none
        raise FileError(f"{path} holds the images from {int(part['first'])} on: {advice}")
    return part


def part_path(output: Path, start: int) -> Path:
    """The file of the images from `start` on, until all are there."""
    return output / "parts" / f"{start:07d}.npz"


def _gather(output: Path, parts: Sequence[int], labels: list[int], facts: dict) -> None:
    """Join the parts that begin at these images: npz, picture, and last the description that makes them count."""
    first, nfe, guided, likelihoods = [], [], [], []
    with atomic_write(output / "samples.npz") as npz, zipfile.ZipFile(npz, "w", allowZip64=True) as archive:
        # A ZipInfo of one's own has a fixed date: equal images are equal files.
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            for start, stop in pairwise([*parts, len(labels)]):
                content = _read_part(part_path(output, start), start, stop - start)
                images = content["images"]
                if first and images.shape[1:] != first[0].shape[1:]:
                    raise FileError(
                        f"{part_path(output, start)} holds images of another size: remove it, and they are made again"
                    )
                nfe.append(int(content["nfe"]))
                guided.append(int(content["guided_nfe"]))
                if "log_likelihood" in content:
                    likelihoods.append(content["log_likelihood"])
                if not first:
                    shape = (len(labels), *images.shape[1:])
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                if sum(map(len, first)) < 1000:
                    first.append(images)
                file.write(images.tobytes())
        more = {"arr_1": np.array(labels, dtype=np.int64)}
        if likelihoods:
            more["log_likelihood"] = np.concatenate(likelihoods)
        for name, array in more.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as file:
                np.lib.format.write_array(file, array)
    _picture(np.concatenate(first), labels, output / "samples.png")
    mean = {"nfe": sum(nfe) / len(nfe), "guided_nfe": sum(guided) / len(guided)}
    if likelihoods:
        mean["log_likelihood"] = float(more["log_likelihood"].mean())
    write_json(output / "samples.json", facts | mean | {"npz": file_entry(output / "samples.npz")})
    shutil.rmtree(output / "parts")


def _picture(images: np.ndarray, labels: list[int], path: Path) -> None:
    """The published demo's 2 × 4 grid of eight images; otherwise a row for each of the first ten classes."""
    if len(labels) == 8:
        _, height, width, _ = images.shape
        grid = images.reshape(2, 4, height, width, 3).swapaxes(1, 2).reshape(2 * height, 4 * width, 3)
        with atomic_write(path) as file:
            Image.fromarray(grid).save(file, format="png")
        return
    shown = torch.tensor(labels[: len(images)])
    rows = torch.isin(shown, shown.unique()[:10])
    sample_grid(torch.from_numpy(images)[rows], shown[rows], path)
