"""Batches of decoded images: this project's, by each decoder, and those of the published way to read them."""

from collections.abc import Callable, Generator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from bench.measure.failures import CannotRun
from launch.training.loader import BatchSplit, SampleOrder, micro_batches
from vavae.decoders.choice import lacking

SIZE = 256
FOREVER = 10**9
#: Least PSNR, in dB, of a decoder's pixels beside those of Pillow: of any image, and of the mean of those that differ.
LEAST, LEAST_MEAN = 35.0, 40.0


def evenly_spaced(count: int, total: int) -> torch.Tensor:
    """At most so many indices of `total` images, int64."""
    count = min(count, total)
    return torch.arange(count) * total // count


class Chosen:
    """Some of the images at a path by one decoder, as `launch.training.loader` reads them; see `Batches` there."""

    def __init__(self, path: str, decoder: str, count: int, workers: int, device: torch.device):
        from vavae.config import DataConfig
        from vavae.data import ImageDataset

        if why := lacking(decoder, device):
            raise CannotRun("unavailable", why)
        section = {"data_path": path, "decoder": decoder, "image_size": SIZE, "crop": "random", "num_workers": workers}
        self.images = ImageDataset(DataConfig.model_validate(section), seed=0, device=device)
        self.indices = evenly_spaced(count, len(self.images))
        self.threaded, self.most_readers = self.images.threaded, self.images.most_readers
        self._workers = workers

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, epochs: torch.Tensor, indices: torch.Tensor, **options: bool) -> dict[str, torch.Tensor]:
        return self.images.batch(epochs, self.indices[indices], **options)

    def stream(self, batch_size: int, pin_memory: bool) -> Generator:
        """Batches without end, in the order of a training run; one stream at a time."""
        order, split = SampleOrder(len(self), batch_size, 0), BatchSplit(batch_size, 1, batch_size)
        return micro_batches(
            self, order, split, 0, first_step=1, last_step=FOREVER, num_workers=self._workers, pin_memory=pin_memory
        )


class FilePerSample(Dataset):
    """Image files in the published way: each opened by Pillow for its sample, transformed by torchvision."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int]):
        from torchvision import transforms

        self._paths, self._labels = paths, labels
        self.scale, self.crop = transforms.Resize(SIZE), transforms.RandomCrop(SIZE)
        self.to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        with open(self._paths[index], "rb") as file:
            image = Image.open(file).convert("RGB")
        return self.to_tensor(self.crop(self.scale(image))), self._labels[index]

    def stream(self, batch_size: int, workers: int, pin_memory: bool) -> Generator:
        sampler = RandomSampler(self, num_samples=FOREVER)
        yield from DataLoader(self, batch_size, sampler=sampler, num_workers=workers, pin_memory=pin_memory)


class Reference:
    """Pillow's pixels of some images and their labels, which all others have to give.

    Attributes:
        epochs, places: int64 [N], of the images among the chosen ones.
        pixels: uint8 [N, 3, S, S].
        labels: int64 [N].
        bytes_per_file: mean of all chosen files, which have been read once: the page cache holds them.
    """

    def __init__(self, path: str, count: int, checked: int = 64):
        from vavae.images import to_uint8

        self.chosen = Chosen(path, "pil", count, 0, torch.device("cpu"))
        source = self.chosen.images.source
        self.bytes_per_file = float(np.mean([len(source.read(index)) for index in self.chosen.indices.tolist()]))
        self.places = evenly_spaced(checked, len(self.chosen))
        self.epochs = torch.arange(len(self.places))
        batch = self.chosen.batch(self.epochs, self.places)
        self.pixels, self.labels = to_uint8(batch["image"]), batch["y"]

    def file_per_sample(self) -> FilePerSample:
        """The published way to read the same files, which are in no tar."""
        source, indices = self.chosen.images.source, self.chosen.indices
        paths = [source.name(index) for index in indices.tolist()]
        return FilePerSample(paths, source.labels[indices].tolist())

    def check(self, chosen: Chosen) -> tuple[str, dict[str, Any]]:
        """What is wrong with a decoder's batch, "" where nothing is, and its closeness to Pillow's."""
        from vavae.images import to_uint8

        batch = chosen.batch(self.epochs, self.places)
        by_pillow = float(batch["by_pillow"].mean()) if "by_pillow" in batch else 0.0
        if by_pillow == 1:
            raise CannotRun("unsupported", f"it left all of {len(self.places)} files to Pillow")
        wrong, found = closeness(to_uint8(batch["image"].cpu()), self.pixels)
        if not torch.equal(batch["y"].cpu(), self.labels):
            wrong = "; ".join(filter(None, (wrong, "its labels are not those of Pillow's batch")))
        return wrong, found | {"by_pillow": by_pillow}

    def check_published(self, samples: FilePerSample) -> tuple[str, dict[str, Any]]:
        """The same for the published way, beside this project's own scaling, cropped where its draws fell."""
        from vavae.image_files import decode_image
        from vavae.images import resize_short_side, to_uint8

        source, got, want, labels = self.chosen.images.source, [], [], []
        for place in self.places.tolist():
            index = int(self.chosen.indices[place])
            torch.manual_seed(place)
            image, label = samples[place]
            got.append(image)
            labels.append(label)
            scaled = resize_short_side(decode_image(source.read(index), source.name(index), rotate=False), SIZE)
            torch.manual_seed(place)
            top, left, _, _ = samples.crop.get_params(scaled, (SIZE, SIZE))
            square = np.array(scaled)[top : top + SIZE, left : left + SIZE]
            want.append(torch.from_numpy(square).permute(2, 0, 1))
        wrong, found = closeness(to_uint8(torch.stack(got)), torch.stack(want))
        if labels != self.labels.tolist():
            wrong = "; ".join(filter(None, (wrong, "its labels are others")))
        return wrong, found | {"by_pillow": None}


def closeness(got: torch.Tensor, want: torch.Tensor) -> tuple[str, dict[str, float | None]]:
    """What is wrong with pixels uint8 [N, 3, S, S], "" where nothing is, and `psnr_mean`, `psnr_min` in dB.

    Of images that differ; None where none does.
    """
    from vavae.images import psnr

    values = psnr(got, want)
    values = values[values.isfinite()]
    if not len(values):
        return "", {"psnr_mean": None, "psnr_min": None}
    mean, least = float(values.mean()), float(values.min())
    found: dict[str, float | None] = {"psnr_mean": mean, "psnr_min": least}
    if mean >= LEAST_MEAN and least >= LEAST:
        return "", found
    wanted = f"at least {LEAST_MEAN:g} and {LEAST:g} are wanted"
    return f"its pixels are not Pillow's: PSNR {mean:.1f} dB in the mean, {least:.1f} at worst; {wanted}", found


class Turns:
    """At most one stream of batches, open: another that reads ahead would take the cores from the one that is timed."""

    def __init__(self) -> None:
        self._stream: Generator | None = None

    def open(self, make: Callable[[], Generator]) -> None:
        self.close()
        self._stream = make()

    def close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def read(self, count: int, device: torch.device) -> None:
        """So many batches of the open stream, until their images are on the device."""
        assert self._stream is not None
        for batch in islice(self._stream, count):
            image = batch["image"] if isinstance(batch, dict) else batch[0]
            image.to(device, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
