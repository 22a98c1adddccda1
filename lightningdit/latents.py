"""The latents format: names, manifest, statistics, and the checks of a directory before it is read.

Extraction writes it (`lightningdit.latents_writer`), training reads it (`lightningdit.data`). It is a directory of

* safetensors shards `latents_rank{RR}_shard{SSS}.safetensors`, those of each rank numbered from 0, each with `latents`
  and `latents_flip` (of the mirrored images) and `labels` [N] int64 (`lightningdit.latents_shards`),
* `latents_stats.pt` with `mean` and `std` [1, C, 1, 1],
* and, unlike the published sets, `manifest.json`: counts, checksums, names of the classes, the latents' origin, what is
  stored and as what, and statistics.

Sample i of a set is row i of its shards, sorted by name. What is stored of an image's posterior (`Store`) is one
sample, its mean, or mean and standard deviation (`moments`), in float32, float16 or bfloat16. The published sets, and
what reads those alone, know samples in float32.
"""

import logging
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, StringConstraints, model_validator

from common.files import FileError, path_exists, sha256
from common.records import ClassNames, FileRecord, Record, read_record
from common.tensors import WeightsError, read_tensors
from common.text import shortened

log = logging.getLogger(__name__)

# At least two and three digits, more where the number has more: `shard_name` writes no other.
SHARD_NAME = re.compile(r"latents_rank([0-9]{2}|[1-9][0-9]{2,})_shard([0-9]{3}|[1-9][0-9]{3,})\.safetensors")
STATISTICS_FILE, MANIFEST_FILE = "latents_stats.pt", "manifest.json"
UNFINISHED_FILE = "unfinished"  # from start to end of an extraction, as published sets have no manifest either
VERIFY_BELOW = 4 * 2**30  # bytes of which checksums take seconds
SHARDS_PER_RANK = 1000  # of the sets written here: with more, numbers of four digits sort before those of three

Store = Literal["sample", "mean", "moments"]
StoredDtype = Literal["float32", "float16", "bfloat16"]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class LatentsError(FileError):
    """An invalid latents directory; the message names the file."""


class StatisticsRecord(Record):
    """Statistics of latents in a JSON file, per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    multiplier: float = 1.0


class MeasuredStatistics(Record):
    """Statistics in a manifest, per channel, over `count` values of each."""

    mean: tuple[float, ...]
    std: tuple[Annotated[float, Field(ge=0)], ...]
    count: Positive


class ShardRecord(FileRecord):
    """A shard as a manifest lists it: by a name of the format, never by a path."""

    file: Annotated[str, StringConstraints(pattern=f"^{SHARD_NAME.pattern}$")]
    rank: Count
    count: Positive


class Manifest(Record):
    """`manifest.json` of a latents directory."""

    format: Annotated[int, Field(ge=1, le=1)]
    count: Positive
    shape: tuple[Positive, Positive, Positive]
    store: Store = "sample"
    dtype: StoredDtype = "float32"
    tokenizer: Any
    identity: Any
    classes: ClassNames | None = None
    statistics: MeasuredStatistics
    files: dict[Annotated[str, StringConstraints(pattern=f"^{re.escape(STATISTICS_FILE)}$")], FileRecord]
    shards: tuple[ShardRecord, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _adds_up(self) -> "Manifest":
        names, count = [shard.file for shard in self.shards], sum(shard.count for shard in self.shards)
        if len(set(names)) < len(names) or count != self.count or not self.files:
            raise ValueError(
                f"{self.count} latents and statistics, where {len(set(names))} shards of {count} and "
                f"{len(self.files)} other files are listed"
            )
        (channels, *sides), found = self.shape, self.statistics
        if {len(found.mean), len(found.std)} != {channels} or found.count != self.count * math.prod(sides):
            raise ValueError(
                f"statistics of {found.count} values in {len(found.mean)} channels, of {self.count} "
                f"latents {list(self.shape)}"
            )
        return self

    def check(self, directory: Path, *, checksums: bool | None) -> None:
        """Raise LatentsError where a listed file is missing or of another size, or where a shard is not listed.

        checksums: whether to compare them, which reads everything; None does so for sets below 4 GiB.
        """
        listed = self.files | {shard.file: shard for shard in self.shards}
        if checksums is None:
            checksums = sum(entry.bytes for entry in listed.values()) < VERIFY_BELOW
        for name, entry in listed.items():
            if not path_exists(directory / name):
                raise LatentsError(f"{directory / name} is missing though {MANIFEST_FILE} lists it")
            if damage := damage_of(directory / name, entry, checksum=checksums):
                if name == STATISTICS_FILE and (found := _readable_statistics(directory / name)) is not None:
                    self.check_statistics(directory, *found)  # saved again: what counts are its numbers
                else:
                    raise LatentsError(damage)
        for path in shard_files(directory):
            if path.name not in listed:
                raise LatentsError(f"{path} is not in {MANIFEST_FILE}: left over from another extraction?")

    def check_statistics(self, directory: Path, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Raise LatentsError where the file of statistics has other numbers than these of the extraction."""
        pairs = ((self.statistics.mean, mean), (self.statistics.std, std))
        if not all(
            torch.equal(torch.tensor(said, dtype=torch.float32), found.float().flatten()) for said, found in pairs
        ):
            raise LatentsError(
                f"{directory / STATISTICS_FILE} has other statistics than {directory / MANIFEST_FILE} says: one of "
                "them was written again after the extraction. Put that one back, or remove both and run "
                f"`python -m launch extract --statistics {directory}`"
            )


