"""The moving average in validation, extraction and export; and that training does not notice being validated."""

import math
import signal
from pathlib import Path

import pytest
import torch

from launch.config import load, select_ops
from launch.export import export
from launch.extract import find_tokenizer
from launch.runtime import exit_status
from launch.training import build, checkpoint
from launch.training.engine import start_processes
from tests import toy
from tests.children import Moment, launch
from tests.run_rows import rows
from vavae.weights import load_tokenizer

BATCHES, SIZE = 2, 4
WRITERS = {"lightningdit": (toy.LIGHTNINGDIT, toy.write_latents), "vavae": (toy.VAVAE, toy.write_images)}
NETWORKS = {"lightningdit": "model", "vavae": "autoencoder"}
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 100}}  # larger weights do not stay gathered
IN_VALIDATION = Moment("vavae.task:VavaeTask", "validate", 2, signal.SIGTERM)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("averaged")
    for kind, (_, write) in WRITERS.items():
        write(root / kind, 12)
    return root


@pytest.fixture
def run_file(tmp_path, data):
    """Four steps, after the third of them validation and a checkpoint."""

    def write(kind: str, stage: int = 1, precision: str = "float32", **overrides: dict) -> Path:
        sections = {
            "data": {"data_path": str(data / kind), "valid_path": str(data / kind)},
            "train": {"valid_every": 3, "valid_batches": BATCHES, "ckpt_every": 3, "max_steps": 4},
            "optimizer": {"ema_decay": 0.7},
            "deepspeed": {"zero_stage": stage, "overrides": overrides},
        }
        sections["train"] |= {"output_dir": str(tmp_path), "global_batch_size": SIZE, "precision": precision}
        sections["train"] |= {"valid_weights": "both"}
        if kind == "vavae":
            sections["loss"] = {"disc_weight": 0.0}  # as ZeRO 3 wants it
        return toy.write_run(tmp_path / f"{kind}.yaml", WRITERS[kind][0], **sections)

    return write


def trainer(path: Path, kind: str, *overrides: str):
    return build.make_trainer(load(path, overrides, kind=kind)[0], kind, start_processes())


def plain_task(path: Path, kind: str):
    """Task and validation data without engines."""
    run = load(path, kind=kind)[0]
    return (build.vavae_task if kind == "vavae" else build._lightningdit_task)(run, select_ops(run.kernels))


def means_by_hand(
    path: Path, kind: str, weights: dict, precision: str, prefix: str, stage: int = 0
) -> dict[str, float]:
    """Of scalars over batches, of numbers of samples over those that have one."""
    task, data = plain_task(path, kind)
    network = task.networks[NETWORKS[kind]]
    network.load_state_dict(weights)
    network.eval().to(getattr(torch, precision))
    if stage == 3:  # which shards what is not trained, too, in the precision of the weights
        for p in network.parameters():
            p.data = p.data.to(getattr(torch, precision)).to(p.dtype)
    logs = []
    for number in range(BATCHES):
        indices = torch.arange(number * SIZE, (number + 1) * SIZE)
        batch = data.batch(torch.zeros_like(indices), indices)
        logs.append(task.validate(task.networks, batch, task.validation_draws(number, SIZE, torch.device("cpu"))))
    found = {name: torch.cat([log[name].double().flatten() for log in logs]) for name in logs[0]}
    return {f"{prefix}/{name}": values.nanmean().item() for name, values in found.items()}


def validated(directory: Path) -> dict[str, float]:
    """NaN where no sample had a number."""
    (row,) = [row for row in rows(directory) if any(name.startswith("valid") for name in row)]
    return {name: math.nan if value is None else value for name, value in row.items() if name.startswith("valid")}


