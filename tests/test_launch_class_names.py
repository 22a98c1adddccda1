"""Names of class folders on their way through training and extraction: any text, and nothing that is no text."""

import os
import shutil

import pytest

import kernels
from launch.__main__ import main
from lightningdit.data import LatentDataset
from tests import toy
from vavae.config import AutoencoderConfig, LossConfig
from vavae.task import build_networks
from vavae.weights import write_export

TEXTS = ["class0", "été", "猫", "two words"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    model = AutoencoderConfig(**toy.VAVAE["model"] | {"ch_mult": (1, 1), "attn_resolutions": ()})
    loss = LossConfig(disc_weight=0.0, use_vf=False)
    network = build_networks(model, loss, kernels.select("reference"), 0, None)["autoencoder"]
    path = tmp_path_factory.mktemp("tokenizer") / "vae.safetensors"
    write_export(path, network.state_dict(), model, step=0)
    return path


@pytest.fixture
def arguments(tmp_path, tokenizer):
    """The command line of a program on the images in `tmp_path`; those are of one class."""
    toy.write_images(tmp_path / "images", count=4)
    shutil.rmtree(tmp_path / "images" / "class1")
    config = toy.write_run(
        tmp_path / "run.yaml",
        toy.VAVAE,
        data={"data_path": str(tmp_path / "images")},
        train={"output_dir": str(tmp_path), "max_steps": 1},
    )
    path = str(config)
    return {
        "train": ["train", "vavae", path],
        "dry run": ["train", "vavae", path, "--dry-run"],
        "extract": ["extract", path, f"ckpt_path={tokenizer}", "--output", str(tmp_path / "x"), "--least-psnr", "0"],
    }


def add_class(tmp_path, name: bytes) -> None:
    shutil.copytree(tmp_path / "images" / "class0", tmp_path / "images" / os.fsdecode(name))


@pytest.mark.parametrize("program", ["train", "dry run", "extract"])
@pytest.mark.parametrize("name", [b"cl\xff", b"\xe9t\xe9", b"\xed\xb3\xbf", b"\x1b[2J", b"two\nlines", b"\xc2\x9b2J"])
def test_a_class_folder_whose_name_is_no_text_is_one_sentence(tmp_path, arguments, capsys, program, name):
    add_class(tmp_path, name)
    assert main(arguments[program]) == 2
    error = capsys.readouterr().err
    assert f"error: {tmp_path / 'images'} has a class folder called {os.fsdecode(name)!r}: rename it" in error
    assert error.count("\n") == 2 and not (tmp_path / "run" / "checkpoints").exists()
    assert not list(tmp_path.glob("x/*.safetensors"))


def test_names_in_any_script_travel_into_latents(tmp_path, arguments, capsys):
    for name in TEXTS[1:]:
        add_class(tmp_path, name.encode())
    folder = tmp_path / "images" / "class0"
    os.rename(folder / "0.png", folder / os.fsdecode(b"\xff.png"))  # of an image the name is not kept
    assert main(arguments["extract"]) == 0
    assert LatentDataset(tmp_path / "x").classes == tuple(sorted(TEXTS))
    assert main(arguments["extract"]) == 0, "the same images are known again"
    assert main(["train", "vavae", str(tmp_path / "run.yaml")]) == 0
    os.rename(tmp_path / "images" / "猫", tmp_path / "images" / "犬")
    assert main(arguments["extract"]) == 2
    assert "belongs to another extraction" in capsys.readouterr().err
