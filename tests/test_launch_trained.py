"""Files that come with trained weights fit the network, or `sample` and `export` refuse them in one sentence."""

import json

import pytest
import torch
import yaml

from common.files import FileError
from common.tensors import WeightsError
from launch.__main__ import main
from launch.config import LightningDiTRun
from launch.trained import diffusion_weights, from_checkpoint
from launch.training.checkpoint_search import find_checkpoint
from lightningdit.weights import save_export
from tests import toy
from tests.tiny_weights import document, write_weights

CLASSES = ["cat", "dog", "été"]


def statistics(channels: int) -> dict:
    return {"mean": [0.0] * channels, "std": [1.0] * channels, "multiplier": 1.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Of a network of 4 channels: a published .pt, an export, a run; a tokenizer; and the run file."""
    root = write_weights(tmp_path_factory.mktemp("trained"))
    (root / "run.yaml").write_text(yaml.safe_dump(document(root, fid_num=2)))
    save_export(root / "export", from_checkpoint(find_checkpoint(root / "run")))
    return root


def run_with(root, ckpt_path) -> LightningDiTRun:
    return LightningDiTRun.model_validate(document(root) | {"ckpt_path": str(ckpt_path)})


def write_statistics(root, channels: int):
    (root / "latents").mkdir(exist_ok=True)
    tensors = {key: torch.ones(1, channels, 1, 1) for key in ("mean", "std")}
    torch.save(tensors, root / "latents" / "latents_stats.pt")
    return root / "latents" / "latents_stats.pt"


def change_export(root, **entries):
    path = root / "changed.json"
    (root / "changed.safetensors").write_bytes((root / "export.safetensors").read_bytes())
    content = {key: value for key, value in json.loads((root / "export.json").read_text()).items() if key != "checksum"}
    path.write_text(json.dumps(content | entries))
    return path


def change_task(root, **entries):
    path = find_checkpoint(root / "run").path
    state = json.loads((path / "state.json").read_text())
    toy.rewrite_state(path, state | {"task": {"latents": statistics(4), "classes": CLASSES} | entries})
    return path / "state.json"


@pytest.mark.parametrize("source", ["published.pt", "export", "run"])
def test_statistics_of_the_networks_channels_are_taken(trained, source):
    write_statistics(trained, 4), change_task(trained)
    found = diffusion_weights(run_with(trained, trained / source))
    assert found.latents.mean.shape == found.latents.std.shape == (4,)
    assert found.extra.get("classes") == (None if source == "published.pt" else CLASSES)


SOURCES = {
    "published.pt": lambda root, channels: write_statistics(root, channels),
    "changed.safetensors": lambda root, channels: change_export(root, latents=statistics(channels)),
    "run": lambda root, channels: change_task(root, latents=statistics(channels)),
}


@pytest.mark.parametrize("channels", [1, 3, 8])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("program", ["sample", "export"])
def test_statistics_of_other_channels_than_the_networks_are_one_sentence(
    trained, tmp_path, capsys, program, source, channels
):
    named, config, path = SOURCES[source](trained, channels), str(trained / "run.yaml"), str(trained / source)
    argv = {
        "sample": ["sample", config, f"ckpt_path={path}", "--output", str(tmp_path / "x")],
        "export": ["export", path, str(tmp_path / "x"), *(() if source == "run" else ("--config", config))],
    }
    assert main(argv[program]) == 2
    error = capsys.readouterr().err
    shape = [1, channels, 1, 1] if source == "published.pt" else [channels]
    assert error.startswith(f"error: {named} has mean torch.float32 {shape}; latents of 4 channels take floats ")
    assert error.count("\n") == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "latents, said",
    [
        (None, "a section of keys is wanted"),
        ([], "a section of keys is wanted"),
        ({}, "mean: is missing"),
        (statistics(4) | {"mean": 0.0}, "mean: a list is wanted"),
        (statistics(4) | {"std": ["1"] * 4}, "std.0: a number"),
        (statistics(4) | {"multiplier": None}, "multiplier: a number is wanted"),
        (statistics(4) | {"mean": [10**400] * 4}, "mean.0: a finite number"),
        (statistics(4) | {"multiplier": 0}, "not usable"),
    ],
)
def test_a_checkpoint_without_statistics_that_can_be_used_is_named(trained, latents, said):
    path = change_task(trained, latents=latents)
    with pytest.raises(FileError, match=rf"{path}\b.*{said}"):
        diffusion_weights(run_with(trained, trained / "run"))


@pytest.mark.parametrize("classes", ["cat", [1, 2, 3], {"cat": 0}, ["cat", "cat"], [["cat"]], 3])
def test_classes_of_an_export_that_are_no_names_are_refused(trained, classes):
    path = change_export(trained, classes=classes)
    with pytest.raises(WeightsError, match=rf"{path} is damaged: classes"):
        diffusion_weights(run_with(trained, trained / "changed"))


def test_classes_of_an_export_go_into_another(trained, tmp_path):
    change_task(trained)
    save_export(tmp_path / "x", from_checkpoint(find_checkpoint(trained / "run")))
    again = diffusion_weights(run_with(trained, tmp_path / "x"))
    assert again.extra["classes"] == CLASSES and json.loads((tmp_path / "x.json").read_text())["classes"] == CLASSES
