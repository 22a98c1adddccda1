"""`export --format diffusers`: a tokenizer's folder, with the statistics of its latents; and programs that read it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import kernels
import launch.exporting.tokenizer
from common.files import WriteError, read_json, write_json
from launch.config import LightningDiTRun, VavaeRun
from launch.evaluate import main as evaluate_main
from launch.export import export
from launch.export import main as export_main
from launch.extract import find_tokenizer
from launch.trained import build_tokenizer
from launch.training import checkpoint
from launch.training.checkpoint_search import find_checkpoint
from lightningdit.latents import LatentStatistics, read_statistics
from lightningdit.latents_writer import LatentsWriter, finish
from tests import toy
from tests.tiny_weights import STATISTICS, TOKENIZER, document, write_weights
from vavae.config import AutoencoderConfig
from vavae.model import AutoencoderKL
from vavae.weights import fingerprint, load_tokenizer

OPS = kernels.select("reference")
FILES = ["config.json", "diffusion_pytorch_model.safetensors"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def run(weights) -> Path:
    """A tokenizer's checkpoint whose average is not its weights, with the projection of its training."""
    tokenizer = load_tokenizer(weights / "tokenizer.safetensors", OPS)
    state = tokenizer.state_dict() | {"linear_proj.weight": torch.ones(8, 4, 1, 1)}
    ema = {k: v + 0.5 for k, v in state.items()}
    config = VavaeRun(preset="default", model=tokenizer.config, data={"data_path": "images", "image_size": 8})
    description = toy.checkpoint_state(3, "vavae", "autoencoder", config=config.model_dump(mode="json"))
    checkpoint.save(weights / "vavae", description, {"autoencoder": {"model": state, "ema": ema}})
    return weights / "vavae"


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def write_latents(directory: Path, sha256: str) -> Path:
    writer = LatentsWriter(directory, shard_size=10)
    latents = 3 * torch.randn(10, 4, 4, 4, generator=torch.Generator().manual_seed(0)) + 1
    writer.add(latents, latents.flip(-1), torch.zeros(10, dtype=torch.int64))
    writer.close()
    finish(directory, tokenizer={"source": "theirs.pt", "sha256": sha256})
    return directory


@pytest.mark.parametrize("which", ["ema", "model"])
def test_a_checkpoint_becomes_a_folder(run, tmp_path, capsys, which):
    argv = [str(run), str(tmp_path / "deep/x"), "--format", "diffusers"]
    assert export_main(argv + (["--weights", which] if which == "model" else [])) == 0
    out = capsys.readouterr().out
    assert out.count("vavae, step 3") == 2 and "latents_mean and latents_std are null, scaling_factor 1: --lat" in out
    assert sorted(p.name for p in (tmp_path / "deep/x").iterdir()) == FILES
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x"]
    modes = {oct(p.stat().st_mode & 0o777) for p in (run, tmp_path / "deep/x")}
    assert len(modes) == 1  # what the umask leaves, not the mode of temporary folders
    state = find_checkpoint(run).weights("autoencoder", which)
    loaded = load_tokenizer(tmp_path / "deep/x", OPS).state_dict()
    assert loaded.keys() == state.keys() - {"linear_proj.weight"}
    assert all(torch.equal(v, state[k]) for k, v in loaded.items())
    config = config_of(tmp_path / "deep/x")
    assert config["_exported"] == {"step": 3, "weights": which, "checkpoint": find_checkpoint(run).path.name}
    assert (config["scaling_factor"], config["latents_mean"], config["latents_std"]) == (1.0, None, None)
    assert (config["sample_size"], config["force_upcast"], config["shift_factor"]) == (8, True, None)


@pytest.mark.parametrize("form", ["safetensors", "pt", "folder"])
def test_weights_become_a_folder_and_a_folder_an_export(weights, tmp_path, form):
    tokenizer = load_tokenizer(weights / "tokenizer.safetensors", OPS)
    source = weights / "tokenizer.safetensors"
    if form == "pt":
        torch.save({"state_dict": tokenizer.state_dict()}, source := tmp_path / "t.pt")
    if form == "folder":
        assert export_main([str(source), str(tmp_path / "first"), "--format", "diffusers"]) == 0
        source = tmp_path / "first"
    assert export_main([str(source), str(tmp_path / "x/"), "--format", "diffusers"]) == 0
    assert config_of(tmp_path / "x")["_exported"]["source"] == source.name
    assert export_main([str(tmp_path / "x"), str(tmp_path / "y")]) == 0
    assert fingerprint(load_tokenizer(tmp_path / "y.safetensors", OPS)) == fingerprint(tokenizer)
    assert read_json(tmp_path / "y.json")["config"]["ch_mult"] == TOKENIZER["ch_mult"]