def shard_name(rank: int, number: int) -> str:
    """The file of a rank's shard, both from 0."""
    return f"latents_rank{rank:02d}_shard{number:03d}.safetensors"


def numbered_shard(number: int) -> str:
    """The file of shard `number` of a set: names sort as the numbers do, up to number 99,999.

    Only the published extraction and earlier versions of this one mean a process by the rank.
    """
    return shard_name(*divmod(number, SHARDS_PER_RANK))


def shard_files(directory: Path) -> list[Path]:
    """The files of a directory whose names are those of shards, sorted by name."""
    return sorted(path for path in directory.glob("*.safetensors") if SHARD_NAME.fullmatch(path.name))


def shards_of(directory: Path, manifest: Manifest | None) -> list[Path]:
    """The shards of a set, sorted by name; safetensors files of other names are left out, which is logged.

    manifest: the set's, against which it has been checked. Without one, raises LatentsError where the names of the
    shards leave a gap.
    """
    shards = shard_files(directory)
    others = sorted({path.name for path in directory.glob("*.safetensors")} - {path.name for path in shards})
    if not shards:
        held = f"; it holds {shortened(others, 5)}" if others else ""
        raise LatentsError(f"{directory} holds no .safetensors shard with a name such as {shard_name(0, 0)}{held}")
    if others:
        log.info("%s: left out %s, not named as shards are", directory, shortened(others, 5))
    if manifest is None:
        _require_no_gaps(directory, shards)
    return shards


def _require_no_gaps(directory: Path, shards: Sequence[Path]) -> None:
    """Ranks are numbered from 0, and so are the shards of each. A shard missing at the end leaves no gap."""
    numbers: dict[int, set[int]] = defaultdict(set)
    for path in shards:
        if match := SHARD_NAME.fullmatch(path.name):
            numbers[int(match[1])].add(int(match[2]))
    for rank in range(max(numbers) + 1):
        for number in range(max(numbers[rank], default=0) + 1):
            if number not in numbers[rank]:
                raise LatentsError(
                    f"{directory / shard_name(rank, number)} is missing: an extraction numbers its "
                    f"processes and the shards of each from 0, and later ones are there"
                )


def damage_of(path: Path, entry: FileRecord, *, checksum: bool = True) -> str:
    """Error message on a file that differs from its entry in a manifest or record; "" where it does not."""
    if path.stat().st_size != entry.bytes:
        return f"{path} is truncated or damaged: {path.stat().st_size:,} bytes, the manifest says {entry.bytes:,}"
    if checksum and (found := sha256(path)) != entry.sha256:
        return f"{path} is damaged: SHA-256 {found}, the manifest says {entry.sha256}"
    return ""


