"""Training and sampling by average velocities, as a user runs them: stages, processes, resume, graphs, refusals."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from launch import sample
from launch.config import ConfigError, load
from launch.config_files import SHIPPED
from launch.export import export
from launch.runtime import exit_status
from launch.training import checkpoint
from lightningdit.weights import read_export, save_published
from tests import toy
from tests.children import Moment, launch
from tests.run_rows import rows
from tests.tiny_weights import a_run, write_weights

OBJECTIVES = {
    "meanflow": {"objective": "meanflow", "use_cosine_loss": False},
    "guided": {
        "objective": "improved_meanflow",
        "use_cosine_loss": False,
        "equal_times": 0.5,
        "guidance_scale": 2.0,
        "guidance_end": 0.8,
    },
}


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    return toy.write_latents(tmp_path_factory.mktemp("data") / "latents")


@pytest.fixture
def run_file(tmp_path, latents):
    def write(objective: str = "meanflow", **sections) -> Path:
        given = {
            "data": {"data_path": str(latents)},
            "model": {"time_pairs": True},
            "train": {"output_dir": str(tmp_path)},
            "transport": OBJECTIVES[objective],
        }
        merged = {name: {**given.get(name, {}), **sections.get(name, {})} for name in {*given, *sections}}
        return toy.write_run(tmp_path / f"{objective}.yaml", toy.LIGHTNINGDIT, **merged)

    return write


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.newest(directory / "checkpoints")
    return {f"{key}.{name}": t for key in ("model", "ema") for name, t in newest.tensors("model", key).items()}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_goes_on_as_if_never_stopped(tmp_path, run_file, objective):
    command = ("train", "lightningdit", str(run_file(objective)))
    assert launch(*command, "train.exp_name=whole") == [0]
    moment = Moment("launch.training.engine:Engine", "step", 4, signal.SIGTERM)
    assert launch(*command, "train.exp_name=parts", at=moment) == [exit_status.STOPPED]
    assert launch(*command, "train.exp_name=parts") == [0]
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert any(name.startswith("ema.r_embedder.") for name in whole)
    (last,) = [row for row in rows(tmp_path / "whole") if row["step"] == 6]
    assert last["loss"] != last["mse"] and np.isfinite(last["mse"])


@pytest.mark.parametrize(
    ("objective", "stage", "precision", "world_size"),
    [
        ("meanflow", 0, "float32", 2),
        ("meanflow", 2, "float32", 2),
        ("guided", 3, "float32", 2),
        ("guided", 1, "float32", 2),
        ("meanflow", 3, "bfloat16", 1),
        ("guided", 1, "bfloat16", 1),
    ],
)
def test_every_stage_and_number_of_processes_trains_alike(tmp_path, run_file, objective, stage, precision, world_size):
    """Against ZeRO 1 on one process, with micro-batches of another size, which have the same share of pairs."""
    command = ("train", "lightningdit", str(run_file(objective)), "train.max_steps=3", "train.ckpt_every=3")
    assert launch(*command, "train.exp_name=base") == [0]
    own = (f"deepspeed.zero_stage={stage}", f"train.precision={precision}", "train.micro_batch_size=4")
    assert launch(*command, "train.exp_name=own", *own, world_size=world_size) == [0] * world_size
    limit = 1e-3 if precision == "float32" else 0.05
    for one, other in zip(rows(tmp_path / "base"), rows(tmp_path / "own"), strict=True):
        assert other["mse"] == pytest.approx(one["mse"], rel=limit)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=5 * limit)
    assert all(bool(t.isfinite().all()) for t in tensors(tmp_path / "own").values())


@pytest.mark.parametrize("mode", ["aot_eager", "regional"])
def test_compiled_training_is_eager_training(tmp_path, run_file, mode):
    command = ("train", "lightningdit", str(run_file("guided")), "train.max_steps=3")
    assert launch(*command, "train.exp_name=eager") == [0]
    assert launch(*command, "train.exp_name=own", f"train.compile={mode}") == [0]
    for one, other in zip(rows(tmp_path / "eager"), rows(tmp_path / "own"), strict=True):
        assert other["mse"] == pytest.approx(one["mse"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("mode", ["aot_eager", "regional"])
def test_compiled_networks_are_called_in_more_ways_than_dynamo_allows(tmp_path, run_file, latents, mode):
    """With tangents and without, with gradients and without, in training and validation: each a graph."""
    more = (f"train.compile={mode}", "train.valid_every=1", f"data.valid_path={latents}", "train.max_steps=2")
    assert launch("train", "lightningdit", str(run_file("guided")), *more) == [0]
    found = rows(tmp_path / "run")
    assert {row["step"] for row in found} == {1, 2} and any("valid_ema/mse" in row for row in found)


@pytest.mark.parametrize("how", ["deepspeed.zero_stage=3", "train.compile=aot_eager"])
def test_networks_with_layer_norms_train_too(tmp_path, run_file, how):
    """Of queries and keys, with weights, and of the stream without: as eagerly under ZeRO 1."""
    path = run_file("guided", model={"time_pairs": True, "use_qknorm": True, "use_rmsnorm": False, "use_swiglu": False})
    command = ("train", "lightningdit", str(path), "train.max_steps=2")
    assert launch(*command, "train.exp_name=base") == [0] and launch(*command, "train.exp_name=own", how) == [0]
    for one, other in zip(rows(tmp_path / "base"), rows(tmp_path / "own"), strict=True):
        assert other["mse"] == pytest.approx(one["mse"], rel=1e-4)


def test_previews_of_what_is_not_trained_are_refused(tmp_path, run_file):
    vae = write_weights(tmp_path / "weights")
    path = run_file(
        vae={"ckpt_path": str(a_run(vae).vae.ckpt_path)},
        transport={"objective": "flow", "use_cosine_loss": True},
        sample={"mode": "meanflow", "cfg_scale": 1},
    )
    log = tmp_path / "refused"
    assert launch("train", "lightningdit", str(path), log=log) == [2]
    assert "transport.objective flow trains no average velocities" in (tmp_path / "refused.0").read_text()


def test_validation_and_what_is_watched(tmp_path, run_file, latents):
    more = ("train.valid_every=3", f"data.valid_path={latents}", "train.watch=[activation_norms,attention_logits]")
    assert launch("train", "lightningdit", str(run_file("guided")), *more, "train.max_steps=3") == [0]
    text = (tmp_path / "run/metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    (valid,) = [row for row in found if any(key.startswith("valid") for key in row)]
    assert {f"valid_ema/loss_t{t}" for t in (0.1, 0.3, 0.5, 0.7)} < valid.keys() and valid["valid_ema/mse"] > 0
    assert "attention_logit_max/blocks.1" in text and "activation_norm_max/blocks.0" in text


def test_a_flow_is_continued_from(tmp_path, run_file, latents):
    """From its export and from a published file: the weights are those, and the second time begins at zero."""
    flow = toy.write_run(
        tmp_path / "flow.yaml", toy.LIGHTNINGDIT, data={"data_path": str(latents)}, train={"output_dir": str(tmp_path)}
    )
    assert launch("train", "lightningdit", str(flow), "train.exp_name=flow", "train.max_steps=2") == [0]
    safetensors, _, _ = export(checkpoint.newest(tmp_path / "flow/checkpoints"), tmp_path / "exported")
    state = read_export(safetensors).state
    save_published(tmp_path / "published.pt", state, state)
    for name, weights in (("export", safetensors), ("pt", tmp_path / "published.pt")):
        log = tmp_path / name
        more = (f"train.exp_name={name}", f"train.weight_init={weights}", "train.max_steps=1", "optimizer.lr=1e-12")
        assert launch("train", "lightningdit", str(run_file()), *more, log=log) == [0]
        assert "has no weights of a second time (r_embedder.mlp.0.weight, " in (tmp_path / f"{name}.0").read_text()
        found = checkpoint.newest(tmp_path / name / "checkpoints").tensors("model", "model")
        assert all(torch.allclose(found[key], value, atol=1e-9) for key, value in state.items())
        assert (
            float(found["r_embedder.mlp.2.weight"].abs().max())
            < 1e-9
            < float(found["r_embedder.mlp.0.weight"].abs().max())
        )


def test_samples_of_few_steps_and_what_they_cost(tmp_path, run_file):
    vae = write_weights(tmp_path / "weights")
    path = run_file(vae={"ckpt_path": str(a_run(vae).vae.ckpt_path)}, train={"max_steps": 2, "ckpt_every": 2})
    assert launch("train", "lightningdit", str(path)) == [0]
    found = {}
    for steps in (1, 2, 4):
        more = (
            "sample.mode=meanflow",
            f"sample.mean_steps={steps}",
            "sample.fid_num=6",
            f"--output={tmp_path / str(steps)}",
        )
        assert launch("sample", str(path), *more) == [0]
        facts = json.loads((tmp_path / str(steps) / "samples.json").read_text())
        assert facts["nfe"] == steps and facts["guided_nfe"] == 0 and facts["guidance"] == "none"
        assert facts["solver"] == f"meanflow, {steps} step{'s' if steps > 1 else ''}"
        with np.load(tmp_path / str(steps) / "samples.npz") as content:
            found[steps] = content["arr_0"]
    assert not np.array_equal(found[1], found[4])


def test_a_network_that_was_not_trained_for_it_is_refused(tmp_path, run_file):
    weights = write_weights(tmp_path / "weights")
    with pytest.raises(ValidationError, match=r"sample\.mode meanflow needs model\.time_pairs: true"):
        a_run(weights, mode="meanflow", cfg_scale=1)
    flow = a_run(weights)
    paired = flow.model_copy(
        update={
            "model": flow.model.model_copy(update={"time_pairs": True}),  # the network's own does not have them
            "sample": flow.sample.model_copy(update={"mode": "meanflow", "cfg_scale": 1.0}),
        }
    )
    with pytest.raises(ConfigError, match=r"is another network than the config's: time_pairs False \(config: True\)"):
        sample.generate(paired, tmp_path / "out")
    path = run_file(transport={"objective": "flow", "use_cosine_loss": True}, train={"max_steps": 2, "ckpt_every": 2})
    assert launch("train", "lightningdit", str(path)) == [0]
    log = tmp_path / "refused"
    more = ("sample.mode=meanflow", "sample.format=latents", "sample.fid_num=2", f"--output={tmp_path / 'none'}")
    assert launch("sample", str(path), *more, log=log) == [2]
    assert "was trained with transport.objective flow: use mode ODE or SDE" in (tmp_path / "refused.0").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.time_pairs=false"], "transport.objective meanflow needs model.time_pairs: true"),
        (["transport.guidance_scale=2", "model.class_dropout_prob=0"], "guidance_scale 2 needs a null label"),
        (["sample.mode=meanflow", "sample.cfg_scale=2"], "cfg_scale is 2, but mode meanflow has its guidance from"),
        (["transport.use_cosine_loss=true"], "use_cosine_loss true is of objective flow"),
        (["transport.objective=flow", "transport.guidance_scale=2"], "guidance_scale 2.0: of average velocities"),
        (["transport.objective=mean_flow"], "transport.objective"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(run_file, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(str(run_file()), overrides, kind="lightningdit")


@pytest.mark.parametrize(
    "name", ["digits_one_step", "digits_meanflow", "lightningdit_xl_one_step", "lightningdit_xl_meanflow"]
)
def test_the_recipes_load_and_say_what_they_are(name):
    run, notes = load(SHIPPED / f"{name}.yaml", kind="lightningdit")
    assert run.train.exp_name == name and run.model.time_pairs and run.transport.objective != "flow"
    assert (run.sample.mode, run.sample.mean_steps, run.sample.cfg_scale) == ("meanflow", 1, 1)
    assert not [note for note in notes if "extends" not in note and "not here, so the one in" not in note]
    assert (run.train.weight_init is not None) == name.endswith("one_step"), "continued, or from scratch"