def test_the_statistics_are_those_of_the_latents(weights, tmp_path):
    """A pipeline's formula, from the config alone, undoes what training does with the same numbers."""
    source = weights / "tokenizer.safetensors"
    latents = write_latents(tmp_path / "latents", fingerprint(load_tokenizer(source, OPS)))
    argv = [str(source), "--format", "diffusers", "--latents", str(latents), "--multiplier", "0.5"]
    assert export_main([*argv, str(tmp_path / "x")]) == 0
    config = config_of(tmp_path / "x")
    mean, std = (torch.tensor(config[f"latents_{name}"]).view(1, -1, 1, 1) for name in ("mean", "std"))
    z = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    expected = read_statistics(latents, 4, 0.5).denormalise(z)
    # As in diffusers' pipelines/stable_diffusion_xl/pipeline_stable_diffusion_xl.py.
    assert torch.equal(z * std / config["scaling_factor"] + mean, expected) and config["scaling_factor"] == 0.5
    assert (mean - 1).abs().max() < 0.5 and (std - 3).abs().max() < 0.5


def test_the_statistics_are_those_a_network_was_trained_with(weights, tmp_path):
    source = str(weights / "tokenizer.safetensors")
    export(find_checkpoint(weights / "run"), tmp_path / "network")
    expected = {"latents_mean": STATISTICS.mean.tolist(), "latents_std": STATISTICS.std.tolist(), "scaling_factor": 1}
    for number, trained in enumerate((weights / "run", tmp_path / "network", tmp_path / "network.json")):
        argv = [source, str(tmp_path / str(number)), "--format", "diffusers", "--latents", str(trained)]
        assert export_main(argv) == 0
        assert expected.items() <= config_of(tmp_path / str(number)).items()
    with pytest.raises(ValueError, match=r"multiplier 2, but .*run was trained with 1"):
        export_main([source, str(tmp_path / "x"), "--format", "diffusers", "--latents", str(weights / "run"),
                     "--multiplier", "2"])  # fmt: skip


def test_a_scale_alone_leaves_the_statistics_null(weights, tmp_path, monkeypatch):
    """By the option, or of a network trained on latents that are only scaled."""
    argv = [str(weights / "tokenizer.safetensors"), "--format", "diffusers"]
    assert export_main([*argv, str(tmp_path / "x"), "--multiplier", "0.18215"]) == 0
    monkeypatch.setattr("launch.trained._statistics_of", lambda *_: LatentStatistics.identity(4, 0.18215))
    assert export_main([*argv, str(tmp_path / "y"), "--latents", str(weights / "run")]) == 0
    for name in "xy":
        config = config_of(tmp_path / name)
        assert (config["latents_mean"], config["latents_std"], config["scaling_factor"]) == (None, None, 0.18215)


def test_a_folder_of_diffusers_keeps_the_statistics_it_states(weights, tmp_path, capsys):
    source = weights / "tokenizer.safetensors"
    latents = write_latents(tmp_path / "latents", fingerprint(load_tokenizer(source, OPS)))
    export_main([str(source), str(tmp_path / "x"), "--format", "diffusers", "--latents", str(latents)])
    argv = [str(tmp_path / "x"), "--format", "diffusers"]
    capsys.readouterr()
    assert export_main([*argv, str(tmp_path / "y"), "--multiplier", "0.5"]) == 0
    assert f"latents_std are those of {tmp_path}/x, scaling_factor 0.5" in capsys.readouterr().out
    first, second = config_of(tmp_path / "x"), config_of(tmp_path / "y")
    assert all(first[f"latents_{name}"] == second[f"latents_{name}"] for name in ("mean", "std"))
    shifted = first | {"latents_mean": None, "scaling_factor": 0.3, "shift_factor": 0.1}
    write_json(tmp_path / "x/config.json", shifted)
    with pytest.raises(ValueError, match=r"x/config.json has latents_std, and latents_mean is null or missing"):
        export_main([*argv, str(tmp_path / "z")])
    write_json(tmp_path / "x/config.json", shifted | {"latents_std": None})
    assert export_main([*argv, str(tmp_path / "z")]) == 0
    third = config_of(tmp_path / "z")
    assert (third["latents_mean"], third["latents_std"], third["shift_factor"]) == (None, None, 0.1)
    assert third["scaling_factor"] == 0.3


