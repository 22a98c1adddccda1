"""Previews in training: the same noise and classes every time, by the average, decoded by the run's tokenizer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import kernels
from launch.config import ConfigError, load
from launch.pictures import sample_grid
from launch.training import checkpoint, checks
from launch.training.build import make_trainer
from launch.training.costs import setup_of
from launch.training.engine import start_processes
from launch.training.memory import DECODED_PIXEL
from launch.training.previews import few_step_settings, in_batches, preview_labels
from lightningdit.config import SampleConfig
from lightningdit.model import LightningDiT
from lightningdit.sampler import sample
from tests import toy
from tests.children import launch
from tests.live_memory import LiveMemory
from vavae.config import AutoencoderConfig
from vavae.images import to_uint8
from vavae.model import AutoencoderKL
from vavae.weights import load_tokenizer, write_export

OPS = kernels.select("reference")
COUNT, POINTS = 5, 3
SAMPLING = {"cfg_scale": 2.0, "cfg_interval_start": 0.1, "timestep_shift": 0.3, "seed": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Latents, and the random weights of a tokenizer for them."""
    root = tmp_path_factory.mktemp("previews")
    toy.write_latents(root / "latents", classes=["a", "b", "c"])
    config = AutoencoderConfig(**toy.VAVAE["model"] | {"ch_mult": [1, 1, 1]})
    torch.manual_seed(0)
    write_export(root / "vae.safetensors", AutoencoderKL(config, OPS).state_dict(), config, step=0)
    return root


@pytest.fixture
def run_file(tmp_path, root):
    def write(**train) -> Path:
        settings = {"output_dir": str(tmp_path), "max_steps": 4, "ckpt_every": 2, "previews": COUNT}
        return toy.write_run(
            tmp_path / "run.yaml",
            toy.LIGHTNINGDIT,
            data={"data_path": str(root / "latents")},
            vae={"ckpt_path": str(root / "vae.safetensors")},
            train=settings | {"preview_steps": POINTS} | train,
            sample=SAMPLING,
        )

    return write


def test_a_plan_counts_previews_of_5_images(run_file, root):
    """The average in the weights' place without any validation, both passes of guidance, and the tokenizer."""
    with_them, without = (setup_of(load(run_file(previews=n), kind="lightningdit")[0], 2) for n in (COUNT, 0))
    assert (with_them.averaged, with_them.sampled, without.averaged, without.sampled) == (True, 6, False, 0)
    weights = (root / "vae.safetensors").stat().st_size
    assert (with_them.decoding, without.decoding) == (weights + 4 * 16**2 * DECODED_PIXEL, 0)
    absent = load(run_file(), ["vae.ckpt_path=/absent", "train.previews=null"], kind="lightningdit")[0]
    assert setup_of(absent, 2) == without


def test_a_decoder_takes_as_much_as_is_planned():
    """Of the published sizes with a quarter of the channels, tensor by tensor."""
    small = AutoencoderKL(AutoencoderConfig(embed_dim=32, z_channels=32, ch=32), OPS).requires_grad_(False)
    with LiveMemory() as memory:
        small.decode(torch.randn(2, 32, 2, 2))
    assert memory.peak == pytest.approx(2 * 32**2 * DECODED_PIXEL / 4, rel=0.01)


def trainer(path: Path, *overrides: str):
    return make_trainer(load(path, overrides, kind="lightningdit")[0], "lightningdit", start_processes())


def pictures(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((directory / "previews").iterdir())}


def test_a_picture_is_what_the_sampler_makes_of_the_average(tmp_path, run_file, root):
    """By hand, from the weights of the checkpoint; training is the same without previews, bit for bit."""
    path = run_file()
    run = trainer(path)
    run.run()
    trainer(path, "train.exp_name=blind", "train.previews=0").run()
    found = checkpoint.Checkpoint(tmp_path / "run/checkpoints/step_0000004")
    blind = checkpoint.Checkpoint(tmp_path / "blind/checkpoints/step_0000004")
    for key in ("model", "ema", "exp_avg"):
        assert all(torch.equal(found.tensors("model", key)[n], t) for n, t in blind.tensors("model", key).items())
    assert list(pictures(tmp_path / "run")) == ["step_0000002.png", "step_0000004.png"]
    assert not (tmp_path / "blind/previews").exists()

    network = load(path, kind="lightningdit")[0].network()
    settings = SampleConfig(**SAMPLING, num_sampling_steps=POINTS)
    labels, tokenizer = [0, 1, 0, 1, 0], load_tokenizer(root / "vae.safetensors", OPS)
    drawn = {}
    for key in ("ema", "model"):
        model = LightningDiT(network, OPS).eval()
        model.load_state_dict(found.weights("model", key))
        made = sample(model, run.task.transport, settings, torch.tensor(labels), range(COUNT), shape=(4, 4, 4),
                      null_label=network.null_label)  # fmt: skip
        with torch.no_grad():
            images = to_uint8(tokenizer.decode(run.task.batches.statistics.denormalise(made.latents)))
        sample_grid(images.permute(0, 2, 3, 1), torch.tensor(labels), tmp_path / f"{key}.png", names=["a", "b", "c"])
        drawn[key] = np.asarray(Image.open(tmp_path / f"{key}.png")).astype(int)
    got = np.asarray(Image.open(tmp_path / "run/previews/step_0000004.png")).astype(int)
    assert np.abs(got - drawn["ema"]).max() <= 1 < np.abs(got - drawn["model"]).max()


