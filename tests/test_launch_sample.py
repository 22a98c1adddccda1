"""The sampling and export programs, on a tiny tokenizer and a tiny network."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import kernels
from launch import checkpoint, sample
from launch.config import LightningDiTRun, VavaeRun
from launch.export import export
from launch.export import main as export_main
from launch.trained import build_tokenizer, diffusion_weights
from lightningdit.latents import LatentStatistics
from lightningdit.model import LightningDiT
from lightningdit.weights import read_export, read_weights, save_published
from vavae.config import AutoencoderConfig
from vavae.model import AutoencoderKL
from vavae.weights import load_tokenizer, write_export

TOKENIZER = dict(ch=32, ch_mult=[1, 2], num_res_blocks=1, embed_dim=4, z_channels=4, attn_resolutions=[], resolution=8)
STATISTICS = LatentStatistics(torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([1.0, 2.0, 0.5, 1.5]))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files of a tokenizer, and of a network with weights that are not zero: a checkpoint and a published .pt."""
    root = tmp_path_factory.mktemp("weights")
    ops = kernels.select("reference")
    torch.manual_seed(0)
    tokenizer = AutoencoderKL(AutoencoderConfig(**yaml.safe_load(yaml.safe_dump(TOKENIZER))), ops)
    write_export(root / "tokenizer.safetensors", tokenizer.state_dict(), tokenizer.config)
    run = LightningDiTRun.model_validate(document(root))
    network = LightningDiT(run.network(), ops)
    state = {k: v.detach() for k, v in network.state_dict().items()}
    trained = {k for k, p in network.named_parameters() if p.requires_grad}
    state |= {k: torch.randn_like(state[k]) * 0.05 for k in trained}
    ema = {k: state[k] + 0.01 for k in trained}
    save_published(root / "published.pt", state, state | ema)
    description = dict(
        step=7, kind="lightningdit", config=run.model_dump(mode="json"), ops={}, versions={},
        task={"latents": STATISTICS.to_json(), "num_images": 60},
    )  # fmt: skip
    checkpoint.save(root / "run" / "checkpoints", description, {"model": {"model": state, "ema": ema}})
    return root


def document(root, **sample_keys) -> dict:
    settings = dict(num_sampling_steps=4, fid_num=10, per_proc_batch_size=4, cfg_scale=2.0) | sample_keys
    return {
        "preset": "default",
        "ckpt_path": str(root / "run"),
        "data": {"data_path": str(root / "latents"), "image_size": 8, "num_classes": 3},
        "vae": {"model_name": "tiny", "downsample_ratio": 2, "ckpt_path": str(root / "tokenizer.safetensors")},
        "model": {"hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 1, "in_chans": 4, "use_rope": True,
                  "use_rmsnorm": True, "use_swiglu": True},
        "sample": settings,
        "kernels": "reference",
    }  # fmt: skip


def a_run(root, **sample_keys) -> LightningDiTRun:
    return LightningDiTRun.model_validate(document(root, **sample_keys))


def images_of(npz):
    with np.load(npz) as content:
        return content["arr_0"], content["arr_1"]


def test_images_labels_and_facts(weights, tmp_path):
    npz = sample.generate(a_run(weights), tmp_path / "a")
    images, labels = images_of(npz)
    assert images.shape == (10, 8, 8, 3) and images.dtype == np.uint8
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert len(np.unique(images.reshape(10, -1), axis=0)) == 10
    facts = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert (facts["num_samples"], facts["nfe"], facts["step"], facts["weights"]) == (10, 3, 7, "ema")
    assert 0 < facts["guided_nfe"] < 3 and facts["dtype"] == "float32" and "scale 2" in facts["guidance"]
    assert all(len(value) == 64 for value in facts["hashes"].values())
    assert Image.open(tmp_path / "a" / "samples.png").size[0] > 8
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["samples.json", "samples.npz", "samples.png"]


def test_the_pixels_are_the_decoded_denormalised_samples(weights, tmp_path):
    """Done by hand for one image."""
    from lightningdit.flow import Transport
    from lightningdit.sampler import sample as sample_latents
    from vavae.images import to_uint8

    run, ops = a_run(weights), kernels.select("reference")
    images, _ = images_of(sample.generate(run, tmp_path / "a"))
    network = LightningDiT(run.network(), ops)
    network.load_state_dict(read_weights(weights / "published.pt"))
    made = sample_latents(network, Transport(), run.sampling(), torch.tensor([2]), [5], shape=(4, 4, 4), null_label=3)
    z = made.latents * STATISTICS.std.view(1, -1, 1, 1) + STATISTICS.mean.view(1, -1, 1, 1)
    with torch.no_grad():
        want = to_uint8(load_tokenizer(weights / "tokenizer.safetensors", ops).decode(z))[0].permute(1, 2, 0).numpy()
    assert np.abs(images[5].astype(int) - want).max() <= 1


def test_likelihoods_lie_beside_the_images(weights, tmp_path):
    run = a_run(weights, cfg_scale=1.0, likelihood=True, fid_num=6)
    npz = sample.generate(run, tmp_path / "likely")
    with np.load(npz) as content:
        likelihoods, images = content["log_likelihood"], content["arr_0"]
    assert likelihoods.shape == (6,) and np.isfinite(likelihoods).all() and len(set(likelihoods.tolist())) == 6
    facts = json.loads((tmp_path / "likely" / "samples.json").read_text())
    assert facts["log_likelihood"] == pytest.approx(likelihoods.mean()) and facts["guided_nfe"] == 0
    plain = sample.generate(a_run(weights, cfg_scale=1.0, fid_num=6), tmp_path / "plain")
    assert np.array_equal(images_of(plain)[0], images) and "log_likelihood" not in np.load(plain)