@pytest.mark.parametrize("stated", ["mean and std", "a shift"])
def test_statistics_go_through_an_export_of_ours(weights, tmp_path, stated):
    """From a folder of diffusers into the JSON of an export, and from there into a folder: the same normalisation."""
    argv = [str(weights / "tokenizer.safetensors"), str(tmp_path / "x"), "--format", "diffusers"]
    assert export_main([*argv, "--latents", str(weights / "run")]) == 0
    first = config_of(tmp_path / "x")
    if stated == "a shift":
        first |= {"latents_mean": None, "latents_std": None, "shift_factor": 0.25, "scaling_factor": 0.5}
        write_json(tmp_path / "x/config.json", first)
    assert export_main([str(tmp_path / "x"), str(tmp_path / "y")]) == 0
    assert export_main([str(tmp_path / "y.safetensors"), str(tmp_path / "z"), "--format", "diffusers"]) == 0
    second = config_of(tmp_path / "z")
    mean, std = ([0.25] * 4, [1.0] * 4) if stated == "a shift" else (STATISTICS.mean.tolist(), STATISTICS.std.tolist())
    assert (second["latents_mean"], second["latents_std"]) == (mean, std)
    assert second["scaling_factor"] == first["scaling_factor"]


def test_what_cannot_be_a_folder_is_said(weights, run, tmp_path):
    tokenizer = weights / "tokenizer.safetensors"
    others = write_latents(tmp_path / "others", "0" * 64)
    (tmp_path / "empty").mkdir()
    for name, change in (("wide", {"ch_mult": [2, 2]}), ("narrow", {"embed_dim": 3})):
        model = toy_state(TOKENIZER | change)
        torch.save(model, tmp_path / f"{name}.pt")
    torch.save({"state_dict": toy_state(TOKENIZER)}, tmp_path / "named.pt")
    toy.write_images(tmp_path / "images", count=2)
    export_main([str(tokenizer), str(tmp_path / "whole"), "--format", "diffusers"])
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "whole/config.json", tmp_path / "bare")
    there = set(tmp_path.iterdir())
    for argv, why in (
        ([weights / "published.pt"], "is a LightningDiT, and its file tells neither .* give --config"),
        ([weights / "run", "--latents", "x"], "--latents changes nothing for a LightningDiT"),
        ([tokenizer, "--tokenizer", tokenizer], "--tokenizer changes nothing: .* is a tokenizer itself"),
        ([tokenizer, "--latents", tmp_path / "images"], r"images is a folder of images \(class0/0.png …\): --latents"),
        ([tmp_path / "images"], r"images is a folder of images \(class0/0.png …\): a checkpoint"),
        (
            [tokenizer, "--latents", tmp_path / "bare"],
            "bare is .*class AutoencoderKL, without its weights .*: --latents",
        ),
        (
            [tmp_path / "bare"],
            r"bare is .*class AutoencoderKL, without its weights \(diffusion_pytorch_model.saf.*: a ch",
        ),
        ([tokenizer, "--latents", tmp_path / "whole"], "whole is .*class AutoencoderKL: --latents takes a set of"),
        ([tokenizer, "--weights", "model"], "--weights model: .* holds one set of weights, at its top, without a name"),
        ([tmp_path / "named.pt", "--weights", "ema"], "--weights ema: .* one set of weights, under 'state_dict'"),
        ([tmp_path / "whole", "--weights", "model"], "--weights model: .*whole holds one set"),
        ([tmp_path / "wide.pt"], "diffusers has no such autoencoder: its first convolution has 32 channels"),
        ([tmp_path / "narrow.pt"], "diffusers has no such autoencoder: it has 3 embed_dim and 4 z_channels"),
        ([tokenizer, "--latents", others], "others was made by another tokenizer .*from theirs.pt"),
        ([tokenizer, "--latents", tmp_path / "empty"], "empty is no checkpoint and has no complete one"),
        ([tokenizer, "--latents", run], "of kind 'vavae', not 'lightningdit'"),
        ([tokenizer, "--latents", tokenizer], "'vavae', not 'lightningdit'"),
        ([tokenizer, "--multiplier", "0"], "--multiplier 0: a number above 0"),
        ([tokenizer, "--multiplier", "nan"], "--multiplier nan: a number above 0"),
        ([tmp_path / "none"], "none does not exist"),
        ([run, "--config", "x.yaml"], "holds its own run"),
    ):
        with pytest.raises(ValueError, match=why):
            export_main([str(argv[0]), str(tmp_path / "x"), "--format", "diffusers", *map(str, argv[1:])])
    for option in ("--latents", "--multiplier"):
        with pytest.raises(ValueError, match=f"{option} changes nothing without --format diffusers"):
            export_main([str(tokenizer), str(tmp_path / "x"), option, "1"])
    for name in (".", "..", "x.safetensors", "", "a\nb"):
        with pytest.raises(ValueError, match="NAME"):
            export_main([str(tokenizer), name, "--format", "diffusers"])
    assert set(tmp_path.iterdir()) == there