@dataclass(frozen=True, eq=False)
class LatentStatistics:
    """Per-channel mean and std [C] float32, and the factor of normalised latents: `(x - mean) / std · multiplier`."""

    mean: torch.Tensor
    std: torch.Tensor
    multiplier: float = 1.0

    @classmethod
    def checked(
        cls, mean: torch.Tensor, std: torch.Tensor, multiplier: float, *, channels: int, source: Path | str
    ) -> "LatentStatistics":
        """Statistics of the values in a file, checked for latents [B, channels, H, W].

        mean, std: floats [channels] or [1, channels, 1, 1]; [channels, 1, 1] and [1, channels] are taken too. Raises
        LatentsError, naming `source`, for other shapes, for numbers that are not finite, and for a std or multiplier
        that is not above 0.
        """
        c = channels
        for name, value in (("mean", mean), ("std", std)):
            if not value.is_floating_point() or tuple(value.shape) not in ((c,), (1, c), (c, 1, 1), (1, c, 1, 1)):
                raise LatentsError(
                    f"{source} has {name} {value.dtype} {list(value.shape)}; latents of {channels} "
                    f"channels take floats [{channels}] or [1, {channels}, 1, 1]"
                )
        # Copies: what is read of a file shares its pages, which change when it is written again.
        found = cls(mean.float().flatten().clone(), std.float().flatten().clone(), multiplier)
        finite = bool(torch.isfinite(torch.stack([found.mean, found.std])).all())
        if not finite or not bool((found.std > 0).all()) or not 0 < multiplier < math.inf:
            raise LatentsError(
                f"{source} has mean {found.mean.tolist()}, std {found.std.tolist()}, multiplier "
                f"{multiplier}: not usable for normalisation"
            )
        return found

    @classmethod
    def identity(cls, channels: int, multiplier: float = 1.0) -> "LatentStatistics":
        """Mean 0 and std 1, for latents that are only scaled."""
        return cls(torch.zeros(channels), torch.ones(channels), multiplier)

    @property
    def is_identity(self) -> bool:
        """Whether mean 0 and std 1 leave latents as they are, but for the multiplier."""
        return not self.mean.any() and bool((self.std == 1).all())

    @classmethod
    def from_record(cls, record: StatisticsRecord, *, channels: int, source: Path | str) -> "LatentStatistics":
        """From what `to_json` gave; see `checked`."""
        mean, std = (torch.tensor(values, dtype=torch.float32) for values in (record.mean, record.std))
        return cls.checked(mean, std, record.multiplier, channels=channels, source=source)

    def to_json(self) -> dict:
        """{"mean": [C], "std": [C], "multiplier": float}, without rounding."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist(), "multiplier": self.multiplier}

    def denormalise(self, z: torch.Tensor) -> torch.Tensor:
        """Normalised latents [B, C, H, W] → the tokenizer's, `z · std / multiplier + mean`."""
        mean, std = (v.to(z).view(1, -1, 1, 1) for v in (self.mean, self.std))  # [1, C, 1, 1]
        return z * std / self.multiplier + mean


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest; None without one, as in published sets.

    Raises LatentsError where it is damaged or the extraction has not finished.
    """
    manifest = manifest_in(directory)
    if manifest is None and path_exists(directory / UNFINISHED_FILE):
        raise LatentsError(f"{directory} is unfinished: run the extraction again to complete it")
    return manifest


def manifest_in(directory: Path) -> Manifest | None:
    """The manifest as `read_manifest`, also of an extraction that has not finished."""
    path = directory / MANIFEST_FILE
    return read_latents_record(path, Manifest) if path_exists(path) else None


def read_latents_record(path: Path, record: type[Record]) -> Any:
    try:
        return read_record(path, record)
    except FileError as e:
        raise LatentsError(str(e)) from None


def read_statistics(directory: Path, channels: int, multiplier: float = 1.0) -> LatentStatistics:
    """The statistics of a set of latents [channels, H, W].

    Raises LatentsError where the file is missing, unreadable, of no use (see `LatentStatistics.checked`), or has other
    values than the manifest, if there is one.
    """
    path = directory / STATISTICS_FILE
    if not path_exists(path):
        raise LatentsError(
            f"{path} is missing: latent_norm: true needs the statistics of the latents. Make it with "
            f"`python -m launch extract --statistics {directory}`"
        )
    try:
        content = read_tensors(path, ())
        mean, std = content["mean"], content["std"]
    except (WeightsError, KeyError) as e:
        raise LatentsError(f"{path} cannot be read as {{mean, std}} tensors: {e}") from None
    statistics = LatentStatistics.checked(mean, std, multiplier, channels=channels, source=path)
    if (manifest := manifest_in(directory)) is not None:
        manifest.check_statistics(directory, statistics.mean, statistics.std)
    return statistics


def _readable_statistics(path: Path) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(mean, std) of a file of statistics; None where it cannot be read as such."""
    try:
        content = read_tensors(path, ())
        return content["mean"], content["std"]
    except (WeightsError, KeyError):
        return None
