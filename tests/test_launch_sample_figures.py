"""Figures of samples in training: by hand from a checkpoint's weights, by several processes, refused by name."""

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

import kernels
from common.files import sha256
from launch.comparison.curves import read_curves
from launch.config import ConfigError, load
from launch.digits_demo import dataset
from launch.digits_demo.classifier import DigitClassifier
from launch.evaluation.config import FigureName
from launch.evaluation.features import FoundationFeatures
from launch.evaluation.figures import FIGURES
from launch.evaluation.known_features import files_hash
from launch.evaluation.shares import BATCHES_PER_PART, Share
from launch.gallery_page.curves import curves
from launch.run_directory.rows import read_rows
from launch.run_directory.summary import summarize
from launch.runtime.processes import Processes
from launch.status import remarks as status_remarks
from launch.training import checkpoint, checks
from launch.training.build import make_trainer
from launch.training.costs import setup_of
from launch.training.engine import start_processes
from launch.training.remarks import remarks
from launch.training.sample_figures import figure_settings, judge_source, judged_at_once
from lightningdit.config import SampleConfig
from lightningdit.model import LightningDiT
from lightningdit.sampler import sample
from tests import toy
from tests.children import launch
from tests.measured import distance, images, save_folder, share_inside, small_foundation
from vavae.config import AutoencoderConfig
from vavae.images import to_uint8
from vavae.model import AutoencoderKL
from vavae.weights import load_tokenizer, write_export