def toy_state(config: dict) -> dict:
    return AutoencoderKL(AutoencoderConfig(**yaml.safe_load(yaml.safe_dump(config))), OPS).state_dict()


@pytest.mark.parametrize("there", ["a file", "a folder", "an empty folder", "a link to nothing"])
def test_a_folder_replaces_nothing_that_is_there(weights, tmp_path, there):
    taken = tmp_path / "x"
    if there == "a file":
        taken.write_text("mine")
    elif there == "a link to nothing":
        taken.symlink_to(tmp_path / "none")
    else:
        taken.mkdir()
    if there == "a folder":
        (taken / "config.json").write_text("mine")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match="x is already there: remove it, or export under another name"):
        export_main([str(weights / "tokenizer.safetensors"), str(taken), "--format", "diffusers"])
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("meanwhile", ["a file", "a folder"])
def test_of_two_exports_of_one_folder_one_is_made(weights, tmp_path, monkeypatch, meanwhile):
    real = launch.exporting.tokenizer.write_folder

    def other(*arguments, **named):
        written = real(*arguments, **named)
        if meanwhile == "a folder":
            (tmp_path / "x").mkdir()
        ((tmp_path / "x" / "config.json") if meanwhile == "a folder" else tmp_path / "x").write_text("theirs")
        return written

    monkeypatch.setattr("launch.exporting.tokenizer.write_folder", other)
    with pytest.raises(ValueError, match="x is already there"):
        export_main([str(weights / "tokenizer.safetensors"), str(tmp_path / "x"), "--format", "diffusers"])
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.read_text() for path in left] == ["theirs"] and len(list(tmp_path.iterdir())) == 1


def test_an_export_that_fails_leaves_no_folder(weights, tmp_path, monkeypatch):
    """It fails at the second of its files."""

    def fails(*arguments):
        raise WriteError("cannot write: no space left")

    monkeypatch.setattr("vavae.diffusers_layout.write_tensors", fails)
    with pytest.raises(WriteError):
        export_main([str(weights / "tokenizer.safetensors"), str(tmp_path / "x"), "--format", "diffusers"])
    assert not list(tmp_path.iterdir())


def test_programs_take_the_folder_for_a_tokenizer(weights, run, tmp_path):
    """`extract` and `sample`, by the folder or the file in it; a checkpoint that is a folder stays one."""
    source = weights / "tokenizer.safetensors"
    assert export_main([str(source), str(tmp_path / "x"), "--format", "diffusers"]) == 0
    expected = fingerprint(load_tokenizer(source, OPS))
    for path in (tmp_path / "x", tmp_path / "x" / FILES[1]):
        of_extract = VavaeRun(preset="default", model=AutoencoderConfig(**yaml.safe_load(yaml.safe_dump(TOKENIZER))),
                              ckpt_path=str(path))  # fmt: skip
        found, named = find_tokenizer(of_extract, OPS)
        assert fingerprint(found) == expected and named == str(path)
        of_sample = document(weights)
        of_sample["vae"]["ckpt_path"] = str(path)
        assert fingerprint(build_tokenizer(LightningDiTRun.model_validate(of_sample), OPS)) == expected
    other = of_extract.model_copy(update={"ckpt_path": str(run)})
    assert "step_0000003" in find_tokenizer(other, OPS)[1]
    shutil.rmtree(tmp_path / "x")
    (tmp_path / "x").mkdir()
    with pytest.raises(ValueError, match="x is no checkpoint and has no complete one below it"):
        find_tokenizer(of_extract.model_copy(update={"ckpt_path": str(tmp_path / "x")}), OPS)


def test_evaluate_takes_the_folder_for_a_tokenizer(weights, tmp_path, monkeypatch):
    # Figures that need weights to download are left out.
    monkeypatch.setattr("launch.evaluate._unless_missing", lambda _, name, skipped, __: skipped.update({name: ""}))
    source = weights / "tokenizer.safetensors"
    assert export_main([str(source), str(tmp_path / "x"), "--format", "diffusers"]) == 0
    originals = toy.write_images(tmp_path / "images", count=4, size=18)
    results = []
    for path in (source, tmp_path / "x"):
        out = tmp_path / f"{path.name}.json"
        argv = ["--tokenizer", str(path), "--originals", str(originals), "--image-size", "16", "--device", "cpu"]
        assert evaluate_main([*argv, "--allow-few", "--output", str(out)]) == 0
        results.append(read_json(out))
    assert results[0]["metrics"] == results[1]["metrics"] and "psnr" in results[0]["metrics"]