def last(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    found = checkpoint.newest(directory / "checkpoints")
    files = [name.split(".")[:2] for name in found.manifest.files if name.endswith(".safetensors")]
    return {f"{n}.{key}.{name}": value for n, key in files for name, value in found.tensors(n, key).items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and not [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize(
    ("kind", "stage", "precision", "overrides"),
    [
        ("vavae", 0, "float32", {}),  # the weights in use are the master weights
        ("vavae", 1, "bfloat16", {}),
        ("vavae", 3, "float32", SHARDED),
        ("lightningdit", 0, "bfloat16", {}),
        ("lightningdit", 2, "bfloat16", {}),
        ("lightningdit", 3, "bfloat16", {}),
        ("lightningdit", 3, "bfloat16", SHARDED),
    ],
)
def test_the_average_is_validated_and_training_goes_on_bit_for_bit(
    tmp_path, run_file, kind, stage, precision, overrides
):
    path = run_file(kind, stage, precision, **overrides)
    trainer(path, kind).run()
    trainer(path, kind, "train.exp_name=blind", "train.valid_every=null", "data.valid_path=null").run()
    assert_equal(last(tmp_path / "run"), last(tmp_path / "blind"))
    found = checkpoint.Checkpoint(tmp_path / "run/checkpoints/step_0000003")
    average, raw = (
        means_by_hand(path, kind, found.weights(NETWORKS[kind], key), precision, prefix, stage)
        for key, prefix in (("ema", "valid_ema"), ("model", "valid"))
    )
    got = validated(tmp_path / "run")
    assert got == pytest.approx(average | raw, rel=1e-5, nan_ok=True)
    error = "rec" if kind == "vavae" else "mse"
    assert abs(raw[f"valid/{error}"] / average[f"valid_ema/{error}"] - 1) > 1e-4


def test_weights_are_put_back_whatever_happens(run_file):
    run = trainer(run_file("lightningdit", 0), "lightningdit")
    run.run()
    engine = run.engines["model"]
    average = engine.full_state(keep=True)["ema"]

    def weights() -> dict[str, torch.Tensor]:
        return {name: engine.module.get_parameter(name).detach().clone() for name in average}

    before = weights()
    with pytest.raises(KeyError), engine.averaged():
        inside = weights()
        raise KeyError
    assert_equal(inside, average)
    assert_equal(weights(), before)
    assert not torch.equal(before["final_layer.linear.weight"], average["final_layer.linear.weight"])


@pytest.mark.parametrize(("kind", "decay"), [("vavae", 0.0), ("lightningdit", 0.7)])
def test_the_weights_themselves_are_validated_where_no_average_is_kept_or_wanted(tmp_path, run_file, kind, decay):
    path = run_file(kind)
    settings = (f"optimizer.ema_decay={decay}", *(["train.valid_weights=model"] if decay else []))
    run = trainer(path, kind, *settings)
    run.run()
    found = checkpoint.Checkpoint(tmp_path / "run/checkpoints/step_0000003").weights(NETWORKS[kind], "model")
    want = means_by_hand(path, kind, found, "float32", "valid")
    assert validated(tmp_path / "run") == pytest.approx(want, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize(("kind", "stage"), [("vavae", 2), ("lightningdit", 3)])
def test_two_processes_validate_the_average_that_one_has(tmp_path, run_file, kind, stage):
    """Gathered from the parts that each of them holds. Of the latents' spread each knows that of its own images."""
    path = str(run_file(kind, stage, **(SHARDED if stage == 3 else {})))
    for name, world_size in (("one", 1), ("two", 2)):
        command = ("train", kind, path, f"train.exp_name={name}", "train.max_steps=3")
        assert launch(*command, world_size=world_size) == [0] * world_size
    one, two = (validated(tmp_path / name) for name in ("one", "two"))
    assert two == pytest.approx(one, rel=0.1, nan_ok=True)
    assert all(two[name] == pytest.approx(one[name], rel=1e-4, nan_ok=True) for name in one if "latent_std" not in name)
    assert len(one) == 2 * {"vavae": 8, "lightningdit": 8}[kind]
    pictures = [sorted(path.name for path in (tmp_path / name).rglob("*.png")) for name in ("one", "two")]
    assert pictures == [["step_0000003.png"] if kind == "vavae" else []] * 2


def test_a_signal_in_validation_leaves_the_average_out_of_the_checkpoint(tmp_path, run_file):
    path = str(run_file("vavae", 0))
    assert launch("train", "vavae", path, "train.exp_name=whole") == [0]
    command = ("train", "vavae", path, "train.exp_name=stopped", "train.max_steps=5")
    assert launch(*command, at=IN_VALIDATION) == [exit_status.STOPPED]
    assert_equal(last(tmp_path / "whole"), last(tmp_path / "stopped"))  # both after step 4


def test_extract_and_export_take_the_average(tmp_path, run_file):
    path = run_file("vavae")
    trainer(path, "vavae").run()
    found = checkpoint.newest(tmp_path / "run/checkpoints")
    average, weights = (found.weights("autoencoder", key) for key in ("ema", "model"))
    ops = select_ops("reference")
    extracted, _ = find_tokenizer(load(path, kind="vavae")[0], ops)
    safetensors, _, _ = export(found, tmp_path / "exported")
    exported = load_tokenizer(safetensors, ops)
    for tokenizer in (extracted, exported):
        assert_equal(tokenizer.state_dict(), average)
    assert not torch.equal(average["encoder.conv_out.weight"], weights["encoder.conv_out.weight"])
