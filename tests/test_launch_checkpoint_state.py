"""A checkpoint's `state.json`, changed by hand under a manifest that agrees: read, or named with its key."""

import copy
import json
import re
from contextlib import closing

import pytest
import torch

from launch.__main__ import main
from launch.config import load
from launch.trained import from_checkpoint
from launch.training import checkpoint
from launch.training.build import make_trainer
from launch.training.checkpoint import Checkpoint, CheckpointError
from launch.training.engine import start_processes
from launch.training.log import Meter
from tests import toy

SKIPPED = {"step": 2, "network": "model", "not_finite": "loss", "ranks": [0]}
METER = {"sums": {"loss": [1.5, 2.0], "unreadable": [3.0, 2.0]}, "counts": ["unreadable"]}
STATE = toy.checkpoint_state(
    3,
    "lightningdit",
    counters={"model": {"applied": 2.0, "skipped": 1.0, "skipped_in_a_row": 0.0, "most_skipped_in_a_row": 1.0}},
    task={"classes": ["a", "b"]},
    since_last_row={"meters": [METER, copy.deepcopy(METER)], "skipped_steps": [SKIPPED]},
)
TENSORS = {key: {"a.bias": torch.arange(3.0)} for key in checkpoint.KEYS}


@pytest.fixture
def rewritten(tmp_path):
    """A checkpoint whose state differs from `STATE` in one place, given as keys joined by dots."""
    path = checkpoint.save(tmp_path, STATE, {"model": TENSORS})

    def rewrite(place: str, value) -> Checkpoint:
        state = copy.deepcopy(STATE)
        *above, last = [int(key) if key.isdigit() else key for key in place.split(".")]
        inner = state
        for key in above:
            inner = inner[key]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
        toy.rewrite_state(path, state)
        return Checkpoint(path)

    return rewrite


WRONG = {
    "counters": [None, {}, [], {"model": {}}, {"model": 3.0}, {"model": [2.0, 1.0, 0.0]}],
    "counters.model.applied": [None, 2.5, -1.0, "2", True],
    "counters.model.skipped": [None, 0.5, -1.0, []],
    "counters.model.skipped_in_a_row": [None, 0.5, -1.0, {}],
    "counters.model.most_skipped_in_a_row": [0.5, -1.0, "1"],
    "since_last_row": [{}, [], 1],
    "since_last_row.meters": [None, [], {}, [{}]],
    "since_last_row.meters.1.sums": [None, []],
    "since_last_row.meters.1.sums.loss": [1.5, [1.5], [1.5, 2.0, 3.0], [1.5, -2.0], ["1.5", 2.0], {}],
    "since_last_row.meters.0.counts": [None, {}, "unreadable", [1]],
    "since_last_row.skipped_steps": [None, {}, [{}], [1], [[]]],
    "since_last_row.skipped_steps.0.step": [None, 0, -1, 1.5, "2"],
    "since_last_row.skipped_steps.0.network": [None, 1],
    "since_last_row.skipped_steps.0.not_finite": [None, "weather", 1],
    "since_last_row.skipped_steps.0.ranks": [None, 0, [-1], ["0"], [0.5]],
    "config": [None, {}, [], {"train": {}}],
    "config.train": [None, [], 3],
    "config.model": [None, "XL/1"],
    "task": [None, [], "x"],
    "task.classes": ["ab", [1, 2], {"a": 0}, ["a", "a"]],
    "ops": [None, []],
    "versions": [None, [], {"torch": 2}],
    "kind": [None, 1],
    "step": [None, "3", 3.5, -3],
    "seed": [None, -1, 0.5],
    "global_batch_size": [None, 0, "8"],
    "num_samples": [None, 0],
}


@pytest.mark.parametrize("place, value", [(place, value) for place, values in WRONG.items() for value in values])
def test_a_value_that_no_run_leaves_is_named_with_its_key(rewritten, place, value):
    with pytest.raises(CheckpointError, match=rf"^\S*state\.json is damaged: {re.escape(place)}\b") as caught:
        _ = rewritten(place, value).state
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


COUNTED = STATE["counters"]["model"]
CONTRADICTIONS = [
    ("step", 4, "step 4 where the optimizers have counted 3"),
    ("counters.model.applied", 1.0, "step 3 where the optimizers have counted 2"),
    ("counters", {"model": COUNTED, "more": COUNTED}, "has counters of 'model', 'more', but the checkpoint's networks"),
    ("counters.model.skipped_in_a_row", 2.0, "counters.model: 2 skipped in a row, at most 1, but 1 in all"),
    ("counters.model.most_skipped_in_a_row", 2.0, "counters.model: 0 skipped in a row, at most 2, but 1 in all"),
    ("since_last_row.meters.1.sums", {}, "since_last_row: the processes' meters have other names"),
    ("since_last_row.meters.1.sums", METER["sums"] | {"more": [0.0, 0.0]}, "the processes' meters have other names"),
    ("since_last_row.meters.1.counts", [], "the processes' meters have other names"),
    ("since_last_row.meters.1.counts", ["other"], "meters.1: counts: 'other' is not one of the sums, 'loss', "),
    ("since_last_row.meters.0.counts", ["loss"], "meters.0: counts: 'loss' is no count, its sum is 1.5"),
    ("since_last_row.skipped_steps.0.step", 4, "skipped_steps: step 4 of 'model', in step 3 of 'model'"),
    ("since_last_row.skipped_steps.0.network", "more", "skipped_steps: step 2 of 'more', in step 3 of 'model'"),
]


