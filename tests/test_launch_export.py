"""The export program, and the weights files that programs read, on a tiny tokenizer and a tiny network."""

import json
import shutil

import pytest
import torch
import yaml

import kernels
import launch.exporting.weights
from common.files import WriteError
from launch.config import LightningDiTRun, VavaeRun
from launch.export import export
from launch.export import main as export_main
from launch.trained import build_tokenizer, diffusion_weights
from launch.training import checkpoint
from launch.training.checkpoint_search import find_checkpoint
from lightningdit.weights import read_export, read_weights
from tests import toy
from tests.tiny_weights import STATISTICS, a_run, document, write_weights
from vavae.weights import load_tokenizer, write_export


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"))


def test_every_kind_of_weights_file(weights, tmp_path):
    from_run = diffusion_weights(a_run(weights))
    export(checkpoint.newest(weights / "run" / "checkpoints"), tmp_path / "out" / "digits")
    base = document(weights)
    for path in (tmp_path / "out" / "digits", weights / "run" / "checkpoints" / "step_0000007"):
        found = diffusion_weights(LightningDiTRun.model_validate(base | {"ckpt_path": str(path)}))
        assert all(torch.equal(found.state[k], v) for k, v in from_run.state.items())
        assert found.latents.to_json() == STATISTICS.to_json() and found.step == 7
    published = base | {"ckpt_path": str(weights / "published.pt")}
    with pytest.raises(ValueError, match=r"latents_stats.pt is missing"):
        diffusion_weights(LightningDiTRun.model_validate(published))
    published["data"] = base["data"] | {"latent_norm": False, "latent_multiplier": 0.5}
    found = diffusion_weights(LightningDiTRun.model_validate(published))
    assert all(torch.equal(found.state[k], v) for k, v in from_run.state.items())
    assert found.latents.multiplier == 0.5 and found.step is None


@pytest.mark.parametrize("name", ["x", "x.safetensors", "alone.safetensors", "x.pt"])
@pytest.mark.parametrize("theirs", ["lightningdit", "vavae"])
def test_weights_of_the_other_model_are_named_as_such(weights, tmp_path, theirs, name):
    """Exports with their description and without, and published files, where either model's are wanted."""
    if theirs == "lightningdit":
        export(find_checkpoint(weights / "run"), tmp_path / "x")
    else:
        tokenizer = load_tokenizer(weights / "tokenizer.safetensors", kernels.select("reference"))
        write_export(tmp_path / "x", tokenizer.state_dict(), tokenizer.config)
        torch.save({"state_dict": tokenizer.state_dict()}, tmp_path / "x.pt")
    shutil.copy(tmp_path / "x.safetensors", tmp_path / "alone.safetensors")
    if theirs == "lightningdit":
        with pytest.raises(ValueError, match=r"'lightningdit', not 'vavae'|holds a LightningDiT's weights") as e:
            load_tokenizer(tmp_path / ("x.safetensors" if name == "x" else name), kernels.select("reference"))
    else:
        run = document(weights) | {"ckpt_path": str(tmp_path / name)}
        with pytest.raises(ValueError, match=r"'vavae', not 'lightningdit'|holds a tokenizer's weights") as e:
            diffusion_weights(LightningDiTRun.model_validate(run))
    assert str(tmp_path / name.partition(".")[0]) in str(e.value)


