"""What a plan says of a run file's keys that have no effect or contradict the run's length, and its stages."""

import pytest

from launch.config import load
from launch.config_files import SHIPPED
from launch.train import main
from launch.training.remarks import remarks, stage_lines
from tests import toy


def tokenizer(tmp_path, *overrides: str):
    path = toy.write_run(tmp_path / "run.yaml", toy.VAVAE, data={"data_path": "/absent"})
    return load(path, list(overrides), kind="vavae")[0]


STAGES = "stages=[{epochs: 4, loss: {kl_weight: 0.5}}, {epochs: 3}]"


def test_stages_are_listed_with_their_epochs(tmp_path):
    """Batches of 4 of 10 images: epoch 4 begins after 10 steps."""
    lines = stage_lines(tokenizer(tmp_path, STAGES), 10)
    assert lines[0] == "stage 1, epochs 0 to 4, from step 1: kl_weight 0.5"
    assert lines[1] == "stage 2, epochs 4 to 7, from step 11: the run's own loss"


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (5, ["before stage 1 does after 4", "stage 2 would begin after 4: it never does"]),
        (15, ["the run ends after 6.0 epochs, before stage 2 does after 7"]),
        (18, []),  # 7.2 epochs: a step more than 7
        (50, ["the stages are 7 epochs and the run is 20.0"]),
    ],
)
def test_a_run_that_is_not_as_long_as_its_stages_is_told(tmp_path, steps, words):
    about = [line for line in remarks(tokenizer(tmp_path, STAGES, "loss.disc_start=1"), steps, 10) if "epochs" in line]
    assert len(about) == len(words) and all(word in line for word, line in zip(words, about, strict=True))


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["foundation={}"], "foundation (model_name vit_large_patch14_dinov2.lvd142m) has no effect: loss.use_vf is"),
        (["stages=[{epochs: 20, loss: {vf_weight: 1.0}}]"], "stage 1: vf_weight have no effect: loss.use_vf is false"),
        (["loss.disc_start=90"], "loss.disc_start 90 is after the last of 50 steps"),
        (["train.ckpt_every=60"], "train.ckpt_every 60 is more than the run's 50 steps"),
        (["train.log_every=60"], "train.log_every 60 is more than the run's 50 steps"),
        (["optimizer.warmup_steps=50"], "optimizer.warmup_steps 50 do not end"),
        (["ckpt_path=/a.pt"], "ckpt_path /a.pt is not read by training: train.ckpt goes on"),
        (["data.valid_path=/v", "train.valid_every=51"], "train.valid_every 51 is more than"),
    ],
)
def test_what_has_no_effect_is_said(tmp_path, overrides, word):
    assert remarks(tokenizer(tmp_path), 50, 10) == []
    (said,) = remarks(tokenizer(tmp_path, *overrides), 50, 10)
    assert word in said


NO_DATA = "data.valid_path names no data: nothing is validated"


@pytest.mark.parametrize(
    ("kind", "overrides", "notes"),
    [
        ("vavae", ["train.valid_batches=2"], [f"train.valid_batches is 2, but {NO_DATA}"]),
        (
            "vavae",
            ["train.valid_weights=model", "train.valid_batches=2", "train.pictures=4"],
            [
                f"train.valid_batches is 2, but {NO_DATA}",
                f"train.valid_weights is model, but {NO_DATA}",
                "train.pictures is 4, but data.valid_path names no images to show",
            ],
        ),
        (
            "vavae",
            ["train.valid_weights=model", "data.valid_path=/v"],
            ["train.valid_weights is model, but optimizer.ema_decay is 0: no average is kept, and the weights are "],
        ),
        ("vavae", ["train.valid_batches=2", "data.valid_path=/v"], []),
        (
            "lightningdit",
            ["train.preview_steps=50"],
            ["train.preview_steps is 50, but vae.ckpt_path names no tokenizer: there are no previews"],
        ),
        (
            "lightningdit",
            ["train.preview_steps=50", "train.previews=0", "vae.ckpt_path=/v"],
            ["train.preview_steps is 50, but train.previews is 0: there are no previews"],
        ),
        ("lightningdit", ["train.preview_steps=50", "vae.ckpt_path=/v"], []),
    ],
)
def test_what_has_no_effect_is_said_once_whatever_the_program(tmp_path, kind, overrides, notes):
    content = toy.VAVAE if kind == "vavae" else toy.LIGHTNINGDIT
    path = toy.write_run(tmp_path / "run.yaml", content, data={"data_path": "/absent"})
    run, found = load(path, overrides, kind=kind)
    assert len(found) == len(notes) and all(map(str.startswith, found, notes))
    assert remarks(run, 50, 10) == []  # which a plan says beside them


def test_a_start_says_what_training_does_not_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("launch.train.run_training", lambda run, kind: (tmp_path, None))
    path = toy.write_run(tmp_path / "run.yaml", toy.LIGHTNINGDIT, data={"data_path": "/absent"})
    for changes, times in (([], 0), (["ckpt_path=/a.pt"], 1)):
        assert main(["lightningdit", str(path), *changes]) == 0
        assert capsys.readouterr().out.count("ckpt_path /a.pt is not read by training") == times


def test_previews_after_the_last_step_are_said(tmp_path):
    path = toy.write_run(tmp_path / "run.yaml", toy.LIGHTNINGDIT, data={"data_path": "/absent"})
    for every, said in (
        (50, []),
        (51, ["train.preview_every 51 is more than the run's 50 steps: one preview at its end"]),
    ):
        run, _ = load(path, ["vae.ckpt_path=/v", f"train.preview_every={every}"], kind="lightningdit")
        assert remarks(run, 50, 10) == said


def test_of_two_checkpointing_keys_the_one_that_counts_is_said():
    path = SHIPPED / "lightningdit_xl_64ep.yaml"
    run, _ = load(path, ["model.use_checkpoint=true", "train.use_checkpoint=2"], kind="lightningdit")
    assert remarks(run, 10**6, 10**6) == ["train.use_checkpoint 2 has no effect: model.use_checkpoint True comes first"]
    run, _ = load(path, ["transport.lognorm_until_step=80000"], kind="lightningdit")
    assert remarks(run, 80_000, 10**6) == [
        "transport.lognorm_until_step 80,000 has no effect: the run has 80,000 steps"
    ]
