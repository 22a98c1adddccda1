"""The embedded data set, its classifier, the stand-in foundation model, and the pictures made of them."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from launch import pictures
from launch.digits_demo import foundation
from launch.digits_demo.classifier import LIMITS, DigitClassifier, failures, reconstruction_report, samples_report
from launch.digits_demo.dataset import CLASSES, Digits, downsample, read, source, upsample, write
from launch.evaluation.features import FoundationFeatures
from vavae.config import FoundationConfig
from vavae.foundation import FoundationModel
from vavae.images import to_float_batch


@pytest.fixture(scope="module")
def splits():
    return source()


@pytest.fixture(scope="module")
def classifier(splits):
    return DigitClassifier(splits["train"], splits["heldout"])


def test_split_is_stratified_fixed_and_complete(splits):
    train, heldout = splits["train"], splits["heldout"]
    assert (len(train), len(heldout)) == (1297, 500)
    assert heldout.labels.bincount().tolist() == [50] * CLASSES
    assert train.labels.bincount().min() >= 124
    every = torch.cat([train.images, heldout.images])[..., 0].flatten(1)
    recorded = upsample(load_digits().images)[..., 0].flatten(1)
    assert sorted(map(bytes, every.numpy())) == sorted(map(bytes, recorded.numpy()))
    assert torch.equal(source()["heldout"].images, heldout.images)


def test_held_out_digits_are_spread_over_the_file():
    """Every stretch of 100 digits of the file gives between a fifth and a third of itself."""
    labels = load_digits().target
    recorded = upsample(load_digits().images)
    held = {bytes(image.numpy()) for image in source()["heldout"].images}
    mine = np.array([bytes(image.numpy()) in held for image in recorded])
    assert all(18 <= mine[i : i + 100].sum() <= 36 for i in range(0, 1700, 100)), labels.shape


def test_upsampling_keeps_flat_areas_range_and_orientation():
    flat = upsample(np.stack([np.full((8, 8), v) for v in (0, 5, 16)]))
    assert [f.unique().tolist() for f in flat] == [[0], [80], [255]]  # 5/16 of 255 is 79.7
    corner = np.zeros((1, 8, 8))
    corner[0, 0, 7] = 16  # top right
    image = upsample(corner)[0, ..., 0]
    assert image[:4, 28:].min() > 100 and image[8:].max() < 16 and image[:, :20].max() < 16
    assert upsample(corner).shape == (1, 32, 32, 3)


def test_downsampling_is_the_block_mean():
    images = torch.randint(0, 256, (3, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    want = images[1, 8:12, 20:24].double().mean() * 16 / 255
    assert downsample(images)[1, 2, 5].item() == pytest.approx(want.item(), rel=1e-12)
    with pytest.raises(ValueError, match=r"uint8 \[N, 32, 32, 3\]"):
        downsample(images.float())
    with pytest.raises(ValueError, match=r"got torch\.uint8"):
        downsample(images[:, :16])


def test_the_round_trip_keeps_the_digits(splits):
    error = downsample(upsample(load_digits().images)).numpy() - load_digits().images
    assert math.sqrt((error**2).mean()) < 1.1  # of 16


def test_write_is_idempotent_and_repairs(tmp_path, splits):
    folders = write(tmp_path)
    assert folders.train == tmp_path / "train" and folders.heldout == tmp_path / "heldout"
    train = read(folders.train)
    assert len(train) == 1297 and len(read(folders.heldout)) == 500
    assert torch.equal(train.labels.bincount(), splits["train"].labels.bincount())
    first = folders.train / "0" / "0000.png"
    assert np.array_equal(np.asarray(Image.open(first)), splits["train"].images[0].numpy())

    made = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert write(tmp_path) == folders
    assert made == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}  # nothing was touched

    content = first.read_bytes()
    first.write_bytes(content[:-20])
    write(tmp_path)
    assert first.read_bytes() == content
    (folders.heldout / "7").rename(tmp_path / "gone")
    write(tmp_path)
    assert len(read(folders.heldout)) == 500

    (tmp_path / "manifest.json").write_text("{")  # cut off while it was written
    write(tmp_path)
    assert len(json.loads((tmp_path / "manifest.json").read_text())["sha256"]) == 1797

    (folders.train / "3" / "cat.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"not of the digits set, e.g. train/3/cat.jpg"):
        write(tmp_path)
    with pytest.raises(ValueError, match="no digits under"):
        read(tmp_path / "nothing")


def features(images):
    """Projections of the 8×8 counts: smooth in the image, more samples than dimensions."""
    weight = torch.randn(64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return downsample(images).flatten(1) @ weight / 64


def report(classifier, splits, samples, labels):
    return samples_report(classifier, samples, labels, splits["train"], splits["heldout"], features)


def test_the_classifier_passes_good_digits(classifier, splits):
    assert classifier.accuracy >= 0.97
    heldout = splits["heldout"]
    good = report(classifier, splits, heldout.images, heldout.labels)
    assert good["recognised"] == pytest.approx(classifier.accuracy) and good["samples"] == 500
    assert good["recognised_worst_class"] == min(good["recognised_per_class"]) > 0.9
    assert good["nearest_ratio"] == 1.0
    assert good["frechet_ratio"] == pytest.approx(0, abs=1e-9) and good["frechet_distance_of_training_digits"] > 0


def test_the_classifier_fails_what_it_must(classifier, splits):
    train, heldout = splits["train"], splits["heldout"]
    copies = train.balanced(50)
    memorised = report(classifier, splits, train.images[copies], train.labels[copies])
    assert memorised["nearest_ratio"] == 0 and 0.5 < memorised["frechet_ratio"] < 1.5
    wrong = report(classifier, splits, heldout.images, (heldout.labels + 1) % 10)
    assert wrong["recognised"] < 0.05
    one_bad_class = report(
        classifier, splits, heldout.images.where((heldout.labels != 4)[:, None, None, None], 0), heldout.labels
    )
    assert one_bad_class["recognised_worst_class"] == one_bad_class["recognised_per_class"][4] == 0
    assert one_bad_class["recognised"] > 0.85 and one_bad_class["frechet_ratio"] > 2
    noise = torch.randint(0, 256, heldout.images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert report(classifier, splits, noise, heldout.labels)["frechet_ratio"] > 10
    with pytest.raises(ValueError, match=r"none of class \[9\]"):
        report(classifier, splits, heldout.images[:, :][heldout.labels < 9], heldout.labels[heldout.labels < 9])


def test_a_classifier_that_cannot_read_is_refused(splits):
    train, heldout = splits["train"], splits["heldout"]
    with pytest.raises(RuntimeError, match="the classifier recognises"):
        DigitClassifier(Digits(train.images, train.labels.roll(1)), heldout)


def test_reconstruction_report(classifier, splits):
    heldout = splits["heldout"]
    shifted = (heldout.images.int() + torch.where(heldout.images > 127, -4, 4)).to(torch.uint8)
    got = reconstruction_report(classifier, heldout, shifted)
    assert got["reconstruction_psnr"] == pytest.approx(20 * math.log10(255 / 4), rel=1e-9)
    assert got["reconstruction_recognised"] > 0.97


def test_limits():
    fine = {limit.key: limit.least if limit.least is not None else limit.most for limit in LIMITS}
    assert failures(fine) == []
    for limit in LIMITS:
        worse = {**fine, limit.key: fine[limit.key] + (-0.01 if limit.least is not None else 0.01)}
        (sentence,) = failures(worse)
        assert limit.meaning in sentence
        assert failures({**fine, limit.key: math.nan}) and failures({k: v for k, v in fine.items() if k != limit.key})
    assert {k: fine[k] for k in ("reconstruction_psnr", "reconstruction_recognised", "recognised")} == {
        "reconstruction_psnr": 32,
        "reconstruction_recognised": 0.96,
        "recognised": 0.9,
    }


SMALL = FoundationConfig(
    model_name="vit_tiny_patch16_224",
    normalization="published",
    model_args={**foundation.MODEL.model_args, "embed_dim": 32, "depth": 2, "num_heads": 2},
)


def test_foundation_training_learns_repeats_and_loads(tmp_path, splits, monkeypatch):
    monkeypatch.setattr(foundation, "MODEL", SMALL)
    monkeypatch.setattr(foundation, "MIN_ACCURACY", 0.5)
    train, heldout = splits["train"], splits["heldout"]
    state = torch.random.get_rng_state()
    config, accuracy = foundation.train_foundation(tmp_path / "a.safetensors", train, heldout, seed=3, steps=120)
    assert torch.equal(state, torch.random.get_rng_state())  # the caller's generator is left alone
    assert accuracy > 0.5
    torch.manual_seed(99)
    again, _ = foundation.train_foundation(tmp_path / "b.safetensors", train, heldout, seed=3, steps=120)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()

    model = FoundationModel.from_config(config, foundation.GRID)  # strict: every weight is there
    got = FoundationFeatures.from_file(tmp_path / "a.safetensors").pooled(heldout.images[:20])
    assert torch.equal(got, FoundationFeatures(model).pooled(heldout.images[:20]))
    assert got.shape == (20, 32) and got.dtype == torch.float32
    assert not any(p.requires_grad for p in model.parameters())
    facts = json.loads((tmp_path / "b.json").read_text())
    assert facts["config"] == again.model_dump(mode="json") and facts["heldout_accuracy"] == accuracy

    monkeypatch.setattr(foundation, "MIN_ACCURACY", 0.95)
    with pytest.raises(RuntimeError, match="stand-in foundation model knows"):
        foundation.train_foundation(tmp_path / "c.safetensors", train, heldout, seed=4, steps=1)
    assert not (tmp_path / "c.safetensors").exists()


def test_foundation_features_are_what_the_head_reads(splits):
    torch.manual_seed(0)
    model = FoundationModel.classifier(SMALL, foundation.GRID, CLASSES).eval()
    images = splits["heldout"].images[:5]
    pooled = FoundationFeatures(model).pooled(images)
    torch.testing.assert_close(model.vit.head(pooled), model.logits(to_float_batch(images)))


def test_augmentation_moves_and_scales_a_little(splits):
    images = to_float_batch(splits["train"].images[:64])
    draw = lambda seed: foundation.augment(images, torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert draw(0).min() >= -1 and draw(0).max() <= 1
    black = foundation.augment(torch.full_like(images, -1), torch.Generator().manual_seed(0))
    assert torch.equal(black, torch.full_like(images, -1))  # what comes in from outside is black, too
    ramp = ((torch.arange(32) + 0.5) / 16 - 1).expand(256, 3, 32, 32)  # where each pixel comes from, read off a ramp
    moved = foundation.augment(ramp + 0, torch.Generator().manual_seed(0))[:, 0, 16, 8:24] - ramp[0, 0, 16, 8:24]
    assert 0.08 < moved.abs().max() <= 0.1 + 0.5 * 0.1 + 1e-5


def test_sample_grid(tmp_path, splits):
    heldout = splits["heldout"]
    pictures.sample_grid(heldout.images, heldout.labels, tmp_path / "new" / "grid.png", columns=3)
    grid = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    tile = np.asarray(Image.fromarray(heldout.images[heldout.labels == 7][2].numpy()).resize((64, 64), 0))
    ((y, x),) = np.argwhere(_windows_equal(grid, tile))
    assert (y, x) == (8 + 7 * 68, grid.shape[1] - 8 - 64)
    tile = np.asarray(Image.fromarray(heldout.images[heldout.labels == 7][0].numpy()).resize((64, 64), 0))
    assert np.argwhere(_windows_equal(grid, tile)).tolist() == [[y, x - 2 * 68]]
    pictures.sample_grid(heldout.images, heldout.labels, tmp_path / "named.png", columns=3, names=["a long name"])
    assert Image.open(tmp_path / "named.png").width > grid.shape[1]


def test_reconstruction_pairs(tmp_path, splits):
    images = splits["heldout"].images[:7]
    pictures.reconstruction_pairs(images, 255 - images, tmp_path / "pairs.png", columns=4, rows=2)
    picture = np.asarray(Image.open(tmp_path / "pairs.png"))
    tile = np.asarray(Image.fromarray(images[5].numpy()).resize((64, 64), 0))
    (above,), (below,) = np.argwhere(_windows_equal(picture, tile)), np.argwhere(_windows_equal(picture, 255 - tile))
    assert below[1] == above[1] and below[0] == above[0] + 68
    with pytest.raises(ValueError, match="differ"):
        pictures.reconstruction_pairs(images, images[:, :16], tmp_path / "x.png")
    with pytest.raises(ValueError, match="7 images do not go with 3"):
        pictures.sample_grid(images, torch.arange(3), tmp_path / "x.png")
    with pytest.raises(ValueError, match="uint8"):
        pictures.sample_grid(images.float(), torch.arange(7), tmp_path / "x.png")


def _windows_equal(picture, tile):
    """Where the top left corner of `tile` sits in `picture`."""
    windows = np.lib.stride_tricks.sliding_window_view(picture, tile.shape)[:, :, 0]
    candidates = (windows[..., ::9, ::9, :] == tile[::9, ::9]).all((-1, -2, -3))
    for y, x in np.argwhere(candidates):
        candidates[y, x] = np.array_equal(picture[y : y + tile.shape[0], x : x + tile.shape[1]], tile)
    return candidates


def test_metrics_log_and_loss_curves(tmp_path):
    log = tmp_path / "metrics.jsonl"
    rows = [{"step": s, "loss": 2.0 / s, "note": "x", "flag": True, "gap": None} for s in range(10, 200, 10)]
    log.write_text("\n".join(map(json.dumps, [{"event": "start", "loss": 9}, *rows])) + '\n{"step": 200, "lo')
    series = pictures.read_metrics(log)
    assert list(series) == ["loss"]
    steps, values = series["loss"]
    assert steps.tolist() == list(range(10, 200, 10)) and values[0] == 0.2
    pictures.loss_curves({"a": series, "b": {"x": (steps, values * np.nan)}}, tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size == (1248, 432)
    first = (tmp_path / "loss.png").read_bytes()
    pictures.loss_curves({"a": series, "b": {"x": (steps, values * np.nan)}}, tmp_path / "loss.png")
    assert first == (tmp_path / "loss.png").read_bytes()
    log.write_text('{"step": 1, "loss": 1}\n{"step\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        pictures.read_metrics(log)
    with pytest.raises(ValueError, match="no curves"):
        pictures.loss_curves({}, tmp_path / "none.png")


def test_running_median_is_as_wide_on_a_logarithmic_axis():
    steps = np.array([1.0, 2.0, 10.0, 11.0, 12.0, 100.0, 110.0])
    values = np.array([1.0, np.nan, 3.0, 9.0, 5.0, 7.0, np.inf])
    got = pictures.running_median(steps, values)
    assert got[0] == 1 and np.isnan(got[1])
    assert got[2:].tolist() == [5, 5, 5, 7, 7]
