"""Making a set of samples, or of images of latents, with any number of processes: what is missing, in parts, joined."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.files import FileError, make_directory, read_json, write_json
from common.sections import short
from common.text import printable
from launch.config import ConfigError
from launch.runtime.processes import Processes
from launch.runtime.run_lock import lock_directory
from launch.sampling.background import InBackground
from launch.sampling.outputs import Output
from launch.sampling.parts import Parts
from launch.sampling.pipeline import Arrays, Pipeline
from launch.sampling.units import Rows, batches_of, missing_units, rows_done, rows_missing, share_of

DESCRIPTION = "samples.json"
_TOLD = 3  # differences that a message tells one by one
#: Facts that change no image: samples that were described before they were, or otherwise, go on.
_CHANGE_NOTHING = {"classes", "label_counts"}


@dataclass(frozen=True)
class Job:
    """A set to be made.

    Attributes:
        output: its directory.
        count: samples of it.
        format: how they are written.
        facts: what they depend on, for their description; a directory of others is refused.
        counts: the numbers of each sample of which the mean is stated.
        picked: the samples [P] of the picture, ascending.
        draw: makes it of their images uint8 [P, H, W, 3] and the file.
        former: description that was read → the same, as it would be written now.
    """

    output: Path
    count: int
    format: Output
    facts: dict[str, Any]
    counts: tuple[str, ...]
    picked: np.ndarray
    draw: Callable[[np.ndarray, Path], None]
    former: Callable[[dict], dict] = dict

    @property
    def what(self) -> str:
        """What the samples are written as."""
        return "latents" if self.format.wanted == "latents" else "images"

    @property
    def description(self) -> Path:
        return self.output / DESCRIPTION


#: A pipeline on the device, the samples of a batch, and what looks at them: `check(start, arrays) → arrays`.
Making = tuple[Pipeline, int, Callable[[int, Arrays], Arrays]]


def produce(job: Job, processes: Processes, prepare: Callable[[], Making]) -> Path:
    """Make what is missing of a set → the path of the result.

    prepare: called where something is; by each process. Raises ValueError where the directory holds other samples, or
    what is there is damaged.
    """
    parts = Parts(job.output)
    if processes.on_main(lambda: _already_there(job)):
        if processes.is_main:
            parts.remove()  # a kill may have come before it
            print(f"{job.format.result} is already there")
        return job.format.result
    with lock_directory(job.output, processes):
        there = processes.on_main(lambda: _begin(job, parts))
        _make_missing(job, parts, processes, prepare, rows_done(job.count, there))
        processes.barrier()
        processes.on_main(lambda: _finish(job, parts))
        if processes.is_main:
            print(f"{job.count:,} {job.what} in {job.format.result}")
        return job.format.result


def _begin(job: Job, parts: Parts) -> list[Rows]:
    """Prepare the directory → the parts that are there, and whole; raises ValueError where it is others'."""
    _claim(parts.directory / DESCRIPTION, job)
    job.format.begin()
    there = []
    for rows in parts.begin():
        if rows[1] <= job.count and job.format.holds(rows):
            there.append(rows)
        else:
            parts.drop(rows)
    return there


def _make_missing(
    job: Job, parts: Parts, processes: Processes, prepare: Callable[[], Making], done: np.ndarray
) -> None:
    if done.all():
        return
    pipeline, size, check = prepare()
    with pipeline:
        units = share_of(missing_units(done, pipeline.unit), processes.rank, processes.world_size)

        def keep(item: tuple[Rows, Callable[[], Arrays]]) -> None:
            (start, stop), result = item
            made = check(start, result())
            for first, last in rows_missing((start, stop), done):
                rows = {name: values[first - start : last - start] for name, values in made.items()}
                parts.write((first, last), job.format.keep((first, last), rows))
            shown.update(stop - start)

        batches = list(batches_of(units, pipeline.unit, size, job.count))
        shown = tqdm(
            total=sum(stop - start for start, stop in batches),
            unit="image",
            disable=None if processes.is_main else True,
        )
        with shown, InBackground(keep) as background:
            for start, stop in batches:
                background.put(((start, stop), pipeline.start(start, stop)))


def _finish(job: Job, parts: Parts) -> None:
    """Join the parts: the result, the picture, and last the description that makes them count."""
    found = job.format.gather(parts.read_all(job.count, job.format.wanted, job.counts), job.picked)
    if found.images:
        job.draw(np.stack(found.images), job.output / "samples.png")
    means: dict[str, Any] = {name: found.totals[name] / job.count for name in job.counts}
    for name, values in found.more().items():
        means[name] = float(values.mean())
    write_json(job.description, job.facts | means | job.format.entry())
    parts.remove()


def _already_there(job: Job) -> bool:
    """Whether the directory holds these very samples; raises ValueError where it holds others, or they are damaged."""
    if not job.description.is_file() or not job.format.result.exists():
        return False
    said = _require_same(job.description, job)
    entry = job.format.entry()
    # Samples of before their files were described have no such entry.
    if different := [name for name in entry if said.get(name) not in (None, entry[name])]:
        was = said[different[0]]
        raise FileError(
            f"{job.format.result} is damaged: {DESCRIPTION} says {was} of it; remove it, and it is made again"
        )
    return True


def _claim(description: Path, job: Job) -> None:
    """Make the directory of unfinished parts these samples', or raise ConfigError where it is others'."""
    if description.is_file():
        _require_same(description, job)
    else:
        make_directory(description.parent)
        write_json(description, job.facts)


def _require_same(description: Path, job: Job) -> dict:
    """The content of the description; raises ValueError where it is of other samples."""
    theirs, ours = read_json(description), job.facts
    if not isinstance(theirs, dict):
        raise FileError(f"{description} is damaged: it describes no images")
    theirs = job.former(theirs)
    different = [key for key in ours if theirs.get(key) != ours[key] and key not in _CHANGE_NOTHING]
    if different:
        raise ConfigError(
            f"{job.output} holds images of other {', '.join(different)} ({_difference(theirs, ours, different)}); "
            "give another --output or remove it"
        )
    return theirs


def _difference(theirs: dict, ours: dict, keys: list[str]) -> str:
    """What differs under `keys`, single entries of mappings: `settings.seed: 1 there, 0 now`."""
    said = []
    for key in keys:
        there, now = theirs.get(key), ours[key]
        pairs = {key: (there, now)}
        if isinstance(there, dict) and isinstance(now, dict):
            pairs = {f"{key}.{name}": (there.get(name), now.get(name)) for name in {**there, **now}}
        said += [f"{name}: {_brief(a)} there, {_brief(b)} now" for name, (a, b) in pairs.items() if a != b]
    return printable("; ".join(said[:_TOLD])) + ("; …" if len(said) > _TOLD else "")


def _brief(value: Any) -> str:
    return value if isinstance(value, str) else short(value)
