"""Crops against the recorded ones, the image folder as a pure function of (seed, epoch, index), and broken folders."""

import logging
import multiprocessing
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import _functional_tensor
from torchvision.transforms import functional as TF

from tests.golden import G, J, close
from vavae.config import DataConfig
from vavae.data import ImageDataset
from vavae.image_files import UnreadableImage
from vavae.images import center_crop, psnr, published_eval_crop, resize_short_side, to_float, to_uint8


@pytest.fixture(scope="module")
def golden() -> G:
    return G("04_vae_image_io")


def save(path, pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes, sub-folders inside one of them, several sizes and kinds; 6 images."""
    rng = np.random.default_rng(0)
    shapes = {
        "b/x.png": (20, 31, 3),
        "b/deep/y.PNG": (40, 17, 3),
        "a/2.bmp": (16, 16, 3),
        "a/10.png": (16, 50, 3),
        "a/grey.png": (24, 24),
        "a/clear.webp": (33, 18, 4),
    }
    for name, shape in shapes.items():
        save(tmp_path / name, rng.integers(0, 256, shape))
    (tmp_path / "a/notes.txt").write_text("no image")
    return tmp_path


def opened(folder, size: int, *, seed: int, **fields) -> ImageDataset:
    section = {"decoder": "pil", "max_unreadable": 1.0} | fields
    return ImageDataset(DataConfig(data_path=str(folder), image_size=size, **section), seed)


def paths_of(data: ImageDataset) -> tuple[str, ...]:
    return tuple(data.source.entry(index).rpartition(" ")[0] for index in range(len(data)))


def everything(data: ImageDataset, epoch: int = 0) -> dict[str, torch.Tensor]:
    return data.batch(torch.full((len(data),), epoch), torch.arange(len(data)))


# Pixels


@pytest.mark.parametrize("number", range(6))
def test_crops_match_the_recorded(golden, number):
    image = Image.fromarray(golden[f"crop/{number}/img"].numpy())
    pixels = np.asarray(center_crop(image, 32))
    assert np.array_equal(pixels, golden[f"crop/{number}/out32"].numpy())
    assert torch.equal(to_float(pixels), golden[f"crop/{number}/tensor"])
    assert torch.equal(to_float(pixels).flip(-1), golden[f"crop/{number}/tensor_flip"])
    close("evaluation crop", published_eval_crop(image, 32), golden[f"evalcrop/{number}/tensor"], atol=1e-6)


def test_uint8_rule_matches_the_recorded_and_loses_nothing(golden):
    assert torch.equal(to_uint8(golden["to_uint8/x"]), golden["to_uint8/y"])
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3)
    assert torch.equal(to_uint8(to_float(levels)), torch.from_numpy(levels).permute(2, 0, 1))
    assert torch.equal(golden["roundtrip/u_back"], golden["roundtrip/u"])


def test_psnr_matches_the_recorded(golden):
    x, y = (golden[f"crop/{i}/out32"].permute(2, 0, 1)[None] for i in (0, 1))
    assert psnr(x, y).item() == pytest.approx(J("04_vae_image_io")["psnr_example"]["value"], rel=1e-6)
    assert psnr(x, x).item() == float("inf")


@pytest.mark.parametrize("size", [(50, 41), (33, 100), (16, 16), (17, 16), (9, 40)])
def test_short_side_is_scaled_as_torchvision_does(size):
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert np.array_equal(np.asarray(resize_short_side(image, 16)), np.asarray(TF.resize(image, 16)))


# The folder


def test_classes_are_sorted_folders_and_paths_are_sorted(folder):
    data = opened(folder, 16, seed=0)
    assert data.classes == ("a", "b")
    assert paths_of(data) == ("a/10.png", "a/2.bmp", "a/clear.webp", "a/grey.png", "b/deep/y.PNG", "b/x.png")
    assert data.labels.tolist() == [0, 0, 0, 0, 1, 1] and len(data) == 6


@pytest.mark.parametrize("crop", ["random", "center", "published_eval"])
def test_batches_hold_float_squares_and_labels(folder, crop):
    data = opened(folder, 16, seed=0, crop=crop)
    batch = data.batch(torch.tensor([0, 3, 0]), torch.tensor([5, 0, 3]))
    assert set(batch) == {"image", "y"}
    assert batch["image"].shape == (3, 3, 16, 16) and batch["image"].dtype == torch.float32
    assert batch["image"].min() >= -1 and batch["image"].max() <= 1
    assert batch["y"].tolist() == [1, 0, 0] and batch["y"].dtype == torch.int64


def test_a_sample_depends_on_seed_epoch_and_index_alone(folder):
    data = opened(folder, 16, seed=0)
    whole = everything(data)["image"]
    assert torch.equal(data.batch(torch.zeros(2, dtype=torch.int64), torch.tensor([4, 0]))["image"], whole[[4, 0]])
    assert torch.equal(everything(pickle.loads(pickle.dumps(data)))["image"], whole)
    assert torch.equal(everything(opened(folder, 16, seed=0, cache=True))["image"], whole)
    assert not torch.equal(everything(data, epoch=1)["image"], whole)
    assert not torch.equal(everything(opened(folder, 16, seed=1))["image"], whole)


@pytest.mark.parametrize("long_side", ["columns", "rows"])
def test_random_crops_are_cut_from_the_scaled_image_everywhere(tmp_path, long_side):
    ramp = np.arange(40, dtype=np.uint8)
    pixels = np.broadcast_to(
        ramp[None, :, None] if long_side == "columns" else ramp[:, None, None],
        (8, 40, 3) if long_side == "columns" else (40, 8, 3),
    )
    save(tmp_path / "a/long.png", pixels)
    data = opened(tmp_path, 8, seed=0)
    crops = torch.stack([to_uint8(everything(data, epoch)["image"])[0, 0] for epoch in range(1000)]).long()
    along = crops if long_side == "columns" else crops.transpose(1, 2)
    first = along[:, :1, :1]
    assert torch.equal(along, (first + torch.arange(8)).expand_as(along))  # never mirrored, never scaled again
    counts = torch.bincount(first.flatten(), minlength=33)
    expected = 1000 / 33  # 0 to 32, the last included, each as often
    assert len(counts) == 33 and counts.min() > 0 and ((counts - expected) ** 2 / expected).sum() < 62  # 0.1 %


@pytest.mark.parametrize("size", [(2000, 1), (1, 2000), (3, 401)])
@pytest.mark.parametrize("crop", ["random", "center", "published_eval"])
def test_a_thin_image_takes_memory_by_its_crop_not_by_its_length(tmp_path, monkeypatch, crop, size):
    made = []
    resize, interpolate = Image.Image.resize, _functional_tensor.interpolate
    monkeypatch.setattr(Image.Image, "resize", lambda image, to, *args: made.append(to) or resize(image, to, *args))
    monkeypatch.setattr(
        _functional_tensor,
        "interpolate",
        lambda x, size, **options: made.append(size) or interpolate(x, size, **options),
    )
    ramp = np.linspace(0, 255, max(size), dtype=np.uint8)
    pixels = np.empty((size[1], size[0], 3), np.uint8)
    pixels[:] = ramp[None, :, None] if size[0] > size[1] else ramp[:, None, None]
    save(tmp_path / "a/thin.png", pixels)
    image = everything(opened(tmp_path, 64, seed=0, crop=crop))["image"]
    assert image.shape == (1, 3, 64, 64) and made and all(max(to) <= 32 * 64 for to in made)
    assert abs(to_uint8(image).float().mean() - 127) < 15  # of the middle


@pytest.mark.parametrize("size", [(96, 3), (3, 95)])
def test_only_what_is_beyond_the_limit_is_cut(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(resize_short_side(image, 8)), np.asarray(TF.resize(image, 8)))
    assert resize_short_side(image.resize((200, 3)), 8).size == (256, 8)


def test_center_crop_of_the_folder_is_adms(folder):
    data = opened(folder, 16, seed=0, crop="center")
    want = to_float(np.asarray(center_crop(Image.open(folder / "b/x.png").convert("RGB"), 16)))
    assert torch.equal(everything(data, epoch=7)["image"][5], want)


def test_section_of_a_run_makes_the_folder(folder):
    section = DataConfig(data_path=str(folder), image_size=16, crop="center", num_classes=2)
    data = ImageDataset(section, seed=0)
    assert torch.equal(everything(data)["image"], everything(opened(folder, 16, seed=5, crop="center"))["image"])


@pytest.mark.parametrize("crop", ["random", "published_eval"])
def test_half_of_the_images_are_mirrored_where_asked(folder, crop):
    plain, mirrored = (opened(folder, 16, seed=0, crop=crop, flip=flip) for flip in (False, True))
    flips = torch.zeros(len(plain))
    for epoch in range(40):
        x, y = everything(plain, epoch)["image"], everything(mirrored, epoch)["image"]
        same, turned = ((x == z).flatten(1).all(1) for z in (y, y.flip(-1)))
        assert (same ^ turned).all()
        flips += turned
        assert torch.equal(everything(mirrored, epoch)["image"], y)
    assert abs(flips.sum() - 120) < 40  # of 240: five standard deviations
    assert flips.min() > 0 and flips.max() < 40


def test_images_that_pillow_decodes_for_another_are_counted(folder):
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(folder / "b/z.jpg")
    batch = everything(opened(folder, 16, seed=0, decoder="torchvision", crop="center", num_workers=2))
    assert batch["by_pillow"].tolist() == [1, 1, 1, 1, 1, 1, 0]
    want = everything(opened(folder, 16, seed=0, crop="center"))
    assert "by_pillow" not in want and torch.equal(batch["image"], want["image"])


# Broken folders


def break_file(path) -> None:
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize("cache", [False, True])
def test_a_broken_image_is_an_error_that_names_it(folder, cache):
    break_file(folder / "b/deep/y.PNG")
    with pytest.raises(UnreadableImage, match=r"b/deep/y\.PNG"):
        everything(opened(folder, 16, seed=0, cache=cache))


@pytest.mark.parametrize("cache", [False, True])
def test_a_broken_image_is_skipped_and_counted_where_allowed(folder, caplog, cache):
    whole = everything(opened(folder, 16, seed=0, crop="center"))["image"]
    break_file(folder / "a/grey.png")
    (folder / "b/x.png").write_text("not an image at all")
    with caplog.at_level(logging.WARNING):
        data = opened(folder, 16, seed=0, crop="center", on_unreadable="skip", cache=cache)
        batch = everything(data)
        everything(data)
    # The next readable one stands in, with its own label; the last goes round to the first.
    assert torch.equal(batch["image"], whole[[0, 1, 2, 4, 4, 0]])
    assert batch["y"].tolist() == [0, 0, 0, 1, 1, 0]
    assert batch["unreadable"].tolist() == [0, 0, 0, 1, 0, 1]
    assert [paths_of(data)[index] for index in data.unreadable.indices] == ["a/grey.png", "b/x.png"]
    assert sum("grey.png" in message for message in caplog.messages) == 1


def test_more_than_a_share_of_broken_images_stops(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for number in range(40):
        save(tmp_path / f"a/{number:02}.png", rng.integers(0, 256, (16, 16, 3)))
    for number in (3, 20, 21):
        break_file(tmp_path / f"a/{number:02}.png")
    everything(opened(tmp_path, 16, seed=0, on_unreadable="skip", max_unreadable=3 / 40))
    data = opened(tmp_path, 16, seed=0, on_unreadable="skip", max_unreadable=2 / 40)
    words = r"3 of the 22 images read so far of .* are unreadable, more than data.max_unreadable 0.05 allows; the last"
    with pytest.raises(UnreadableImage, match=words + r" one: cannot read image .*a/21\.png"):
        for index in range(40):  # one after another, as loader processes come to them
            data.batch(torch.zeros(1, dtype=torch.int64), torch.tensor([index]))
    # Of a large set the first few say nothing of the whole.
    monkeypatch.setattr("vavae.unreadable.LEAST_READ", 10)
    data = opened(tmp_path, 16, seed=0, on_unreadable="skip", max_unreadable=0.2)
    data.batch(torch.zeros(5, dtype=torch.int64), torch.arange(5))
    with pytest.raises(UnreadableImage, match="3 of the 7 images"):
        data.batch(torch.zeros(1, dtype=torch.int64), torch.tensor([20]))


def test_loader_processes_know_of_what_others_found_broken(folder):
    break_file(folder / "a/grey.png")
    data = opened(folder, 16, seed=0, on_unreadable="skip")
    child = multiprocessing.get_context("fork").Process(target=everything, args=(data,))
    child.start()
    child.join()
    assert child.exitcode == 0 and data.unreadable.indices == [3]


def test_a_folder_of_broken_images_is_an_error_even_where_skipping(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.png").write_bytes(b"broken")
    with pytest.raises(UnreadableImage, match="none of the 1 images"):
        everything(opened(tmp_path, 16, seed=0, on_unreadable="skip"))


def test_what_a_copy_left_empty_is_refused_at_the_start_or_left_out(folder):
    for name in ("b/x.png", "a/2.bmp"):
        (folder / name).write_bytes(b"")
    with pytest.raises(UnreadableImage, match=r"2 image files are empty below .*: a/2\.bmp, b/x\.png"):
        opened(folder, 16, seed=0)
    assert opened(folder, 16, seed=0, on_unreadable="skip").source.paths == (
        "a/10.png",
        "a/clear.webp",
        "a/grey.png",
        "b/deep/y.PNG",
    )


def said(folder, caplog, **options) -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO, "vavae"):
        opened(folder, 16, seed=0, **options)
    record, _ = caplog.records  # and what decodes them
    assert record.levelno == logging.INFO  # the main process says it, once
    return record.getMessage()


def test_what_was_found_and_left_out_is_said_in_one_line(folder, caplog):
    save(folder / ".ipynb_checkpoints/x-checkpoint.png", np.zeros((16, 16, 3)))
    (folder / "b/z.gif").write_bytes(b"GIF89a")
    (folder / "LICENSE").write_text("free")
    assert said(folder, caplog) == (
        f"{folder}: 6 images in 2 classes (a, b); left out: 1 × .gif (b/z.gif), 1 × .txt (a/notes.txt), "
        "1 × beside the class folders (LICENSE), 1 × hidden (.ipynb_checkpoints)"
    )


@pytest.mark.parametrize(
    ("paths", "want"),
    [
        (
            ["night/a/1.png", "day/a/1.png"],
            r"2 images in 2 classes \(day, night\); .*lie deeper \(day/a/1.png\): "
            r"is data.data_path one level too high\?",
        ),
        (["night/a/1.png", "day/1.png"], r"2 images in 2 classes \(day, night\)$"),
        (
            [f"{c}/1.png" for c in range(12)],
            r"12 classes \(0, 1, 10, …\); classes are sorted as text, so label 2 is class '10'$",
        ),
        ([f"{c}/1.png" for c in range(10)], r"10 classes \(0, 1, 2, …\)$"),
        (["000/1.png", "009/1.png", "010/1.png", "100/1.png"], r"4 classes \(000, 009, 010, …\)$"),
        (["1/1.png", "2/1.png", "10x/1.png"], r"3 classes \(1, 10x, 2\)$"),
    ],
)
def test_folders_that_are_perhaps_not_what_was_meant_are_said(tmp_path, caplog, paths, want):
    for path in paths:
        save(tmp_path / path, np.zeros((16, 16, 3)))
    assert re.search(want, said(tmp_path, caplog))


def test_images_behind_links_are_read_and_said(folder, caplog):
    (folder / "b/again.png").symlink_to(folder / "b/x.png")
    assert said(folder, caplog).startswith(f"{folder}: 7 images in 2 classes (a, b), 1 of them links; left out")


def test_wrong_folders_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"data.num_classes is 3, but .* has 2 class folders: a, b"):
        opened(folder, 16, seed=0, num_classes=3)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        opened(tmp_path / "nowhere", 16, seed=0)
    with pytest.raises(ValueError, match=r"has no sub-folders.*left out: 1 × beside the class folders \(y\.PNG\)"):
        opened(folder / "b/deep", 16, seed=0)
    (folder / "c").mkdir()
    (folder / "c/1.gif").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"/c holds no images .*1 × \.gif \(c/1\.gif\)"):
        opened(folder, 16, seed=0)