def test_export_of_a_network(weights, tmp_path, capsys):
    assert export_main([str(weights / "run"), str(tmp_path / "digits"), "--weights", "model"]) == 0
    assert capsys.readouterr().out.count("lightningdit, step 7") == 3
    found = read_export(tmp_path / "digits")
    assert found.extra["checkpoint"] == "run/checkpoints/step_0000007" and "source" not in found.extra
    state = read_weights(weights / "published.pt", "model")[0]
    assert found.weights == "model" and all(torch.equal(found.state[k], v) for k, v in state.items())
    for which in ("model", "ema"):
        ours, theirs = (read_weights(p, which)[0] for p in (tmp_path / "digits.pt", weights / "published.pt"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("which", ["ema", "model"])
def test_export_of_a_published_network(weights, tmp_path, capsys, which):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(document(weights) | {"data": document(weights)["data"] | {"latent_norm": False}}))
    source = weights / "published.pt"
    argv = [str(source), str(tmp_path / "x"), "--weights", which, "--config", str(config), "data.latent_multiplier=0.5"]
    assert export_main(argv) == 0
    assert capsys.readouterr().out.count(f"from {source}") == 2
    found = read_export(tmp_path / "x")
    state, _ = read_weights(source, which)
    assert found.weights == which and found.step is None and found.latents.multiplier == 0.5
    assert found.state.keys() == state.keys() and all(torch.equal(found.state[k], v) for k, v in state.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.yaml", "x.json", "x.safetensors"]


@pytest.mark.parametrize("entry", [None, "state_dict", "model"])
def test_export_of_a_published_tokenizer(weights, tmp_path, entry):
    """Its sizes are those its tensors have."""
    tokenizer = load_tokenizer(weights / "tokenizer.safetensors", kernels.select("reference"))
    state = tokenizer.state_dict()
    torch.save(state if entry is None else {entry: state, "epoch": 3}, tmp_path / "t.pt")
    assert export_main([str(tmp_path / "t.pt"), str(tmp_path / "x")]) == 0
    facts = json.loads((tmp_path / "x.json").read_text())
    assert facts["weights"] == (entry or "unnamed") and facts["step"] is None and facts["source"] == "t.pt"
    again = load_tokenizer(tmp_path / "x.safetensors", kernels.select("reference"))
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())


def test_what_cannot_be_exported_is_said(weights, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(document(weights) | {"model": document(weights)["model"] | {"depth": 3}}))
    for argv, why in (
        ([weights / "published.pt"], "give --config"),
        ([tmp_path / "other.pt"], r"other\.pt .*not a tokenizer"),
        ([weights / "run", "--config", config], "holds its own run"),
        ([tmp_path / "none"], "does not exist"),
        ([weights / "tokenizer.safetensors", "model.ch=64"], "model.ch=64 changes nothing without --config"),
        ([weights / "run", "model.depth=3"], "model.depth=3 changes nothing without --config"),
        ([weights / "published.pt", "--config", config, "data.latent_norm=false"], "missing: blocks"),
    ):
        with pytest.raises(ValueError, match=why):
            export_main([str(argv[0]), str(tmp_path / "x"), *map(str, argv[1:])])
    assert not list(tmp_path.glob("x.*"))


def contents(directory) -> dict:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("suffix", [".safetensors", ".json", ".pt"])
@pytest.mark.parametrize("there", ["a file", "a folder", "a link to nothing"])
def test_an_export_replaces_nothing_that_is_there(weights, tmp_path, there, suffix):
    taken = tmp_path / f"x{suffix}"
    {
        "a file": lambda: taken.write_text("mine"),
        "a folder": taken.mkdir,
        "a link to nothing": lambda: taken.symlink_to(tmp_path / "none"),
    }[there]()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"x{suffix} is already there: remove it, or export under another name"):
        export_main([str(weights / "run"), str(tmp_path / "x")])
    assert contents(tmp_path) == before and list(tmp_path.iterdir()) == [taken]


def test_an_export_spares_what_it_is_made_of(weights, tmp_path):
    """A checkpoint's own files, and a weights file or the one described beside it."""
    root = tmp_path / "copy"
    shutil.copytree(weights, root)
    step = root / "run/checkpoints/step_0000007"
    shutil.copy(root / "tokenizer.safetensors", root / "alone.safetensors")
    before = contents(tmp_path)
    for source, name in (
        (step, step / "model.ema"),
        (step, step / "state"),
        (root / "run", step / "manifest"),
        (root / "tokenizer.safetensors", root / "tokenizer"),
        (root / "alone.safetensors", root / "alone.safetensors"),
    ):
        with pytest.raises(ValueError, match="is already there"):
            export_main([str(source), str(name)])
        assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["folder", "folder/", "new/", "new.pt/"])
