"""What is written of samples, one class for each format: what a batch leaves, and what all parts are gathered into.

All are resumable by index. In the end a directory holds `samples.json`, which makes the rest count, and

    npz        samples.npz: `arr_0` uint8 [N, H, W, 3] as the ADM evaluator takes it, `arr_1` the labels int64 [N]
    png, webp  images/ (see `ImageFolder`), labels.npy int64 [N]
    latents    shards, statistics and manifest of the latents format, as `extract` writes them

and, of images, samples.png, a picture of the first ones. Memory does not grow with N, but for a few numbers a sample.
"""

import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from common.files import atomic_write, file_entry
from launch.evaluation.npz_file import LABELS, write_array, write_images
from launch.sampling.image_folder import ImageFolder
from launch.sampling.parts import Part
from launch.sampling.units import Rows
from lightningdit.latents import MANIFEST_FILE, LatentsError, manifest_in
from lightningdit.latents_writer import LatentsWriter, finish

SHARD_SIZE = 10_000
#: Numbers of a sample, of which results state the mean over all.
COUNTS = ("nfe", "guided_nfe")


@dataclass
class Gathered:
    """What is found out on the way through all parts, beside what they are joined into.

    picked: indices of the images to be kept, ascending. totals: the sums of counts over all samples.
    """

    picked: np.ndarray
    totals: Counter[str] = field(default_factory=Counter)
    likelihoods: list[np.ndarray] = field(default_factory=list)
    images: list[np.ndarray] = field(default_factory=list)

    def through(self, parts: Iterable[tuple[Rows, Part]]) -> Iterator[tuple[Rows, Part]]:
        """The parts, looked at in passing."""
        for (start, stop), part in parts:
            self.totals.update({name: int(part[name].sum()) for name in COUNTS if name in part})
            if "log_likelihood" in part:
                self.likelihoods.append(part["log_likelihood"])
            if "images" in part:
                inside = self.picked[(self.picked >= start) & (self.picked < stop)]
                self.images.extend(part["images"][inside - start])
            yield (start, stop), part

    def more(self) -> dict[str, np.ndarray]:
        """`log_likelihood` float32 [N] where there is one."""
        return {"log_likelihood": np.concatenate(self.likelihoods)} if self.likelihoods else {}


class Output(Protocol):
    """A format.

    wanted: the array that each part of it has.
    """

    wanted: str | None

    @property
    def result(self) -> Path:
        """The path that is named when all is done."""

    def begin(self) -> None:
        """Prepare the directory, on one process."""

    def holds(self, rows: Rows) -> bool:
        """Whether what belongs to a part of these samples is there beside it."""

    def keep(self, rows: Rows, arrays: Part) -> Part:
        """Write what does not wait for the other samples → what is kept in the part of these ones."""

    def gather(self, parts: Iterable[tuple[Rows, Part]], picked: np.ndarray) -> Gathered:
        """Join all parts → what was found out on the way, with the images at the places `picked`."""

    def entry(self) -> dict[str, Any]:
        """{name: what can be compared later} of the finished files; raises FileError where they are damaged."""


class KeptInParts:
    """Of a format whose samples all lie in parts until these are joined."""

    def begin(self) -> None:
        pass

    def holds(self, rows: Rows) -> bool:
        return True

    def keep(self, rows: Rows, arrays: Part) -> Part:
        return arrays


@dataclass
class NpzOutput(KeptInParts):
    """One npz for the ADM evaluator."""

    output: Path
    labels: np.ndarray
    wanted: str | None = "images"

    @property
    def result(self) -> Path:
        return self.output / "samples.npz"

    def gather(self, parts: Iterable[tuple[Rows, Part]], picked: np.ndarray) -> Gathered:
        found = Gathered(picked)
        with atomic_write(self.result) as npz, zipfile.ZipFile(npz, "w", allowZip64=True) as archive:
            write_images(archive, len(self.labels), (part["images"] for _, part in found.through(parts)))
            for name, array in ({LABELS: self.labels} | found.more()).items():
                write_array(archive, name, array)
        return found

    def entry(self) -> dict[str, Any]:
        return {"npz": file_entry(self.result)}


@dataclass
class FolderOutput:
    """A folder of images, the labels beside it."""

    folder: ImageFolder
    wanted: str | None = None

    @property
    def result(self) -> Path:
        return self.folder.directory

    def begin(self) -> None:
        self.folder.begin()

    def holds(self, rows: Rows) -> bool:
        return self.folder.holds(rows)

    def keep(self, rows: Rows, arrays: Part) -> Part:
        self.folder.write(rows[0], arrays["images"])
        return {name: values for name, values in arrays.items() if name != "images"}

    def gather(self, parts: Iterable[tuple[Rows, Part]], picked: np.ndarray) -> Gathered:
        found = Gathered(picked)
        for _ in found.through(parts):
            pass
        for name, array in ({"labels": self.folder.labels} | found.more()).items():
            with atomic_write(self.folder.output / f"{name}.npy") as file:
                np.save(file, array)
        found.images.extend(self.folder.read(picked.tolist()))
        return found

    def entry(self) -> dict[str, Any]:
        return {"images": self.folder.entry()}


@dataclass
class LatentsOutput(KeptInParts):
    """A set in the latents format. A sample has no mirrored twin: `latents_flip` repeats `latents`.

    identity: what the latents depend on; tokenizer: facts of the tokenizer that they are of, None where none is known.
    """

    output: Path
    labels: np.ndarray
    identity: dict[str, Any]
    tokenizer: dict[str, Any] | None
    classes: list[str] | None
    wanted: str | None = "latents"

    @property
    def result(self) -> Path:
        return self.output

    def gather(self, parts: Iterable[tuple[Rows, Part]], picked: np.ndarray) -> Gathered:
        found = Gathered(picked)
        writer = LatentsWriter(self.output, shard_size=SHARD_SIZE, identity=self.identity)
        for (start, stop), part in found.through(parts):
            if stop > (first := max(start, writer.position)):  # a kill may have come after some shards
                latents = torch.from_numpy(part["latents"][first - start :])
                writer.add(latents, latents, torch.from_numpy(self.labels[first:stop]))
        writer.close()
        finish(self.output, tokenizer=self.tokenizer, expected=len(self.labels), classes=self.classes)
        return found

    def entry(self) -> dict[str, Any]:
        manifest = manifest_in(self.output)
        if manifest is None or manifest.count != len(self.labels):
            held = 0 if manifest is None else manifest.count
            raise LatentsError(f"{self.output} holds {held:,} latents where {len(self.labels):,} are promised")
        manifest.check(self.output, checksums=None)
        return {"latents_manifest": file_entry(self.output / MANIFEST_FILE)}
