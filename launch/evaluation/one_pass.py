"""One pass over images through networks: moments, features, class scores, and hashes of the pixels."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from launch.evaluation.encoded_images import EncodedImages
from launch.evaluation.features import Extractor
from launch.evaluation.image_source import ImageSource
from launch.evaluation.moments import FeatureStatistics, MomentsOfParts
from launch.evaluation.shares import ALONE, BATCHES_PER_PART, Share, moments_on_main, rows_on_main
from launch.runtime.processes import Processes

MAX_KEPT = 50_000  # images whose features are kept for KID, precision and recall; 0.4 GB of Inception's
KEPT = ("features", "logits")  # what is kept of each image


@dataclass
class ImageFeatures:
    """The result of one pass over images.

    Fields:
        hashes: SHA-256 of the pixels of each image, uint8 `[N, 32]`.
        moments: by the name of the features.
        kept: `features [N, D]` float32, None of more than MAX_KEPT images.
        logits: float32 `[N, classes]`.
        seen: of the files, how many were `lossy` and `resized`.
    """

    description: str
    count: int
    hashes: Tensor
    moments: dict[str, FeatureStatistics] = field(default_factory=dict)
    kept: Tensor | None = None
    logits: Tensor | None = None
    seen: dict[str, int] = field(default_factory=dict)

    @property
    def features(self) -> FeatureStatistics:
        """Of the features that FID compares."""
        return self.moments.get("features", FeatureStatistics())

    @property
    def spatial(self) -> FeatureStatistics:
        """Of those that sFID compares."""
        return self.moments.get("spatial", FeatureStatistics())

    @property
    def sha256(self) -> str:
        """SHA-256 of the images' hashes, in their order."""
        return hashlib.sha256(self.hashes.numpy().tobytes()).hexdigest()

    @property
    def hash_set(self) -> set[bytes]:
        """The images' hashes, each once."""
        return {row.tobytes() for row in self.hashes.numpy()}


def measure(images: ImageSource, extractor: Extractor, batch_size: int = 64) -> ImageFeatures:
    """One pass over `images` through the extractor; raises ValueError for features that are not finite."""
    measured = measure_together(images, extractor, batch_size, ALONE)
    assert measured is not None
    return measured


def measure_together(
    images: ImageSource, extractor: Extractor, batch_size: int, processes: Processes, keep: Collection[str] = KEPT
) -> ImageFeatures | None:
    """As `measure`, each process its share; what is found is on the main process, None on the others.

    keep: what to keep of each image, of `features` (of at most MAX_KEPT images) and `logits`.

    On CPUs whose sums are the same (as with one thread each), the result has the same bits for any number of processes.
    """
    share = Share.of(len(images), batch_size, processes)
    few = len(images) <= MAX_KEPT
    collected = _Collected(images.description, [name for name in keep if name != "features" or few])
    batches = images.batches(batch_size, share.start, share.stop) if share.stop > share.start else iter(())
    shown = None if processes.is_main else True
    total = -(-(share.stop - share.start) // batch_size)
    for number, batch in enumerate(tqdm(batches, total=total, disable=shown, leave=False)):
        collected.add(share.first + number // BATCHES_PER_PART, batch, extractor(batch))
    collected.finish_part()
    seen = images.seen(share.start, share.stop) if isinstance(images, EncodedImages) else {}
    return collected.on_main(processes, len(images), seen)


class _Collected:
    """What a process finds."""

    def __init__(self, description: str, keep: Collection[str]):
        self._description, self._keep = description, keep
        self._hashes: list[bytes] = []
        self._moments: dict[str, MomentsOfParts] = defaultdict(MomentsOfParts)
        self._rows: dict[str, list[Tensor]] = defaultdict(list)
        self._part = -1
        self._pending: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, part: int, batch: Tensor, found: Mapping[str, Tensor]) -> None:
        """Add a batch of part `part`: uint8 `[B, H, W, 3]` and its features."""
        if part != self._part:
            self.finish_part()
            self._part = part
        self._hashes += [hashlib.sha256(image).digest() for image in batch.contiguous().numpy()]
        for name, value in found.items():
            value = value.float()
            if name != "logits":
                self._pending[name].append(value)
            if name in self._keep:
                self._rows[name].append(value.cpu())

    def finish_part(self) -> None:
        """Take the moments of the part that is complete; raises ValueError where they cannot be taken."""
        for name, values in self._pending.items():
            try:
                self._moments[name].add(self._part, FeatureStatistics.of(torch.cat(values)))
            except ValueError as e:
                raise ValueError(f"{self._description}: {e}") from None
        self._pending.clear()

    def on_main(self, processes: Processes, count: int, seen: dict[str, int]) -> ImageFeatures | None:
        """What all processes have found, on the main one."""
        names = sorted({name for own in processes.all_gather(sorted(self._moments)) for name in own})
        moments = {}
        for name in names:
            if (found := moments_on_main(processes, self._moments[name])) is not None:
                moments[name] = found
        kept = sorted({name for own in processes.all_gather(sorted(self._rows)) for name in own})
        rows = {name: rows_on_main(processes, _joined(self._rows[name])) for name in kept}
        digests = torch.frombuffer(bytearray(b"".join(self._hashes)), dtype=torch.uint8) if self._hashes else None
        hashes = rows_on_main(
            processes, torch.empty(0, 32, dtype=torch.uint8) if digests is None else digests.view(-1, 32)
        )
        seen = dict(sum((Counter(own) for own in processes.all_gather(seen)), Counter()))
        if hashes is None:
            return None
        return ImageFeatures(self._description, count, hashes, moments, rows.get("features"), rows.get("logits"), seen)


def _joined(rows: list[Tensor]) -> Tensor:
    return torch.cat(rows) if rows else torch.empty(0, 0)
