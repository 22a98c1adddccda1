"""All published run files: each loads as it is, does what it is for, and asks for what it leaves open."""

from pathlib import Path

import pytest
import torch
import yaml

import kernels
from launch import extract
from launch.__main__ import main
from launch.config import load
from launch.training import dry_run
from tests import toy
from tests.published import FILES, kind_of
from vavae.config import AutoencoderConfig, LossConfig
from vavae.task import build_networks

SAMPLING = {
    "config_details": (8.0, 0.11),
    "lightningdit_xl_vavae_f16d32": (10.0, 0.11),
    "lightningdit_xl_vavae_f16d32_64ep_cfg": (10.0, 0.10),
    "lightningdit_xl_vavae_f16d32_800ep_cfg": (6.7, 0.125),
}
DATA = "data.data_path=/data/train"
# Published tokenizer file → overrides, and what a plan then asks for (None: it is made).
TRAINING = [
    ("f16d32_ldm", [], None),
    ("f16d32_vfdinov2", [], None),
    ("f16d32_vfdinov2_long", [], "not set: loss.vf_weight .*; loss.disc_start "),
    ("f16d32_vfdinov2_long", ["loss.vf_weight=0.5"], "loss.disc_start"),
    ("f16d32_vfdinov2_long", ["loss.vf_weight=0.5", "loss.disc_start=2501"], "max_steps or max_epochs"),
    ("f16d32_vfdinov2_long", ["loss.vf_weight=0.5", "loss.disc_start=2501", "train.max_epochs=100"], None),
    (
        "f16d32_vfdinov2_long",
        ["loss.disc_start=2501", "train.max_epochs=100", "stages=[{epochs: 100, loss: {vf_weight: 0.5}}]"],
        None,
    ),
    ("vavae_f16d32", [], "data.data_path"),
    ("vavae_f16d32", [DATA], "max_steps or max_epochs"),
    ("vavae_f16d32", [DATA, "train.max_epochs=1"], None),
    ("vavae_experimentals", [DATA, "train.max_epochs=1"], "loss.vf_weight"),
    ("vavae_experimentals", [DATA, "train.max_epochs=1", "loss.use_vf=false"], None),
]


def written(folder: Path, name: str) -> Path:
    path = folder / Path(name).name
    path.write_text(yaml.safe_dump(FILES[name]))
    return path


def named(stem: str) -> str:
    return next(name for name in FILES if Path(name).stem == stem)


def test_there_are_nine():
    assert len(FILES) == 9 and len({Path(name).name for name in FILES}) == 9


@pytest.mark.parametrize("name", FILES)
def test_each_loads_as_it_is(tmp_path, name):
    run, notes = load(written(tmp_path, name), kind=kind_of(name))
    assert run.preset == "paper" and run.ckpt_path == FILES[name]["ckpt_path"]
    if kind_of(name) == "vavae":
        assert run.model == AutoencoderConfig(size="f16d32")
        assert (run.loss.kl_weight, run.loss.disc_weight, run.optimizer.lr) == (1e-6, 0.5, 1e-4)
        assert run.loss.use_vf is ("use_vf" in FILES[name]["model"]["params"])
        assert (run.foundation is None) is (not run.loss.use_vf)
    else:
        assert notes == [] and (run.sample.cfg_scale, run.sample.cfg_interval_start) == SAMPLING[Path(name).stem]
        assert (run.train.max_steps, run.train.exp_name) == (80_000, "lightningdit_xl_vavae_f16d32")


@pytest.mark.parametrize("name", FILES)
def test_each_is_told_from_a_run_file_of_the_other_model(tmp_path, name, capsys):
    path, other = written(tmp_path, name), {"vavae": "lightningdit", "lightningdit": "vavae"}[kind_of(name)]
    assert main(["train", other, str(path), "--dry-run"]) == 2
    is_one, wanted = ("tokenizer", "LightningDiT") if kind_of(name) == "vavae" else ("LightningDiT", "tokenizer")
    assert f"{path}: this is a {is_one} run file" in (text := capsys.readouterr().err) and f"a {wanted} is" in text


def test_what_only_other_programs_read_is_named_and_ignored(tmp_path):
    _, notes = load(written(tmp_path, named("vavae_f16d32")), kind="vavae")
    assert any("ignored" in note and "vf_loss_type: 'combined_v3'" in note for note in notes)
    assert any("ignored model.target" in note for note in notes)


@pytest.mark.parametrize(("stem", "overrides", "asks"), TRAINING)
def test_training_asks_for_what_a_file_and_its_overrides_leave_open(tmp_path, monkeypatch, stem, overrides, asks):
    monkeypatch.setattr(
        dry_run, "network_costs", lambda run, kinds: (dict.fromkeys(kinds, ()), 0, None)
    )  # seconds each
    path = written(tmp_path, named(stem))
    run, _ = load(path, overrides, kind="vavae")
    if asks is None:
        assert dry_run.plan_run(run, "vavae", 32).lines()
    else:
        with pytest.raises(ValueError, match=asks):
            dry_run.plan_run(run, "vavae", 32)


@pytest.mark.parametrize("stem", ["vavae_f16d32", "vavae_experimentals", "f16d32_vfdinov2_long"])
def test_weights_and_model_are_enough_to_extract(tmp_path, capsys, stem):
    """With a network of toy size under the published keys, and weights as they are published."""
    document = FILES[named(stem)]
    small = {
        "z_channels": 4,
        "resolution": 16,
        "ch": 32,
        "ch_mult": [1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
    }
    params = document["model"]["params"]
    params = params | {"embed_dim": 4, "ddconfig": params["ddconfig"] | small}
    path = tmp_path / "small.yaml"
    weights = tmp_path / "weights.pt"
    path.write_text(
        yaml.safe_dump(document | {"model": document["model"] | {"params": params}, "ckpt_path": str(weights)})
    )
    model = AutoencoderConfig(embed_dim=4, **small)
    network = build_networks(model, LossConfig(use_vf=False), kernels.select("reference"), 0, None)["autoencoder"]
    torch.save({"state_dict": network.state_dict()}, weights)
    images = toy.write_images(tmp_path / "images", count=3)
    arguments = [
        "--output",
        str(tmp_path / "latents"),
        f"data.data_path={images}",
        "data.num_workers=0",
        "kernels=reference",
        "--least-psnr=-inf",  # the weights are untrained
    ]
    assert extract.main([str(path), *arguments]) == 0
    assert len(list((tmp_path / "latents").glob("*.safetensors"))) == 1
    assert ("ignored model.params.lossconfig.params.vf_loss_type" in capsys.readouterr().out) is (
        stem == "vavae_f16d32"
    )
