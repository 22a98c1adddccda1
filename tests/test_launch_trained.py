"""What comes with trained weights is the network's, or `sample` and `export` refuse it in one sentence."""

import json

import pytest
import torch
import yaml

import kernels
from common.tensors import WeightsError
from launch import checkpoint
from launch.__main__ import main
from launch.config import LightningDiTRun
from launch.trained import diffusion_weights, find_checkpoint, from_checkpoint
from lightningdit.latents import LatentStatistics
from lightningdit.model import LightningDiT
from lightningdit.weights import Export, save_export, save_published
from tests import toy
from vavae.config import AutoencoderConfig
from vavae.model import AutoencoderKL
from vavae.weights import write_export

CLASSES = ["cat", "dog", "été"]


def statistics(channels: int) -> dict:
    return {"mean": [0.0] * channels, "std": [1.0] * channels, "multiplier": 1.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Of a network of 4 channels: a published .pt, an export, a checkpoint; a tokenizer; and the run file."""
    root, ops = tmp_path_factory.mktemp("trained"), kernels.select("reference")
    model = AutoencoderConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, embed_dim=4, z_channels=4,
                              attn_resolutions=(), resolution=16)
    write_export(root / "tokenizer.safetensors", AutoencoderKL(model, ops).state_dict(), model)
    path = toy.write_run(root / "run.yaml", toy.LIGHTNINGDIT, data={"data_path": str(root / "latents")},
                         vae={"ckpt_path": str(root / "tokenizer.safetensors")}, train={"output_dir": str(root)},
                         sample={"num_sampling_steps": 2, "fid_num": 2})
    run = LightningDiTRun.model_validate(yaml.safe_load(path.read_text()))
    state = LightningDiT(run.network(), ops).state_dict()
    save_published(root / "published.pt", state, state)
    latents = LatentStatistics(torch.zeros(4), torch.ones(4))
    save_export(root / "export", Export(run.network(), state, 7, "ema", latents, {"classes": CLASSES}))
    facts = {"config": run.model_dump(mode="json"), "task": {"latents": statistics(4), "classes": CLASSES}}
    checkpoint.save(root / "checkpoints", toy.checkpoint_state(7, "lightningdit", **facts),
                    {"model": {"model": state, "ema": state}})
    return root


def run_file(root, ckpt_path) -> LightningDiTRun:
    return LightningDiTRun.model_validate(yaml.safe_load((root / "run.yaml").read_text()) | {"ckpt_path": ckpt_path})


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
    path = find_checkpoint(root / "checkpoints").path
    state = json.loads((path / "state.json").read_text())
    toy.rewrite_state(path, state | {"task": {"latents": statistics(4), "classes": CLASSES} | entries})
    return path / "state.json"


@pytest.mark.parametrize("source", ["published.pt", "export", "checkpoints"])
def test_statistics_of_the_networks_channels_are_taken(trained, source):
    write_statistics(trained, 4), change_task(trained)
    found = diffusion_weights(run_file(trained, str(trained / source)))
    assert found.latents.mean.shape == found.latents.std.shape == (4,)
    assert found.extra.get("classes") == (None if source == "published.pt" else CLASSES)


SOURCES = {
    "published.pt": lambda root, channels: write_statistics(root, channels),
    "changed.safetensors": lambda root, channels: change_export(root, latents=statistics(channels)),
    "checkpoints": lambda root, channels: change_task(root, latents=statistics(channels)),
}


@pytest.mark.parametrize("channels", [1, 3, 8])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("program", ["sample", "export"])
def test_statistics_of_other_channels_than_the_networks_are_one_sentence(trained, tmp_path, capsys, program, source,
                                                                         channels):
    named, config, path = SOURCES[source](trained, channels), str(trained / "run.yaml"), str(trained / source)
    argv = {"sample": ["sample", config, f"ckpt_path={path}", "--output", str(tmp_path / "x")],
            "export": ["export", path, str(tmp_path / "x"), *(() if source == "checkpoints" else ("--config", config))]}
    assert main(argv[program]) == 2
    error = capsys.readouterr().err
    shape = [1, channels, 1, 1] if source == "published.pt" else [channels]
    assert error.startswith(f"error: {named} has mean torch.float32 {shape}; latents of 4 channels want real numbers ")
    assert error.count("\n") == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("classes", ["cat", [1, 2, 3], {"cat": 0}, ["cat", "cat"], [["cat"]], 3])
def test_classes_of_an_export_that_are_no_names_are_refused(trained, classes):
    path = change_export(trained, classes=classes)
    with pytest.raises(WeightsError, match=rf"{path} is damaged: classes"):
        diffusion_weights(run_file(trained, str(trained / "changed")))


def test_classes_of_an_export_go_into_another(trained, tmp_path):
    change_task(trained)
    save_export(tmp_path / "x", from_checkpoint(find_checkpoint(trained / "checkpoints")))
    again = diffusion_weights(run_file(trained, str(tmp_path / "x")))
    assert again.extra["classes"] == CLASSES and json.loads((tmp_path / "x.json").read_text())["classes"] == CLASSES
