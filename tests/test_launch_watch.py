"""Warnings and pictures of a run: each warning once, pictures of the same images in files and in TensorBoard."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.files import WriteError
from launch import pictures
from launch.config import ConfigError, load
from launch.training.build import make_trainer
from launch.training.engine import start_processes
from launch.training.trainer import Trainer
from launch.training.watch import Watch, zero_gradients
from tests import toy
from tests.run_rows import rows
from vavae.config import FoundationConfig
from vavae.foundation import FoundationModel

VIT = {"img_size": 16, "patch_size": 2, "embed_dim": 8, "depth": 1, "num_heads": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Images to train on, five to validate on, and a foundation model."""
    root = tmp_path_factory.mktemp("watch")
    toy.write_images(root / "train", 8, size=16)
    toy.write_images(root / "valid", 5, size=16)
    torch.manual_seed(0)
    config = FoundationConfig(model_name="vit_tiny_patch16_224", model_args=VIT, weights=str(root / "vit.safetensors"))
    FoundationModel.classifier(config, 8, 2).save(root / "vit.safetensors")
    return root


@pytest.fixture
def run_file(tmp_path, data):
    def write(**sections: dict) -> Path:
        settings = {
            "data": {"data_path": str(data / "train"), "valid_path": str(data / "valid"), "decoder": "pil"},
            "train": {"output_dir": str(tmp_path), "max_steps": 2, "valid_every": 1, "valid_batches": 1},
            "deepspeed": {"zero_stage": 0},
            "loss": {},
        }
        merged = {name: values | sections.get(name, {}) for name, values in settings.items()}
        merged["loss"] = toy.VAVAE["loss"] | merged["loss"]
        return toy.write_run(tmp_path / "run.yaml", toy.VAVAE, **merged)

    return write


def loop(path: Path, *overrides: str) -> Trainer:
    return make_trainer(load(path, overrides, kind="vavae")[0], "vavae", start_processes())


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


# Warnings


def test_a_cause_is_told_once_until_it_has_gone():
    watch = Watch(object())
    zero, fine = {"autoencoder/grad_norm": 0.0, "loss": 0.0}, {"autoencoder/grad_norm": 1e-9}
    both = zero | {"discriminator/grad_norm": 0.0}
    told = [watch.new_warnings(row) for row in (fine, zero, zero, both, fine, both)]
    assert list(map(len, told)) == [0, 1, 0, 1, 0, 2]
    assert told[1][0].startswith("the gradient of the autoencoder was exactly 0") and "discriminator" in told[3][0]
    assert zero_gradients({"grad_norm": 0.0}).keys() == {"zero gradient of network"}
    assert not zero_gradients({"grad_norm": None, "loss": 0.0, "d_loss": 0})  # all steps of the row were skipped


def test_a_network_without_a_gradient_is_warned_of(run_file, monkeypatch, caplog):
    """Of the discriminator in steps 3 to 4 and 7 to 8, of which every second has a row."""
    run = loop(run_file(train={"max_steps": 8, "log_every": 2, "valid_every": 8}, loss={"disc_start": 0}))
    whole = run.task.train_step

    def step(networks, batch, draws, number, backward):
        def stopped(name, loss):
            backward(name, 0 * loss if name == "discriminator" and number in (3, 4, 5, 7, 8) else loss)

        return whole(networks, batch, draws, number, stopped)

    monkeypatch.setattr(run.task, "train_step", step)
    caplog.clear()
    run.run()
    found = [text for text in warnings(caplog) if "gradient" in text]
    assert len(found) == 2 and all("of the discriminator was exactly 0 in every step" in text for text in found)


@pytest.mark.parametrize("dead", [0, 1, 4])
def test_dead_channels_are_warned_of_and_logged(tmp_path, run_file, caplog, dead):
    path = run_file(train={"log_every": 2, "max_steps": 4, "valid_every": 4}, loss={"disc_weight": 0.0})
    run = loop(path, "optimizer.lr=1e-12")  # nothing moves
    quant_conv = run.task.networks["autoencoder"].quant_conv
    with torch.no_grad():  # channels first in means, then in log variances; the bias moves no mean
        quant_conv.weight[:4] *= 10
        quant_conv.weight[:dead] = 0
        quant_conv.bias[:] = 3
    caplog.clear()
    run.run()
    said = {0: [], 1: ["1 of 4 channels of the latents are dead"], 4: ["all 4 channels of the latents are dead"]}[dead]
    found = warnings(caplog)
    assert len(found) == len(said) and all(text.startswith(start) for text, start in zip(found, said, strict=True))
    found_rows = rows(tmp_path / "run")
    logged = [row.get("dead_channels", row.get("valid/dead_channels")) for row in found_rows]
    assert logged == [dead / 4] * 3 and all(row.get("latent_std_min", 0) < 1e-3 for row in found_rows if dead)


# Pictures