OPS = kernels.select("reference")
COUNT, POINTS = 20, 3  # of two processes shares are 12 and 8: three micro-batches and two
SAMPLING = {"cfg_scale": 2.0, "cfg_interval_start": 0.1, "timestep_shift": 0.3, "seed": 7, "labels": "random"}
FIGURES_HERE = ["fid", "precision", "recognised"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Latents of 32 × 32 pixels, random weights of a tokenizer and of a foundation model, real images."""
    root = tmp_path_factory.mktemp("figures")
    toy.write_random_latents(root / "latents", (12, 8), shard_size=12, shape=(4, 8, 8))
    config = AutoencoderConfig(**toy.VAVAE["model"] | {"ch_mult": [1, 1, 1]})
    torch.manual_seed(0)
    write_export(root / "vae.safetensors", AutoencoderKL(config, OPS).state_dict(), config, step=0)
    small_foundation(root)
    save_folder(root / "real", images(1, 30, size=32))
    return root


@pytest.fixture
def run_file(tmp_path, root):
    def write(**evaluation) -> Path:
        asked = {"figures": FIGURES_HERE, "samples": COUNT, "num_sampling_steps": POINTS}
        asked |= {"reference": str(root / "real"), "foundation": str(root / "net.safetensors")}
        return toy.write_run(
            tmp_path / "run.yaml",
            toy.LIGHTNINGDIT,
            data={"data_path": str(root / "latents"), "image_size": 32, "num_classes": 10},
            vae={"ckpt_path": str(root / "vae.safetensors")},
            train={"output_dir": str(tmp_path), "max_steps": 3, "ckpt_every": 2, "previews": 0},
            sample=SAMPLING,
            evaluation=asked | evaluation,
        )

    return write


def trainer(path: Path, *overrides: str):
    return make_trainer(load(path, overrides, kind="lightningdit")[0], "lightningdit", start_processes())


def rows(directory: Path) -> dict[int, dict]:
    """Step → the figures."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]
    found = [row for row in lines if any(key.startswith("samples/") for key in row)]
    assert len({row["step"] for row in found}) == len(found)
    return {
        row["step"]: {key: row[f"samples/{key}"] for key in [*FIGURES, "seconds"] if f"samples/{key}" in row}
        for row in found
    }


def without_time(found: dict[int, dict]) -> dict[int, dict]:
    return {step: {key: value for key, value in row.items() if key != "seconds"} for step, row in found.items()}


def alike(one: dict, other: dict) -> bool:
    """Whether figures differ by no more than pixels that are rounded otherwise explain: one sample, of shares."""
    share = {"abs": 1.01 / COUNT}
    return one["fid"] == pytest.approx(other["fid"], rel=1e-3) and all(
        one[key] == pytest.approx(other[key], **share) for key in ("precision", "recognised")
    )


def test_the_figures_are_those_of_the_averages_samples(tmp_path, run_file, root):
    """By hand, from the weights of the checkpoint; training is the same without them, bit for bit."""
    path = run_file()
    run = trainer(path)
    run.run()
    trainer(path, "train.exp_name=blind", "evaluation={}").run()
    found = checkpoint.Checkpoint(tmp_path / "run/checkpoints/step_0000003")
    blind = checkpoint.Checkpoint(tmp_path / "blind/checkpoints/step_0000003")
    for key in ("model", "ema", "exp_avg"):
        assert all(torch.equal(found.tensors("model", key)[n], t) for n, t in blind.tensors("model", key).items())
    assert list(rows(tmp_path / "run")) == [2, 3] and rows(tmp_path / "blind") == {}

    labels, digits = run._evaluations.figures._labels, dataset.source()
    assert labels.tolist() != [i % 10 for i in range(COUNT)] and len(labels) == COUNT  # the section's protocol
    settings = SampleConfig(**SAMPLING, num_sampling_steps=POINTS)
    tokenizer, judge = (
        load_tokenizer(root / "vae.safetensors", OPS),
        DigitClassifier(digits["train"], digits["heldout"]),
    )
    pooled = FoundationFeatures.from_file(root / "net.safetensors").pooled
    real, got = pooled(images(1, 30, size=32)).double().numpy(), rows(tmp_path / "run")[3]
    by_hand = {}
    for key in ("ema", "model"):
        model = LightningDiT(load(path, kind="lightningdit")[0].network(), OPS).eval()
        model.load_state_dict(found.weights("model", key))
        latents = sample(model, run.task.transport, settings, labels, range(COUNT), shape=(4, 8, 8),
                         null_label=10).latents  # fmt: skip
        with torch.no_grad():
            pixels = to_uint8(tokenizer.decode(run.task.batches.statistics.denormalise(latents))).permute(0, 2, 3, 1)
        made = pooled(pixels).double().numpy()
        recognised = judge.recognised(pixels, labels).mean().item()
        by_hand[key] = {
            "fid": distance(made, real),
            "precision": share_inside(real, made),
            "recognised": recognised,
        }
    assert alike(got, by_hand["ema"]) and got["seconds"] > 0
    assert got["fid"] != pytest.approx(by_hand["model"]["fid"], rel=1e-2)


def test_the_same_figures_after_a_resume_and_by_two_processes_under_zero_3(tmp_path, run_file):
    path = str(run_file(every=1))
    trainer(path, "train.exp_name=whole").run()
    trainer(path, "train.exp_name=cut", "train.max_steps=2").run()
    first = without_time(rows(tmp_path / "cut"))
    trainer(path, "train.exp_name=cut").run()
    whole = without_time(rows(tmp_path / "whole"))
    assert without_time(rows(tmp_path / "cut")) == whole and first.items() < whole.items() and len(whole) == 3
    command = ("train", "lightningdit", path, "train.exp_name=two", "deepspeed.zero_stage=3", "train.max_steps=1")
    assert launch(*command, world_size=2) == [0, 0]
    two = without_time(rows(tmp_path / "two"))
    assert list(two) == [1] and alike(two[1], whole[1])
    assert len(list((tmp_path / "two" / "reference").glob("*.safetensors"))) == 1  # measured by one of them


def test_the_reference_is_measured_once_for_all_starts(tmp_path, run_file, root):
    path = run_file(figures=["fid"])
    trainer(path)
    (kept,) = (tmp_path / "run" / "reference").glob("*.safetensors")
    before = kept.stat().st_mtime_ns
    trainer(path)
    assert kept.stat().st_mtime_ns == before


def test_shares_are_of_about_the_same_size():
    for count, world_size in ((1000, 8), (21, 2), (1000, 1), (5000, 8), (2, 4), (50_000, 64)):
        size = judged_at_once(count, world_size, 64)
        shares = [Share.of(count, size, Processes(r, world_size, torch.device("cpu"))) for r in range(world_size)]
        sizes = [share.stop - share.start for share in shares]
        assert sum(sizes) == count and 1 <= size <= 64
        assert max(sizes) <= count / world_size + BATCHES_PER_PART * size, (count, world_size, sizes)


def test_all_processes_call_the_network_equally_often(run_file, monkeypatch):
    """As ZeRO 3 asks for: two of them have 12 and 8 samples, three micro-batches and two."""
    figures, calls = trainer(run_file())._evaluations.figures, {0: 0, 1: 0}
    monkeypatch.setattr(figures, "_described", lambda *_: None)
    monkeypatch.setattr(figures._judge, "compare", lambda _: {})
    for rank in calls:

        def network(x, t, y, rank=rank):
            calls[rank] += 1
            return torch.zeros_like(x)

        processes = Processes(rank, 2, torch.device("cpu"))
        monkeypatch.setattr(Processes, "all_gather", lambda self, value: [12, 8])
        monkeypatch.setattr(Processes, "any", lambda self, flag: flag)
        figures.measure({"model": network}, processes, 4)
    assert calls[0] == calls[1] > 0


def test_a_process_may_have_no_share(tmp_path, run_file):
    """Two samples of two processes: parts are of four."""
    path = str(run_file(samples=2, figures=["recognised"], reference=None, foundation=None))
    trainer(path, "train.exp_name=one", "train.max_steps=1").run()
    assert launch("train", "lightningdit", path, "train.exp_name=two", "train.max_steps=1", world_size=2) == [0, 0]
    assert without_time(rows(tmp_path / "two")) == without_time(rows(tmp_path / "one"))


def test_samples_that_are_not_finite_are_nulls_and_a_warning(tmp_path, run_file, caplog, monkeypatch):
    run = trainer(run_file(), "train.max_steps=1")
    figures = run._evaluations.figures
    made = torch.zeros(1, 4, 8, 8).index_fill(1, torch.tensor([3]), torch.inf)
    monkeypatch.setattr(figures, "_sample", lambda model, numbers, processes: made.expand(len(numbers), -1, -1, -1))
    caplog.clear()
    run.run()
    said = [r.getMessage() for r in caplog.records if r.name == "launch.training.log"]
    assert said == ["no figures of the samples of step 1: the samples are not finite"]
    assert without_time(rows(tmp_path / "run")) == {1: dict.fromkeys(FIGURES_HERE)}
    assert "samples at step 1: not finite" in status_remarks(summarize(tmp_path / "run"))


def test_a_run_does_not_end_for_a_figure(tmp_path, run_file, caplog):
    """A covariance that is none is found out where it is compared with."""
    np.savez(tmp_path / "odd.npz", mu=np.zeros(12), sigma=-np.eye(12))
    path = run_file(reference=str(tmp_path / "odd.npz"), figures=["fid", "recognised"])
    trainer(path, "train.max_steps=2").run()
    assert without_time(rows(tmp_path / "run")) == {2: {"fid": None, "recognised": None}}
    said = [r.getMessage() for r in caplog.records if r.name == "launch.training.log"]
    assert len(said) == 1 and said[0].startswith("no figures of the samples of step 2: ")
    assert "odd.npz" in said[0] and "negative eigenvalue" in said[0]


def test_what_figures_are_of_and_by_is_an_event(tmp_path, run_file, root):
    path = run_file()
    trainer(path, "train.max_steps=2").run()
    trainer(path).run()
    first, again = [e for e in read_rows(tmp_path / "run" / "metrics.jsonl").events if e["event"] == "evaluation"]
    assert (first.pop("step"), again.pop("step")) == (0, 2) and first.pop("time") and again.pop("time")
    assert first == again and first["samples"] == COUNT and first["num_sampling_steps"] == POINTS
    assert first["figures"] == "fid, precision, recognised" and first["labels"] == "random"
    assert sha256(root / "net.safetensors") in first["features"] and "scikit-learn" in first["features"]
    assert first["reference"] == str(root / "real") and first["reference_sha256"] == files_hash(root / "real")
    assert "scale 2" in first["guidance"]


def test_readers_of_a_log_tell_the_rows_apart(tmp_path, run_file):
    trainer(run_file(), "train.log_every=1").run()
    found = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in found.training] == [1, 2, 3] and not found.validation
    assert [row["step"] for row in found.samples] == [2, 3]
    last = rows(tmp_path / "run")[3]
    assert summarize(tmp_path / "run").samples == {"step": 3, **last}
    (said,) = [text for text in status_remarks(summarize(tmp_path / "run")) if text.startswith("samples")]
    assert said.startswith(f"samples at step 3: fid {last['fid']:.4g}, precision") and "seconds" not in said
    drawn = curves({"run": found})
    assert {chart["name"]: chart["keys"] for chart in drawn["charts"]}["samples"] == [
        f"samples/{name}" for name in FIGURES_HERE
    ]
    (series,) = drawn["series"]["samples/fid"]
    values = [row["samples/fid"] for row in found.samples]
    assert series["x"] == [2, 3] and series["y"] == pytest.approx(values, rel=1e-5)  # six digits are kept
    curve = read_curves([tmp_path / "run"], "samples/fid")[0][0]
    assert curve.steps.tolist() == [2, 3] and curve.values.tolist() == values
    assert curve.hours.tolist() == found.hours()[1:].tolist()
    with pytest.raises(ConfigError, match=r"no 'samples/kid'; its rows have .*samples/fid"):
        read_curves([tmp_path / "run"], "samples/kid")
    assert "samples/seconds" in next(chart for chart in drawn["charts"] if chart["name"] == "other")["keys"]


