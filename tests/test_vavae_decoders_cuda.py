"""The decoders on a GPU: the same cases as on a CPU."""

from contextlib import closing

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
decoders = pytest.mark.parametrize("name", ["dali", "torchvision"])
crops = pytest.mark.parametrize("crop", ["random", "center"])


@pytest.fixture
def packages(name):
    """Skips where one that the cases need is missing."""
    for package in ("nvidia.dali" if name == "dali" else "torchvision", "torchvision", "PIL", "skimage", "sklearn"):
        pytest.importorskip(package)


@decoders
@crops
@pytest.mark.parametrize("size", [256, 100])
def test_photographs_are_those_of_pillow(packages, name, crop, size):
    from tests.test_vavae_decoders import check_photographs

    check_photographs(name, crop, size, "cuda")


@decoders
@crops
@pytest.mark.parametrize("rotate", [True, False])
def test_every_file_has_pillows_size_orientation_and_colours(packages, name, crop, rotate):
    from tests.test_vavae_decoders import check_odd_files

    check_odd_files(name, crop, rotate, "cuda")


@decoders
@crops
def test_batches_of_two_readers_beside_a_busy_device_are_those_of_one(packages, name, crop, tmp_path, monkeypatch):
    """Whoever makes them, on whatever stream, in however many groups; and memory does not grow with their number."""
    monkeypatch.setattr("vavae.decoders.jpeg_decoder.GROUP_PIXELS", 1_500_000)
    check_readers(name, crop, tmp_path, "cuda")
    peak = torch.cuda.max_memory_reserved()
    check_readers(name, crop, tmp_path, "cuda", rounds=20)
    assert torch.cuda.max_memory_reserved() < 2 * peak


def check_readers(name, crop, folder, device: str, rounds: int = 2) -> None:
    from launch.runtime.read_ahead import read_in_threads
    from tests.photographs import jpegs
    from vavae.config import DataConfig
    from vavae.data import ImageDataset

    (folder / "a").mkdir(exist_ok=True)
    for number, content in enumerate(jpegs()):
        (folder / f"a/{number:02}.jpg").write_bytes(content)
    fields = {"data_path": str(folder), "image_size": 200, "crop": crop, "decoder": name, "flip": True}
    images = ImageDataset(DataConfig(**fields, num_workers=4), 0, device=device)
    parts = [torch.arange(5 * part, 5 * part + 5) for part in range(len(images) // 5)] * rounds
    want = []
    for part in parts:
        want.append(images.batch(0 * part, part)["image"].cpu())

    def load(part):
        return images.batch(0 * part, part)["image"]

    with closing(read_in_threads(load, parts, threads=2)) as found:
        for batch, wanted in zip(found, want, strict=True):
            if device == "cuda":
                torch.cuda._sleep(20_000_000)  # the stream that takes the batch is behind
                batch.record_stream(torch.cuda.current_stream())
            assert torch.equal(batch.cpu(), wanted)
