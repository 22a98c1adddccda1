"""What lies between a batch and a file: the background thread, parts, outputs, and the second stream of a GPU."""

import threading
import tracemalloc

import numpy as np
import pytest

from common.files import FileError
from launch import sample
from launch.config import LightningDiTRun
from launch.sampling.background import InBackground
from launch.sampling.image_folder import ImageFolder
from launch.sampling.outputs import FolderOutput, NpzOutput
from launch.sampling.parts import Parts
from tests.tiny_weights import document, write_weights

NONE = np.zeros(0, np.int64)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"))


def test_work_in_the_background_is_in_order_and_at_most_so_far_behind():
    done, go = [], threading.Semaphore(0)

    def work(item):
        go.acquire()
        done.append((item, threading.current_thread() is threading.main_thread()))

    with InBackground(work, depth=2) as background:
        for item in range(3):  # one is worked on, two wait: a fourth would block
            background.put(item)
        ahead = threading.Thread(target=background.put, args=(3,))
        ahead.start()
        ahead.join(0.05)
        assert ahead.is_alive() and not done
        for _ in range(4):
            go.release()
        ahead.join()
    assert done == [(item, False) for item in range(4)]


def test_an_error_in_the_background_is_raised_and_nothing_is_done_after_it():
    done, failed = [], threading.Event()

    def work(item):
        if item == 1:
            failed.set()
            raise ValueError("item 1")
        done.append(item)

    with pytest.raises(ValueError, match="item 1"), InBackground(work) as background:
        for item in range(100):
            background.put(item)
        failed.wait()
    assert done == [0]
    with pytest.raises(KeyError), InBackground(done.append):
        raise KeyError  # of the loop: it is not held up


def part(start: int, stop: int, size: int = 64) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(start)
    count = np.full(stop - start, 3)
    return {"images": generator.integers(0, 256, (stop - start, size, size, 3), np.uint8), "nfe": count}


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    """An npz of 40 parts is joined in the memory of a few."""
    parts, labels = Parts(tmp_path), np.zeros(320, np.int64)
    parts.begin()
    for start in range(0, 320, 8):
        parts.write((start, start + 8), part(start, start + 8))
    tracemalloc.start()
    found = NpzOutput(tmp_path, labels).gather(parts.read_all(320, "images", ("nfe",)), np.arange(3))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    one = 8 * 64 * 64 * 3
    assert peak < 10 * one and found.totals == {"nfe": 960} and len(found.images) == 3
    with np.load(tmp_path / "samples.npz") as content:
        assert np.array_equal(content["arr_0"][312:], part(312, 320)["images"]) and content["arr_0"].shape[0] == 320


def test_parts_with_a_gap_are_no_set(tmp_path):
    parts = Parts(tmp_path)
    parts.begin()
    for rows in ((0, 4), (5, 8)):
        parts.write(rows, part(*rows))
    with pytest.raises(FileError, match="holds the first 4 samples without a gap, where 8 are wanted"):
        list(parts.read_all(8, "images", ()))
    (parts.directory / ".0000004-0000005.npz.tmp").write_bytes(b"half")
    assert parts.begin() == [(0, 4), (5, 8)] and len(list(parts.directory.iterdir())) == 2


@pytest.mark.parametrize("format", ["png", "webp"])
@pytest.mark.parametrize("by_class", [False, True])
def test_files_hold_the_pixels_and_one_too_few_or_too_many_is_said(tmp_path, format, by_class):
    labels = np.array([2, 0, 11])
    folder = ImageFolder(tmp_path, format, labels, 12, by_class)
    folder.begin()
    images = part(0, 3, 16)["images"]
    assert FolderOutput(folder).keep((0, 3), {"images": images, "nfe": NONE}).keys() == {"nfe"}
    assert np.array_equal(folder.read([0, 1, 2]), images) and folder.entry()["files"] == 3
    assert folder.path(2).relative_to(tmp_path / "images").parts[:-1] == (("11",) if by_class else ())
    spare = folder.directory / f"spare.{format}"
    spare.write_bytes(folder.path(0).read_bytes())
    with pytest.raises(FileError, match=r"holds 4 images where 3 are promised; spare.* are too many"):
        folder.entry()
    spare.unlink()
    folder.path(1).unlink()
    assert not folder.holds((0, 3)) and folder.holds((2, 3))
    with pytest.raises(FileError, match=r"holds 2 images where 3 are promised; .*00000001.* are missing"):
        folder.entry()


@pytest.mark.parametrize("kind", ["published.pt", "run"])
def test_a_truncated_checkpoint_is_named(weights, tmp_path, kind):
    content = document(weights)
    spoilt = tmp_path / kind
    if kind == "run":
        original = next((weights / "run" / "checkpoints").glob("step_*"))
        spoilt = tmp_path / "run" / "checkpoints" / original.name
        spoilt.mkdir(parents=True)
        for file in original.iterdir():
            (spoilt / file.name).write_bytes(file.read_bytes()[: None if "ema" not in file.name else -100])
    else:
        spoilt.write_bytes((weights / kind).read_bytes()[:-1000])
        content["data"]["latent_norm"] = False
    run = LightningDiTRun.model_validate(content | {"ckpt_path": str(spoilt)})
    with pytest.raises(ValueError, match=rf"{tmp_path}.*(cut short|truncated|damaged)"):
        sample.generate(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