def test_a_folder_is_no_name_of_an_export(weights, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=rf"^{name} is a folder, .*/weights puts them into it"):
        export_main([str(weights / "run"), name])
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        *((name, "NAME is the path of files, without their suffix") for name in (".", "..", "a/..", ".pt", "a/.json")),
        ("", "NAME: a path is wanted"),
        ("a\nb", "NAME: .*control characters"),
    ],
)
def test_what_names_no_file_is_no_name_of_an_export(weights, tmp_path, monkeypatch, name, why):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=why):
        export_main([str(weights / "run"), name])
    assert not list(tmp_path.iterdir())


def test_of_two_exports_of_one_name_one_is_made(weights, tmp_path, monkeypatch):
    """The other is told, whichever file it meets; what was there stays as it was made."""
    first, made = find_checkpoint(weights / "run"), {}

    def meanwhile(path, *networks):
        monkeypatch.setattr("launch.exporting.weights.save_published", real)
        made.update({file: file.read_bytes() for file in export(first, tmp_path / "x")})
        real(path, *networks)

    real = launch.exporting.weights.save_published
    monkeypatch.setattr("launch.exporting.weights.save_published", meanwhile)
    with pytest.raises(ValueError, match=r"x\.safetensors is already there"):
        export(first, tmp_path / "x")
    assert len(made) == 3 and contents(tmp_path) == made and set(tmp_path.iterdir()) == set(made)


@pytest.mark.parametrize("name", ["folder/x", "folder", "deep/er/x.v1"])
@pytest.mark.parametrize("suffix", [".safetensors", ".json", ".pt"])
def test_a_suffix_of_the_name_is_that_of_its_files(weights, tmp_path, name, suffix):
    (tmp_path / "folder").mkdir()
    assert export_main([str(weights / "run"), f"{tmp_path / name}{suffix}"]) == 0
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == {
        f"{name}{each}" for each in (".safetensors", ".json", ".pt")
    }


def test_an_export_that_fails_leaves_none_of_its_files(weights, tmp_path, monkeypatch):
    def fails(*arguments):
        raise WriteError("cannot write: no space left")

    monkeypatch.setattr("launch.exporting.weights.save_published", fails)
    with pytest.raises(WriteError):
        export(find_checkpoint(weights / "run"), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_export_of_a_tokenizer(weights, tmp_path):
    tokenizer = load_tokenizer(weights / "tokenizer.safetensors", kernels.select("reference"))
    state = tokenizer.state_dict()
    run = VavaeRun(preset="default", model=tokenizer.config, data={"data_path": "images", "image_size": 8})
    description = toy.checkpoint_state(3, "vavae", "autoencoder", config=run.model_dump(mode="json"))
    path = checkpoint.save(tmp_path, description, {"autoencoder": {"model": state, "ema": state}})
    written = export(checkpoint.Checkpoint(path), tmp_path / "tokenizer.v1")
    assert [p.name for p in written] == ["tokenizer.v1.safetensors", "tokenizer.v1.json", "tokenizer.v1.pt"]
    for file in (written[0], written[2]):
        back = load_tokenizer(file, kernels.select("reference"), tokenizer.config).state_dict()
        assert all(torch.equal(back[k], v) for k, v in state.items())
    run = document(weights)
    run["vae"]["ckpt_path"] = str(written[0])
    assert build_tokenizer(LightningDiTRun.model_validate(run), kernels.select("reference")).config == tokenizer.config
    with pytest.raises(ValueError, match="of kind 'vavae', not 'lightningdit'"):
        diffusion_weights(LightningDiTRun.model_validate(document(weights) | {"ckpt_path": str(path)}))