def test_an_interrupted_run_goes_on(weights, tmp_path, monkeypatch):
    whole = sample.generate(a_run(weights), tmp_path / "whole")
    original, calls = sample.Generator.images, []

    def dies(self, indices, labels):
        calls.append(indices)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, indices, labels)

    monkeypatch.setattr(sample.Generator, "images", dies)
    with pytest.raises(KeyboardInterrupt):
        sample.generate(a_run(weights), tmp_path / "cut")
    npz = sample.generate(a_run(weights), tmp_path / "cut")
    assert [list(c) for c in calls] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [8, 9]]
    assert npz.read_bytes() == whole.read_bytes()
    sample.generate(a_run(weights), tmp_path / "cut")
    assert len(calls) == 4  # nothing is made twice


def test_batch_size_and_number_change_no_image(weights, tmp_path):
    few, _ = images_of(sample.generate(a_run(weights, fid_num=4, per_proc_batch_size=3), tmp_path / "few"))
    many, _ = images_of(sample.generate(a_run(weights), tmp_path / "many"))
    assert np.abs(few.astype(int) - many[:4]).max() <= 1


def test_images_of_other_settings_are_not_mixed(weights, tmp_path):
    sample.generate(a_run(weights), tmp_path)
    with pytest.raises(ValueError, match=r"holds images of other guidance, settings .*scale 2 .*scale 3 "):
        sample.generate(a_run(weights, cfg_scale=3.0), tmp_path)


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


def test_wrong_weights_and_labels_are_named(weights, tmp_path):
    base = document(weights)

    def error(labels=None, **changes):
        with pytest.raises(ValueError) as caught:
            sample.generate(LightningDiTRun.model_validate(base | changes), tmp_path, labels=labels)
        return str(caught.value)

    assert "is another network than the config's: depth 2 (config: 3)" in error(model=base["model"] | {"depth": 3})
    assert "vae.ckpt_path is not set" in error(vae=base["vae"] | {"ckpt_path": None})
    assert "does not exist" in error(vae=base["vae"] | {"ckpt_path": str(tmp_path / "x.pt"), "model_name": "a_f16d32"})
    assert "ends in none of f16d16" in error(vae=base["vae"] | {"ckpt_path": str(tmp_path / "x.pt")})
    assert "is no checkpoint" in error(ckpt_path=str(tmp_path))
    assert "is no file" in error(ckpt_path=str(tmp_path / "x.pt"), data=base["data"] | {"latent_norm": False})
    assert "labels [3, -1]: classes are 0 to 2" in error(labels=[0, 3, -1])


def test_tokenizer_of_other_channels(weights, tmp_path):
    config = AutoencoderConfig(**TOKENIZER | {"embed_dim": 3})
    other = AutoencoderKL(config, kernels.select("reference"))
    write_export(tmp_path / "other.safetensors", other.state_dict(), config)
    run = document(weights)
    run["vae"]["ckpt_path"] = str(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="latents of 3 channels, the model makes 4"):
        sample.generate(LightningDiTRun.model_validate(run), tmp_path)


def test_command_line_and_demo(weights, tmp_path, monkeypatch):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(document(weights)))
    monkeypatch.setattr(sample, "DEMO_LABELS", (0, 1, 2, 0, 1, 2, 0, 1))
    assert sample.main([str(config), "--demo", "--output", str(tmp_path / "demo")]) == 0
    assert Image.open(tmp_path / "demo" / "samples.png").size == (32, 16)
    facts = json.loads((tmp_path / "demo" / "samples.json").read_text())
    assert facts["guidance"].startswith("scale 9") and facts["guided_nfe"] == facts["nfe"]
    arguments = [str(config), "sample.num_sampling_steps=2", "--labels", "2,2", "--output", str(tmp_path / "two")]
    assert sample.main(arguments) == 0
    assert images_of(tmp_path / "two" / "samples.npz")[1].tolist() == [2, 2]


def test_export_of_a_network(weights, tmp_path, capsys):
    assert export_main([str(weights / "run"), str(tmp_path / "digits"), "--weights", "model"]) == 0
    assert capsys.readouterr().out.count("lightningdit, step 7") == 3
    found = read_export(tmp_path / "digits")
    state = read_weights(weights / "published.pt", "model")
    assert found.weights == "model" and all(torch.equal(found.state[k], v) for k, v in state.items())
    for which in ("model", "ema"):
        ours, theirs = (read_weights(p, which) for p in (tmp_path / "digits.pt", weights / "published.pt"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_export_of_a_tokenizer(weights, tmp_path):
    tokenizer = load_tokenizer(weights / "tokenizer.safetensors", kernels.select("reference"))
    state = tokenizer.state_dict()
    run = VavaeRun(preset="default", model=tokenizer.config, data={"data_path": "images", "image_size": 8})
    description = dict(step=3, kind="vavae", config=run.model_dump(mode="json"), ops={}, task={}, versions={})
    path = checkpoint.save(tmp_path, description, {"autoencoder": {"model": state, "ema": {}}})
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
