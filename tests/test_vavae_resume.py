"""What a training reads: the same samples, crops and pixels whoever reads them, and after a kill in mid-epoch."""

import json
import signal
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.children import call
from tests.image_stream import write_stream
from tests.photographs import encoded, photographs
from vavae.decoders.choice import NAMES

SIZE, STEPS, KILLED_AFTER = 24, 9, 5  # of 14 images in batches of 4: in the second of two and a half epochs
SOURCES = ("folder", "tar", "list")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    """The same images in the same order, as each kind of source; some are Pillow's alone, one is turned."""
    root, rng = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    files = {}
    for number in range(14):
        image = photographs()[number % 10].convert("RGB").resize((int(rng.integers(30, 60)), int(rng.integers(26, 50))))
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 3 else 1
        kind = {5: ("PNG", "png"), 9: ("WEBP", "webp")}.get(number, ("JPEG", "jpg"))
        files[f"{number:02}.{kind[1]}"] = encoded(image, kind[0], exif=exif)
    lines = []
    for number, (name, content) in enumerate(files.items()):
        path = root / f"folder/{'ab'[number > 6]}/{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        lines.append(f"folder/{'ab'[number > 6]}/{name}\t{'ab'[number > 6]}\n")
    (root / "list.tsv").write_text("".join(lines))
    for shard in range(2):
        with tarfile.open(root / f"shard-{shard}.tar", "w") as tar:
            for number in range(7 * shard, 7 * shard + 7):
                name = list(files)[number]
                tar.add(root / f"folder/{'ab'[number > 6]}/{name}", name)
                (root / "cls").write_text("ab"[number > 6])
                tar.add(root / "cls", f"{number:02}.cls")
    return {"folder": f"{root}/folder", "tar": f"{root}/shard-{{0..1}}.tar", "list": f"{root}/list.tsv"}


def fields_of(sources, source: str, decoder: str, workers: int, crop: str = "random") -> dict:
    path = sources[source]
    return {
        "data_path": path,
        "image_size": SIZE,
        "decoder": decoder,
        "num_workers": workers,
        "crop": crop,
        "flip": True,
    }


def run(fields: dict, paths: list[Path], kill_after: int | None = None) -> list[int]:
    """Exit statuses of the processes, one for each path, that run together."""
    return call(write_stream, fields, STEPS, paths, kill_after, world_size=len(paths), limit=60)


def joined(paths: list[Path]) -> list[list]:
    """The samples of each step, of all processes in their order."""
    lines = [path.read_text().splitlines() for path in paths]
    return [[sample for part in step for sample in json.loads(part)] for step in zip(*lines, strict=True)]


@pytest.fixture(scope="module")
def undisturbed(sources, tmp_path_factory):
    """What one process without workers reads by a decoder from the folder."""

    @cache
    def read(decoder: str, crop: str = "random") -> list[list]:
        path = tmp_path_factory.mktemp("undisturbed") / decoder
        assert run(fields_of(sources, "folder", decoder, 0, crop), [path]) == [0]
        return joined([path])

    return read


def check(fields: dict, world_size: int, folder: Path, want: list[list]) -> None:
    """That processes killed and started again read what is wanted."""
    paths = [folder / str(rank) for rank in range(world_size)]
    assert run(fields, paths, KILLED_AFTER) == [-signal.SIGKILL] * world_size
    assert [len(path.read_text().splitlines()) for path in paths] == [KILLED_AFTER] * world_size
    assert run(fields, paths) == [0] * world_size
    assert joined(paths) == want


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("decoder", NAMES)
def test_a_killed_run_reads_what_an_undisturbed_one_reads(
    sources, undisturbed, tmp_path, decoder, source, world_size, workers
):
    check(fields_of(sources, source, decoder, workers), world_size, tmp_path, undisturbed(decoder))


@pytest.mark.parametrize("decoder", NAMES)
def test_so_it_does_with_the_centre_crop_which_halves_some_images(sources, undisturbed, tmp_path, decoder):
    check(fields_of(sources, "tar", decoder, 3, "center"), 2, tmp_path, undisturbed(decoder, "center"))


def test_every_image_comes_once_an_epoch_and_crops_differ(undisturbed):
    for decoder in NAMES:
        samples = [sample for step in undisturbed(decoder) for sample in step]
        assert sorted(index for index, _, _ in samples[:14]) == sorted(index for index, _, _ in samples[14:28])
        assert len({tuple(place) for _, place, _ in samples}) > 10
        assert 5 < sum(mirrored for _, (*_, mirrored), _ in samples) < 31
        again = {index: place for index, place, _ in samples[14:28]}
        assert sum(again[index] != place for index, place, _ in samples[:14]) > 7
    places = [[(index, place) for step in undisturbed(decoder) for index, place, _ in step] for decoder in NAMES]
    assert places[0] == places[1] == places[2]
