"""Presets and stored settings of sampling, and the network of autoguidance, from the files that weights come in."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import kernels
from common.tensors import WeightsError
from launch.config import ConfigError, LightningDiTRun, load
from launch.guides import guide_network
from launch.sample import generate
from launch.trained import diffusion_weights, from_checkpoint, sampling_settings
from launch.training import checkpoint
from launch.training.checkpoint_search import find_checkpoint
from lightningdit.config import SampleConfig, TransportConfig
from lightningdit.flow import Transport
from lightningdit.latents import LatentStatistics
from lightningdit.model import LightningDiT
from lightningdit.sampler import sample
from lightningdit.weights import read_export, save_export, save_published
from tests import toy
from tests.tiny_weights import STATISTICS, a_run, document, write_weights
from vavae.images import to_uint8
from vavae.weights import fingerprint, load_tokenizer

OPS = kernels.select("reference")


def run_of(root, ckpt_path=None, **sample_keys) -> LightningDiTRun:
    keys = document(root) | {"sample": sample_keys}
    return LightningDiTRun.model_validate(keys | ({} if ckpt_path is None else {"ckpt_path": str(ckpt_path)}))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Weights, with an earlier checkpoint of the run, step 3, whose network is another."""
    root = write_weights(tmp_path_factory.mktemp("guided"))
    found = from_checkpoint(find_checkpoint(root / "run"))
    state = {key: value + 0.1 * ("blocks" in key) for key, value in found.state.items()}
    config = a_run(root, cfg_scale=3.5, cfg_interval_end=0.8).model_dump(mode="json")
    task = {"latents": STATISTICS.to_json(), "num_images": 60, "classes": ["cat", "dog", "été"]}
    earlier = toy.checkpoint_state(3, "lightningdit", config=config, task=task)
    checkpoint.save(root / "run" / "checkpoints", earlier, {"model": {"model": state, "ema": state}})
    save_export(root / "export", found)
    return root


def test_a_preset_gives_values_to_keys_that_are_not_set(root):
    assert run_of(root, preset="paper-64ep").sampling().cfg_scale == 10.0
    found = run_of(root, preset="paper-800ep", cfg_scale=5.0, num_sampling_steps=9).sampling()
    settings = (found.cfg_scale, found.cfg_interval_start, found.cfg_channels, found.num_sampling_steps)
    assert settings == (5.0, 0.125, 3, 9) and found.timestep_shift == 0.3
    # Kept as they are when they are read again from where all keys are written.
    assert SampleConfig.model_validate(found.model_dump(mode="json")) == found
    published = LightningDiTRun.model_validate(document(root) | {"preset": "paper", "sample": {"preset": "default"}})
    assert published.sampling().cfg_channels is None and published.sampling().cfg_scale == 4.0
    with pytest.raises(ValueError, match="'paper-64ep', 'paper-800ep', 'default' or 'model'"):
        run_of(root, preset="paper")


def test_a_preset_of_the_command_line_leaves_what_the_file_sets(tmp_path, root):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(document(root, cfg_scale=2.5)), "utf-8")
    run, _ = load(file, ["sample.preset=paper-64ep"], kind="lightningdit")
    assert (run.sampling().cfg_scale, run.sampling().cfg_interval_start, run.sampling().cfg_channels) == (2.5, 0.1, 3)


@pytest.mark.parametrize("source", ["run", "export"])
def test_settings_travel_with_weights(root, source):
    run = run_of(root, root / source, preset="model", num_sampling_steps=7)
    found = sampling_settings(run)
    assert found.cfg_scale == 2.0 and found.num_sampling_steps == 7 and found.cfg_interval_start == 0.11
    earlier = run_of(root, root / "run" / "checkpoints" / "step_0000003", preset="model")
    assert (sampling_settings(earlier).cfg_scale, sampling_settings(earlier).cfg_interval_end) == (3.5, 0.8)
    assert sampling_settings(run_of(root, root / source, cfg_scale=9.0)).cfg_scale == 9.0