def shown(path: Path, tile: np.ndarray) -> list[list[int]]:
    """Where the upper left corners of a tile lie in a picture."""
    picture = np.asarray(Image.open(path).convert("RGB"))
    windows = np.lib.stride_tricks.sliding_window_view(picture, tile.shape)[:, :, 0]
    near = np.argwhere((windows[..., ::9, ::9, :] == tile[::9, ::9]).all((-1, -2, -3)))
    return [[y, x] for y, x in near.tolist() if np.array_equal(windows[y, x], tile)]


def test_a_picture_shows_the_same_images_at_every_validation(tmp_path, run_file, data):
    """Three from all over the five, in two micro-batches of two; in a file and in TensorBoard."""
    path = run_file(train={"tensorboard": True, "pictures": 3, "global_batch_size": 2, "micro_batch_size": 2})
    loop(path).run()
    files = sorted((tmp_path / "run/reconstructions").iterdir())
    assert [file.name for file in files] == ["step_0000001.png", "step_0000002.png"]
    assert not (tmp_path / "run/similarities").exists()
    originals = [np.asarray(Image.open(p)).repeat(4, 0).repeat(4, 1) for p in sorted((data / "valid").rglob("*.png"))]
    for file in files:
        places = [shown(file, tile) for tile in originals]
        assert [len(found) for found in places] == [1, 1, 0, 1, 0]
        tops, lefts = zip(*[found[0] for found in places if found], strict=True)
        assert len(set(tops)) == 1 and np.diff(lefts).tolist() == [68, 68]
    below = [np.asarray(Image.open(file))[tops[0] + 68 :] for file in files]
    assert not np.array_equal(*below)  # reconstructions, of other weights
    board = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert board.Tags()["images"] == ["reconstructions"]
    for event, file in zip(board.Images("reconstructions"), files, strict=True):
        assert event.step == int(file.stem[-1]) and event.encoded_image_string == file.read_bytes()
        assert (event.width, event.height) == Image.open(file).size


def test_no_picture_is_drawn_where_none_is_wanted(tmp_path, run_file):
    loop(run_file(train={"pictures": 0})).run()
    assert (tmp_path / "run/metrics.jsonl").exists() and not list((tmp_path / "run").rglob("*.png"))


def test_similarities_are_drawn_on_request(tmp_path, run_file, data):
    """As colours in the place of the image, its middle brightest of all."""
    weights = {"foundation.weights": data / "vit.safetensors", "foundation.model_name": "vit_tiny_patch16_224"}
    vf = [f"{key}={value}" for key, value in weights.items()]
    vf += [f"foundation.model_args={VIT}", "loss.use_vf=true", "train.picture_similarities=true", "train.max_steps=1"]
    loop(run_file(), *vf).run()
    (file,) = (tmp_path / "run/similarities").iterdir()
    first = np.asarray(Image.open(min((data / "valid").rglob("*.png")))).repeat(4, 0).repeat(4, 1)
    ((top, left),) = shown(file, first)
    picture = np.asarray(Image.open(file))
    brightest = colormaps["viridis"](1.0, bytes=True)[:3]
    for row in (1, 2):  # maps of 8 × 8 positions, each of 8 × 8 pixels
        tile = picture[top + 68 * row :, left:][:64, :64]
        assert np.array_equal(tile[32:40, 32:40], np.broadcast_to(brightest, (8, 8, 3)))
        assert np.array_equal(tile, tile[::8, ::8].repeat(8, 0).repeat(8, 1)) and len(np.unique(tile)) > 8


def test_maps_are_coloured_by_their_values(tmp_path):
    maps = torch.tensor([[[-1.0, 0.0], [0.5, 1.0]]])
    images = torch.full((1, 64, 64, 3), 7, dtype=torch.uint8)
    pictures.comparison({"image": images, "map": maps}, tmp_path / "maps.png")
    colours = colormaps["viridis"](np.array([[0.0, 0.5], [0.75, 1.0]]), bytes=True)[..., :3]
    assert len(shown(tmp_path / "maps.png", colours.repeat(32, 0).repeat(32, 1))) == 1


def test_a_picture_that_cannot_be_written_ends_the_run_and_is_named(tmp_path, run_file):
    run = loop(run_file())
    (tmp_path / "run").mkdir()
    (tmp_path / "run/reconstructions").write_text("in the way")
    with pytest.raises(WriteError, match=r"cannot write .*run/reconstructions"):
        run.run()


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ([], "loss.use_vf is false"),
        (["train.pictures=0"], "loss.use_vf is false and train.pictures is 0"),
        (
            ["data.valid_path=null", "train.valid_every=null"],
            "loss.use_vf is false and data.valid_path names no images",
        ),
    ],
)
def test_pictures_that_nothing_would_make_are_refused(run_file, overrides, why):
    with pytest.raises(ConfigError, match=f"train.picture_similarities is true, but {why}$"):
        load(run_file(), ["train.picture_similarities=true", *overrides], kind="vavae")
    for value in ("-1", "257", "many"):
        with pytest.raises(ConfigError, match=r"train\.pictures"):
            load(run_file(), [f"train.pictures={value}"], kind="vavae")