def test_the_same_pictures_after_a_resume_and_by_two_processes_under_zero_3(tmp_path, run_file):
    """Five samples of two processes: three each, one of them twice."""
    path = str(run_file(preview_every=1, max_steps=3))
    trainer(path, "train.exp_name=whole").run()
    trainer(path, "train.exp_name=cut", "train.max_steps=2").run()
    first = pictures(tmp_path / "cut")
    trainer(path, "train.exp_name=cut").run()
    whole = pictures(tmp_path / "whole")
    assert pictures(tmp_path / "cut") == whole and first.items() < whole.items() and len(set(whole.values())) == 3
    command = ("train", "lightningdit", path, "train.exp_name=two", "deepspeed.zero_stage=3", "train.max_steps=1")
    assert launch(*command, world_size=2) == [0, 0]
    one, two = (np.asarray(Image.open(tmp_path / name / "previews/step_0000001.png")) for name in ("whole", "two"))
    assert np.abs(one.astype(int) - two).max() <= 1


def test_previews_are_guided_as_samples_are_by_a_solver_of_few_steps(run_file):
    def settings(*overrides: str) -> SampleConfig:
        return few_step_settings(load(run_file(), overrides, kind="lightningdit")[0], POINTS)

    assert settings() == SampleConfig(**SAMPLING, num_sampling_steps=POINTS)
    assert settings("sample.sampling_method=heun").sampling_method == "heun"
    for overrides in (("sample.sampling_method=dopri5",), ("sample.mode=SDE", "sample.sampling_method=heun")):
        assert settings(*overrides) == settings()
    assert not settings("sample.likelihood=true", "sample.cfg_scale=1").likelihood
    assert settings("model.class_dropout_prob=0").cfg_scale == 1  # nothing to be guided away from
    assert settings("sample.guide_step=3") == settings(), "a network that guides is not loaded beside the trained one"


def test_where_the_tokenizer_is_not_there_by_default_there_are_none(tmp_path, run_file, capsys):
    trainer(run_file(previews=None), "vae.ckpt_path=/no/file.safetensors", "train.max_steps=1")
    assert "no previews: vae.ckpt_path /no/file.safetensors is not there" in capsys.readouterr().out
    path = run_file(previews=None)
    assert load(path, kind="lightningdit")[0].num_previews() == 16
    assert load(path, ["vae.ckpt_path=null"], kind="lightningdit")[0].num_previews() == 0


def test_a_tokenizer_of_the_hub_is_there_by_default(run_file, root, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "launch.hub.download", lambda reference: asked.append(str(reference)) or root / "vae.safetensors"
    )
    found = trainer(run_file(previews=None), "vae.ckpt_path=hf://someone/tokenizer", "train.max_steps=1")
    assert found._evaluations.previews is not None and asked == ["hf://someone/tokenizer"]


def test_previews_that_cannot_be_are_refused_by_name(tmp_path, run_file):
    for overrides, message in {
        ("vae.ckpt_path=null",): r"train\.previews is 5, but vae\.ckpt_path names no tokenizer",
        ("train.previews=0", "train.preview_every=2"): r"train\.preview_every is 2, but train\.previews is 0",
        ("train.previews=null", "train.preview_every=2", "vae.ckpt_path=null"): r"is 2, but vae\.ckpt_path names no",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load(run_file(), overrides, kind="lightningdit")
    run, _ = load(run_file(), ["vae.ckpt_path=/no/file.safetensors"], kind="lightningdit")
    with pytest.raises(ConfigError, match=r"vae\.ckpt_path: /no/file\.safetensors does not exist"):
        checks.check_run(run)
    narrow = AutoencoderConfig(**toy.VAVAE["model"] | {"embed_dim": 3})
    write_export(tmp_path / "narrow.safetensors", AutoencoderKL(narrow, OPS).state_dict(), narrow, step=0)
    with pytest.raises(ConfigError, match="decodes latents of 3 channels, the model makes 4"):
        trainer(run_file(), f"vae.ckpt_path={tmp_path}/narrow.safetensors")


def test_samples_that_are_not_finite_are_no_picture(tmp_path, run_file, caplog):
    run = trainer(run_file(max_steps=1))
    run._evaluations.previews.sample = lambda *_: torch.full((COUNT, 4, 4, 4), torch.nan)
    caplog.clear()
    run.run()
    said = [r.getMessage() for r in caplog.records if r.name == "launch.training.log"]
    assert said == ["the previews of step 1 are not finite: there is no picture of them"]
    assert not (tmp_path / "run/previews").exists()


def test_a_network_is_called_with_one_size_of_batch():
    sizes = []

    def model(x, t, y):
        sizes.append(len(x))
        return x + t[:, None] * y[:, None]

    x, t, y = torch.randn(10, 2), torch.rand(10), torch.arange(10)
    assert torch.equal(in_batches(model, 4)(x, t, y=y), x + t[:, None] * y[:, None]) and sizes == [4, 4, 4]
    assert in_batches(model, 4)(x[:3], t[:3], y=y[:3]).shape == (3, 2) and sizes[-1] == 4


def test_labels_are_from_all_over_the_classes():
    assert preview_labels(16, 1000)[:5] == [0, 250, 500, 750, 0] and len(preview_labels(16, 1000)) == 16
    assert preview_labels(1, 1000) == [0] and preview_labels(5, 2) == [0, 1, 0, 1, 0]