def test_an_export_says_what_its_network_was_tuned_with(root, tmp_path):
    said = json.loads((root / "export.json").read_text("utf-8"))
    assert said["sample"]["cfg_scale"] == 2.0 and "seed" not in said["sample"] and "preset" not in said["sample"]
    found = read_export(root / "export")
    assert found.sample == said["sample"] == a_run(root).sampling().tuned()
    save_export(tmp_path / "again", found)
    assert read_export(tmp_path / "again").sample == found.sample
    save_export(tmp_path / "old", replace(found, sample=None))
    assert read_export(tmp_path / "old").sample is None and '"sample"' not in (tmp_path / "old.json").read_text("utf-8")
    save_export(tmp_path / "wrong", replace(found, sample={"cfg_scale": 0.5}))
    with pytest.raises(WeightsError, match=r"wrong\.json: sample: cfg_scale"):
        read_export(tmp_path / "wrong")


@pytest.mark.parametrize("source", ["old", "published.pt"])
def test_weights_without_settings_are_named(root, source):
    save_export(root / "old", replace(read_export(root / "export"), sample=None))
    with pytest.raises(ConfigError, match=rf"sample.preset is model, but no settings.*{root}/{source}; use paper-64ep"):
        sampling_settings(run_of(root, root / source, preset="model"))
    with pytest.raises(ConfigError, match=r"sample\.preset is model"):
        run_of(root, preset="model").sampling()


def test_contradictions_are_refused_and_what_has_no_effect_is_noted(root):
    with pytest.raises(ValueError, match=r"cfg_interval_end 0.2 lies below cfg_interval_start 0.3"):
        run_of(root, cfg_interval_start=0.3, cfg_interval_end=0.2)
    with pytest.raises(ValueError, match="guide_ckpt_path a and guide_step 3 name two networks"):
        run_of(root, guide_ckpt_path="a", guide_step=3)
    with pytest.raises(ValueError, match="compile is cudagraphs, but dopri5"):
        run_of(root, compile="cudagraphs", sampling_method="dopri5")
    notes = run_of(root, cfg_scale=1.0, guide_step=3, cfg_schedule="linear").without_effect()
    assert notes == [
        "sample.guide_step is 3, but cfg_scale 1 guides nowhere",
        "sample.cfg_schedule is linear, but cfg_scale 1 guides nowhere",
    ]
    (note,) = run_of(root, guide_weights="model").without_effect()
    assert note.startswith("sample.guide_weights is model, but neither")
    assert run_of(root, guide_step=3, guide_weights="model", cfg_schedule="cosine").without_effect() == []


def test_values_of_a_preset_that_do_not_hold_are_noted(root):
    (note,) = run_of(
        root, preset="paper-64ep", cfg_scale=2.5, cfg_channels=None, num_sampling_steps=250
    ).without_effect()
    assert note.startswith("sample.preset is paper-64ep, but ")
    assert note.endswith("set otherwise: cfg_scale 2.5 for 10.0, cfg_channels None for 3")
    assert (
        run_of(root, preset="paper-64ep", seed=3).without_effect()
        == run_of(root, preset="model").without_effect()
        == []
    )


def guide_of(run):
    found = diffusion_weights(run)
    return guide_network(run, run.sampling(), OPS, found), found


def published(root, name, **sizes):
    """A published .pt of another size, with weights that are not zero."""
    torch.manual_seed(1)
    network = LightningDiT(a_run(root).network().model_copy(update=sizes), OPS)
    state = {key: torch.randn_like(value) * 0.05 for key, value in network.state_dict().items()}
    save_published(root / name, state, state)
    return root / name


def test_an_earlier_checkpoint_guides(root):
    guide, _ = guide_of(run_of(root, guide_step=3, cfg_scale=2.0))
    weak = from_checkpoint(find_checkpoint(root / "run" / "checkpoints" / "step_0000003"))
    assert guide.facts == {
        "path": str(root / "run" / "checkpoints" / "step_0000003"),
        "step": 3,
        "weights": "ema",
        "sha256": fingerprint(guide.network),
    }
    assert torch.equal(guide.network.state_dict()["blocks.0.attn.qkv.weight"], weak.state["blocks.0.attn.qkv.weight"])
    assert guide_of(run_of(root, guide_step=3, cfg_scale=1.0))[0] is None and guide_of(run_of(root))[0] is None


