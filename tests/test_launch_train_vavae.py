"""Training of a tokenizer with all terms as a user runs it: ZeRO, graphs, activation checkpointing, stages, kills."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.config import ConfigError, load
from launch.train import run_training
from launch.training import checkpoint
from tests import toy
from tests.children import Moment, launch
from tests.test_launch_train import assert_same_run, rows

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return toy.write_images(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run_file(tmp_path, data):
    def write(**sections) -> str:
        sections["data"] = {"data_path": str(data), **sections.get("data", {})}
        sections["train"] = {"output_dir": str(tmp_path), **sections.get("train", {})}
        return str(toy.write_aligned(tmp_path / "run.yaml", toy.VAVAE, tmp_path, **sections))

    return write


def train_here(path: str, *overrides: str) -> None:
    run_training(load(path, list(overrides), kind="vavae")[0], "vavae")


def assert_alike(one: Path, other: Path, rel: float) -> None:
    """The same losses, weights of terms and norms of gradients to rounding, step by step."""
    for a, b in zip(rows(one), rows(other), strict=True):
        assert b == pytest.approx(a, rel=rel, abs=1e-4)
    assert {"vf_weight", "d_weight", "autoencoder/grad_norm", "discriminator/grad_norm"} <= a.keys()


@pytest.mark.parametrize(
    "overrides",
    [
        ("deepspeed.zero_stage=0",),
        ("deepspeed.zero_stage=2",),
        ("train.compile=aot_eager",),
        ("train.use_checkpoint=true",),
        ("train.compile=aot_eager", "train.use_checkpoint=pointwise"),
    ],
    ids=" ".join,
)
def test_every_way_to_train_gives_the_same_run(tmp_path, run_file, overrides):
    path = run_file()
    train_here(path, "train.exp_name=plain", "train.compile=none")
    train_here(path, "train.exp_name=other", *overrides)
    assert_alike(tmp_path / "plain", tmp_path / "other", rel=1e-3)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_bfloat16_trains_with_losses_near_float32(tmp_path, run_file, stage):
    path = run_file(train={"max_steps": 3})
    train_here(path, "train.exp_name=float32")
    train_here(path, "train.exp_name=bfloat16", "train.precision=bfloat16", f"deepspeed.zero_stage={stage}")
    first, second = (rows(tmp_path / name)[0] for name in ("float32", "bfloat16"))
    for key in ("nll", "kl", "vf_distmat", "vf_cos"):
        assert second[key] == pytest.approx(first[key], rel=0.03), key


def test_pointwise_checkpointing_of_two_balanced_terms_needs_graphs(run_file):
    path = run_file()
    asked = ["train.use_checkpoint=pointwise", "train.compile=none"]
    with pytest.raises(ConfigError, match=r"use_checkpoint is pointwise and .* the VF and the GAN term .* inductor"):
        load(path, asked, kind="vavae")
    with pytest.raises(ValueError, match=r"use_checkpoint is pointwise, .* the VF and the GAN term .* inductor"):
        train_here(path, asked[0])  # "auto" compiles nothing on a CPU
    for unbalanced in ("loss.disc_weight=0", "loss.adaptive_vf=false", "loss.vf_weight=0"):
        assert load(path, [*asked, unbalanced], kind="vavae")
    with pytest.raises(ConfigError, match=r"residual_dtype is for LightningDiT"):
        load(path, ["train.residual_dtype=bfloat16"], kind="vavae")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_stage_without_the_vf_term_costs_none(tmp_path, run_file, stage):
    """Weight 0 in the first stage of an epoch, three steps of ten images: no term in its rows, and its weights rest."""
    stages = [{"epochs": 1, "loss": {"vf_weight": 0.0}}, {"epochs": 1}]
    path = run_file(train={"max_steps": 4, "ckpt_every": 1}, loss={"disc_weight": 0.0})
    content = toy.read_run(Path(path)) | {"stages": stages, "deepspeed": {"zero_stage": stage}}
    train_here(str(toy.write_run(tmp_path / "staged.yaml", content)))
    found = rows(tmp_path / "run")
    assert ["vf_cos" in row for row in found] == [False, False, False, True]
    projections = [
        checkpoint.Checkpoint(tmp_path / f"run/checkpoints/step_{step:07d}").weights("autoencoder", "model")
        for step in (1, 3, 4)
    ]
    first, third, fourth = (weights["linear_proj.weight"] for weights in projections)
    assert torch.equal(first, third) and not torch.equal(third, fourth)


def test_killed_in_the_second_of_three_stages_and_started_again(tmp_path, run_file):
    """On two processes, with VF and GAN, float32: the same bits as a run that was never killed."""
    stages = [
        {"epochs": 1, "loss": {"vf_weight": 0.5, "distmat_margin": 0.0, "cos_margin": 0.0}},
        {"epochs": 1, "loss": {"distmat_margin": 0.0, "cos_margin": 0.0}},
        {"epochs": 1, "loss": {"vf_weight": 0.1}},
    ]
    path = run_file(train={"max_steps": 8, "ckpt_every": 2})  # 4 of 10 images a step: stages end in steps 3, 5 and 8
    content = toy.read_run(Path(path)) | {"stages": stages}
    path = str(toy.write_run(tmp_path / "staged.yaml", content))
    command = ("train", "vavae", path, "train.exp_name=killed")
    assert launch("train", "vavae", path, "train.exp_name=whole", world_size=2) == [0, 0]
    moment = Moment("launch.training.engine:Engine", "step", 8)  # two engines from step 3: in the fifth step
    assert -signal.SIGKILL in launch(*command, "train.background_save=false", world_size=2, at=moment)
    assert checkpoint.newest(tmp_path / "killed/checkpoints").step == 4
    assert launch(*command, world_size=2) == [0, 0]
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("overrides", [(), ("train.compile=aot_eager",)], ids=["eager", "compiled"])
def test_no_step_reads_on_the_host(tmp_path, run_file, overrides):
    path = run_file(train={"precision": "bfloat16", "max_steps": 4})
    command = [sys.executable, "-m", "tests.host_reads", "vavae", path, str(tmp_path / "reads.json"), *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "reads.json").read_text())["reads"] == {}
