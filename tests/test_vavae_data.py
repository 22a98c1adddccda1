"""Crops against the recorded ones, the image folder as a pure function of (seed, epoch, index), and broken folders."""

import logging
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from tests.golden import G, J, close
from vavae.config import DataConfig
from vavae.data import ImageFolder, UnreadableImage
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
    shapes = {"b/x.png": (20, 31, 3), "b/deep/y.PNG": (40, 17, 3), "a/2.bmp": (16, 16, 3), "a/10.png": (16, 50, 3),
              "a/grey.png": (24, 24), "a/clear.webp": (33, 18, 4)}
    for name, shape in shapes.items():
        save(tmp_path / name, rng.integers(0, 256, shape))
    (tmp_path / "a/notes.txt").write_text("no image")
    return tmp_path


def everything(data: ImageFolder, epoch: int = 0) -> dict[str, torch.Tensor]:
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
    data = ImageFolder(folder, 16, seed=0)
    assert data.classes == ("a", "b")
    assert data.paths == ("a/10.png", "a/2.bmp", "a/clear.webp", "a/grey.png", "b/deep/y.PNG", "b/x.png")
    assert data.labels.tolist() == [0, 0, 0, 0, 1, 1] and len(data) == 6


@pytest.mark.parametrize("crop", ["random", "center", "published_eval"])
def test_batches_hold_float_squares_and_labels(folder, crop):
    data = ImageFolder(folder, 16, seed=0, crop=crop)
    batch = data.batch(torch.tensor([0, 3, 0]), torch.tensor([5, 0, 3]))
    assert set(batch) == {"image", "y"}
    assert batch["image"].shape == (3, 3, 16, 16) and batch["image"].dtype == torch.float32
    assert batch["image"].min() >= -1 and batch["image"].max() <= 1
    assert batch["y"].tolist() == [1, 0, 0] and batch["y"].dtype == torch.int64


def test_a_sample_depends_on_seed_epoch_and_index_alone(folder):
    data = ImageFolder(folder, 16, seed=0)
    whole = everything(data)["image"]
    assert torch.equal(data.batch(torch.zeros(2, dtype=torch.int64), torch.tensor([4, 0]))["image"], whole[[4, 0]])
    assert torch.equal(everything(pickle.loads(pickle.dumps(data)))["image"], whole)
    assert torch.equal(everything(ImageFolder(folder, 16, seed=0, cache=True))["image"], whole)
    assert not torch.equal(everything(data, epoch=1)["image"], whole)
    assert not torch.equal(everything(ImageFolder(folder, 16, seed=1))["image"], whole)


def test_random_crops_are_cut_from_the_scaled_image_everywhere(tmp_path):
    save(tmp_path / "a/wide.png", np.broadcast_to(np.arange(40, dtype=np.uint8)[None, :, None], (8, 40, 3)))
    data = ImageFolder(tmp_path, 8, seed=0)
    first = [to_uint8(everything(data, epoch)["image"])[0, 0, 0] for epoch in range(600)]
    assert all(torch.equal(row, row[0] + torch.arange(8)) for row in first)  # never mirrored, never scaled again
    counts = torch.bincount(torch.stack(first)[:, 0].long(), minlength=33)
    assert len(counts) == 33 and counts.min() > 0  # 33 places, each expected 18 times


def test_center_crop_of_the_folder_is_adms(folder):
    data = ImageFolder(folder, 16, seed=0, crop="center")
    want = to_float(np.asarray(center_crop(Image.open(folder / "b/x.png").convert("RGB"), 16)))
    assert torch.equal(everything(data, epoch=7)["image"][5], want)


def test_section_of_a_run_makes_the_folder(folder):
    section = DataConfig(data_path=str(folder), image_size=16, crop="center", num_classes=2)
    data = ImageFolder.from_config(section, seed=0)
    assert torch.equal(everything(data)["image"], everything(ImageFolder(folder, 16, seed=5, crop="center"))["image"])


# Broken folders


def break_file(path) -> None:
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize("cache", [False, True])
def test_a_broken_image_is_an_error_that_names_it(folder, cache):
    break_file(folder / "b/deep/y.PNG")
    with pytest.raises(UnreadableImage, match=r"b/deep/y\.PNG"):
        everything(ImageFolder(folder, 16, seed=0, cache=cache))


@pytest.mark.parametrize("cache", [False, True])
def test_a_broken_image_is_skipped_and_counted_where_allowed(folder, caplog, cache):
    whole = everything(ImageFolder(folder, 16, seed=0, crop="center"))["image"]
    break_file(folder / "a/grey.png")
    (folder / "b/x.png").write_text("not an image at all")
    with caplog.at_level(logging.WARNING):
        data = ImageFolder(folder, 16, seed=0, crop="center", on_unreadable="skip", cache=cache)
        batch = everything(data)
        everything(data)
    # The next readable one stands in, with its own label; the last goes round to the first.
    assert torch.equal(batch["image"], whole[[0, 1, 2, 4, 4, 0]])
    assert batch["y"].tolist() == [0, 0, 0, 1, 1, 0]
    assert batch["unreadable"].tolist() == [0, 0, 0, 1, 0, 1]
    assert set(data.unreadable) == {"a/grey.png", "b/x.png"}
    assert sum("grey.png" in message for message in caplog.messages) == 1


def test_a_folder_of_broken_images_is_an_error_even_where_skipping(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.png").write_bytes(b"")
    with pytest.raises(UnreadableImage, match="none of the 1 images"):
        everything(ImageFolder(tmp_path, 16, seed=0, on_unreadable="skip"))


def test_wrong_folders_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"data.num_classes is 3, but .* has 2 class folders: a, b"):
        ImageFolder(folder, 16, seed=0, num_classes=3)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        ImageFolder(tmp_path / "nowhere", 16, seed=0)
    with pytest.raises(ValueError, match="has no sub-folders"):
        ImageFolder(folder / "b/deep", 16, seed=0)
    (folder / "c").mkdir()
    with pytest.raises(ValueError, match="/c holds no images"):
        ImageFolder(folder, 16, seed=0)