@pytest.mark.parametrize("place, value, said", CONTRADICTIONS)
def test_values_that_contradict_each_other_are_named(rewritten, place, value, said):
    with pytest.raises(CheckpointError, match=rf"state\.json .*{re.escape(said)}"):
        _ = rewritten(place, value).state


RIGHT = {
    "as it is written": ("seed", 0),
    "before rows were kept": ("since_last_row", None),
    "before the most in a row was": ("counters.model.most_skipped_in_a_row", None),
    "before classes were": ("task.classes", None),
    "whole numbers written so": ("counters.model.applied", 2),
    "names of before a reading": ("since_last_row.meters", [{"sums": {}, "counts": ["unreadable"]}]),
    "nothing read yet": ("since_last_row.meters", [{"sums": {}, "counts": []}]),
    "a gradient, of no rank": ("since_last_row.skipped_steps", [SKIPPED | {"not_finite": "gradient", "ranks": []}]),
    "keys of later versions": ("counters.model.more", "x"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_state_of_any_version_is_read(rewritten, name):
    place, value = RIGHT[name]
    found = rewritten(place, value)
    assert found.state == json.loads((found.path / "state.json").read_text())
    kept = found.state.get("since_last_row")
    if kept is not None:
        meter = Meter()
        meter.load_state_dicts(kept["meters"], 0, 1, torch.device("cpu"))
        assert meter.state_dict()["sums"].keys() == kept["meters"][0]["sums"].keys()


def test_names_of_before_a_reading_make_no_counts_of_means():
    meter = Meter()
    meter.load_state_dicts([{"sums": {}, "counts": ["loss"]}], 0, 1, torch.device("cpu"))
    for value in (1.0, 2.0):
        meter.add({"loss": torch.tensor(value)})
    assert meter.read() == {"loss": 1.5}
    meter.add({"unreadable": torch.tensor(1)})
    meter.read()
    assert meter.state_dict() == {"sums": {}, "counts": []}


# --- by the programs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy.write_data(tmp_path_factory.mktemp("data"))


def test_a_resume_from_a_state_changed_by_hand_is_one_sentence(tmp_path, data, capsys):
    config = toy.write_run(
        tmp_path / "run.yaml",
        toy.LIGHTNINGDIT,
        data={"data_path": str(data / "latents")},
        train={"output_dir": str(tmp_path), "max_steps": 1},
    )
    assert main(["train", "lightningdit", str(config)]) == 0
    path = tmp_path / "run" / "checkpoints" / "step_0000001"
    whole = json.loads((path / "state.json").read_text())
    counters = whole["counters"]["model"]
    for change, said in (
        ({"counters": {"another": counters}}, "counters of 'another', but the checkpoint's networks are 'model'"),
        (
            {"counters": {"model": {k: v for k, v in counters.items() if k != "skipped_in_a_row"}}},
            "counters.model.skipped_in_a_row: is missing",
        ),
        (
            {"since_last_row": whole["since_last_row"] | {"skipped_steps": [{}]}},
            "since_last_row.skipped_steps.0.step: is missing",
        ),
        ({"config": {}}, "config.model: is missing"),
    ):
        toy.rewrite_state(path, whole | change)
        capsys.readouterr()
        assert main(["train", "lightningdit", str(config), "train.max_steps=2"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 2 and f"{path / 'state.json'} " in error and said in error


def test_a_run_without_a_discriminator_goes_on_from_one_whose_discriminator_skipped(tmp_path, data):
    config = toy.write_run(
        tmp_path / "run.yaml",
        toy.VAVAE,
        data={"data_path": str(data / "images")},
        train={"output_dir": str(tmp_path), "max_steps": 2, "log_every": 5},
    )
    assert main(["train", "vavae", str(config)]) == 0
    path = tmp_path / "run" / "checkpoints" / "step_0000002"
    state = json.loads((path / "state.json").read_text())
    own, foreign = ({**SKIPPED, "network": name} for name in ("autoencoder", "discriminator"))
    state["since_last_row"]["skipped_steps"] = [own, foreign]
    toy.rewrite_state(path, state)
    run = load(config, ["train.max_steps=3", "loss.disc_weight=0"], kind="vavae")[0]
    trainer = make_trainer(run, "vavae", start_processes())
    try:
        assert trainer.step == 2 and trainer.incidents.skipped_steps == [own]
        with closing(trainer.stream()) as stream:
            trainer.train_step(stream)
        trainer._log(None)
    finally:
        trainer.close()


def test_names_of_classes_that_are_none_are_not_passed_on(rewritten):
    with pytest.raises(CheckpointError, match=r"state\.json is damaged: task\.classes"):
        from_checkpoint(rewritten("task.classes", [1, 2]))