def test_another_network_guides_the_images(root, tmp_path):
    """As the sampler does it with both networks, and other images than those that the null label guides."""
    weak = published(root, "weak.pt", depth=12, hidden_size=384, num_heads=6)
    settings = dict(num_sampling_steps=3, fid_num=2, per_proc_batch_size=2, cfg_scale=2.0, cfg_interval_start=0.0)
    run = run_of(root, guide_ckpt_path=str(weak), **settings)
    guide, found = guide_of(run)
    assert (guide.network.config.depth, guide.network.config.num_heads, guide.facts["step"]) == (12, 6, None)
    with np.load(generate(run, tmp_path / "a")) as npz:
        images = npz["arr_0"]
    facts = json.loads((tmp_path / "a" / "samples.json").read_text("utf-8"))
    assert facts["guide"] == guide.facts and facts["guidance"].endswith("by a weaker network")
    assert (facts["nfe"], facts["guided_nfe"]) == (2, 2)
    with np.load(generate(run_of(root, **settings), tmp_path / "b")) as npz:
        assert not np.array_equal(npz["arr_0"], images)
    network = LightningDiT(found.config, OPS).eval().requires_grad_(False)
    network.load_state_dict(found.state)
    named = dict(shape=(4, 4, 4), null_label=None, guide=guide.network)
    made = sample(network, Transport(), run.sampling(), torch.tensor([0, 1]), [0, 1], **named)
    with torch.no_grad():
        decoded = load_tokenizer(root / "tokenizer.safetensors", OPS).decode(STATISTICS.denormalise(made.latents))
    assert np.abs(to_uint8(decoded).permute(0, 2, 3, 1).numpy().astype(int) - images).max() <= 1


def test_a_guide_that_cannot_guide_is_refused(root, tmp_path):
    def error(**keys):
        with pytest.raises(ConfigError) as raised:
            guide_of(run_of(root, **keys))
        return str(raised.value)

    assert "has no checkpoint of it before step 7, which is sampled; earlier ones: 3" in error(guide_step=5)
    assert "earlier ones: 3" in error(guide_step=7)
    assert "export is no run with earlier checkpoints" in error(ckpt_path=root / "export", guide_step=3)
    assert "is the sampled one: name a weaker one" in error(guide_ckpt_path=str(root / "run"))
    # The same weights under another path, and in a file that does not say where they are from.
    assert "export, is the sampled one" in error(guide_ckpt_path=str(root / "export"))
    export = read_export(root / "export")
    save_published(tmp_path / "same.pt", export.state, export.state)
    assert "same.pt, is the sampled one" in error(guide_ckpt_path=str(tmp_path / "same.pt"))
    noise = {"transport": TransportConfig(prediction="noise").model_dump()}
    save_export(tmp_path / "noise", replace(export, extra=export.extra | noise))
    assert "was trained with prediction noise" in error(guide_ckpt_path=str(tmp_path / "noise"))
    other = LatentStatistics(STATISTICS.mean + 0.1, STATISTICS.std)
    save_export(tmp_path / "latents", replace(export, latents=other))
    assert "was trained on latents normalised otherwise" in error(guide_ckpt_path=str(tmp_path / "latents"))
    classes = export.config.model_copy(update={"num_classes": 4})
    save_export(tmp_path / "classes", replace(export, config=classes))
    assert "has num_classes 4; that of the samples has 3" in error(guide_ckpt_path=str(tmp_path / "classes"))
    odd = tmp_path / "odd.pt"
    torch.save({"ema": export.state | {"blocks.2.norm1.weight": torch.ones(32)}}, odd)
    assert "is a network of 3 blocks of width 32, no registered size" in error(guide_ckpt_path=str(odd))