def test_settings_are_the_sample_sections_with_fewer_steps(run_file):
    def settings(*overrides: str) -> SampleConfig:
        return figure_settings(load(run_file(), overrides, kind="lightningdit")[0])

    assert settings() == SampleConfig(**SAMPLING, num_sampling_steps=POINTS)
    assert settings("evaluation.cfg_scale=1").cfg_scale == 1
    assert settings("evaluation.cfg_scale=3").cfg_scale == 3
    assert settings("model.class_dropout_prob=0").cfg_scale == 1
    with pytest.raises(ConfigError, match=r"evaluation\.cfg_scale 3 needs a null label"):
        settings("model.class_dropout_prob=0", "evaluation.cfg_scale=3")


def test_names_are_those_of_the_figures(run_file):
    assert set(get_args(FigureName)) == set(FIGURES)
    assert load(run_file(), ["evaluation.figures=fid"], kind="lightningdit")[0].evaluation.figures == ("fid",)
    for value, words in (("[fid,fid]", "'fid' stands there twice"), ("[fix]", r"evaluation\.figures")):
        with pytest.raises(ConfigError, match=words):
            load(run_file(), [f"evaluation.figures={value}"], kind="lightningdit")
    with pytest.raises(ConfigError, match="no SHA-256"):
        load(run_file(), ["evaluation.inception_sha256=abc"], kind="lightningdit")


def test_what_cannot_be_is_refused_before_anything_is_built(run_file, root):
    with pytest.raises(ConfigError, match=r"evaluation\.figures is fid, but vae\.ckpt_path names no tokenizer"):
        load(run_file(), ["vae.ckpt_path=null", "evaluation.figures=fid"], kind="lightningdit")
    for overrides, words in (
        (["evaluation.foundation=null"], r"fid, precision: name Inception's weights \(evaluation\.inception_weights"),
        (["evaluation.foundation=/x"], r"evaluation\.foundation /x does not exist"),
        (["evaluation.reference=null"], r"no reference \(evaluation\.reference, or data\.fid_reference_file\)"),
        (["evaluation.dinov2_weights=/x"], r"evaluation\.dinov2_weights /x: no figure reads it"),
        (["evaluation.samples=3"], r"evaluation\.samples is 3; precision: of more than 3"),
        (["data.image_size=64"], r"recognised: of digits of 32×32, not of images of 64×64"),
        (["vae.ckpt_path=/no/file"], r"vae\.ckpt_path: /no/file does not exist"),
        (["evaluation.cfg_scale=3", "model.class_dropout_prob=0"], "needs a null label"),
    ):
        run, _ = load(run_file(), overrides, kind="lightningdit")
        with pytest.raises(ConfigError, match=words):
            checks.check_run(run)
    run, _ = load(run_file(reference=None), [f"data.fid_reference_file={root / 'real'}"], kind="lightningdit")
    assert judge_source(run).reference == root / "real"
    run, _ = load(run_file(figures=["recognised"], reference=None, foundation=None), kind="lightningdit")
    run = run.model_copy(update={"data": run.data.model_copy(update={"fid_reference_file": "/absent.npz"})})
    assert judge_source(run).reference is None, "the published key names what no figure reads"


def test_a_reference_that_does_not_fit_is_refused_before_the_first_step(tmp_path, run_file):
    np.savez(tmp_path / "known.npz", mu=np.zeros(12), sigma=np.eye(12))
    save_folder(tmp_path / "small", images(1, 30))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(13), sigma=np.eye(13))
    for reference, figures, words in (
        ("known.npz", ["precision"], "precision needs the features of single images, and .*known.npz gives statistics"),
        ("wide.npz", ["fid"], "holds statistics of 13 features; the network to compare by gives 12"),
        ("small/000.png", ["fid"], "small/000.png"),
    ):
        with pytest.raises(ConfigError, match=words):
            trainer(run_file(reference=str(tmp_path / reference), figures=figures))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_keys_without_effect_and_late_measurements_are_said(run_file):
    run, notes = load(run_file(), ["evaluation.figures=[]"], kind="lightningdit")
    assert [note for note in notes if "evaluation.samples" in note] == [
        f"evaluation.samples is {COUNT}, but evaluation.figures names none"
    ]
    digest = f"evaluation.inception_sha256={'AB' * 32}"
    run, notes = load(run_file(), [digest], kind="lightningdit")
    assert notes == ["evaluation.inception_sha256 is given, but evaluation.inception_weights is null"]
    assert run.evaluation.inception_sha256 == "ab" * 32
    run, notes = load(run_file(every=4), kind="lightningdit")
    assert not notes and remarks(run, 3, 20) == [
        "evaluation.every 4 is more than the run's 3 steps: one measurement at its end"
    ]


def test_a_plan_counts_them(run_file, root):
    """The average in the weights' place, the tokenizer and what it decodes; the foundation model is smaller."""
    path = run_file()
    setups = [setup_of(load(path, more, kind="lightningdit")[0], 1) for more in ([], ["evaluation={}"])]
    assert [setup.averaged for setup in setups] == [True, False]
    assert setups[0].decoding > (root / "vae.safetensors").stat().st_size and setups[1].decoding == 0
    assert setups[0].sampled == 0  # networks are called with micro-batches
