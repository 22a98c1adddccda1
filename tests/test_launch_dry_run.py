"""What a plan says: its arithmetic by hand, which micro-batches fit, and what of a file has no effect."""

import re
from dataclasses import replace

import pytest
import torch

from launch.__main__ import main
from launch.config import load
from launch.config_files import SHIPPED
from launch.training import dry_run
from launch.training.dry_run import plan_run, planned_processes
from launch.training.memory import GIB, NetworkCost, Setup, latents_bytes, memory_of, usable
from launch.training.micro_batches import Fit, nearest_that_divide
from launch.training.plan import RunPlan
from launch.training.remarks import remarks, stage_lines
from tests import toy

P = 1_000
#: Sizes of LightningDiT at patch 1 with 32 channels (arXiv 2501.01423), in millions of parameters.
SIZES = {"b": 130.56, "l": 458.15, "xl": 675.26, "1p0b": 1029.4, "1p6b": 1631.8}
SMALL_CARD = SHIPPED / "lightningdit_xl_24gb.yaml"


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (0, (2, 2, 16)),
        (1, (2, 2, 18 / 4)),
        (2, (2, 2 / 4, 18 / 4)),
        (3, (2 + 2 / 4, 2 / 4, 16 / 4)),
    ],
)
def test_bf16_bytes_of_a_parameter(stage, expected):
    """4 bytes of master weights, 12 of exp_avg, exp_avg_sq and EMA, under ZeRO 1 and 2 a copy of 2; 4 processes."""
    memory = memory_of([NetworkCost("model", P, P, 0.0, 0.0)], Setup(4, True), stage, 1)
    assert (memory.weights, memory.gradients, memory.states) == pytest.approx([size * P for size in expected])


def test_float32_keeps_a_master_copy_only_where_it_is_sharded():
    network = NetworkCost("model", P, P, 0.0, 0.0)
    zero0, zero1 = (memory_of([network], Setup(1, False), stage, 1) for stage in (0, 1))
    assert (zero0.weights, zero0.gradients, zero0.states) == (4 * P, 4 * P, 12 * P)
    assert zero1.states == 16 * P


def test_latents_on_disk():
    assert latents_bytes(10, 32, 16) == 10 * (2 * 32 * 256 * 4 + 8)


def plan(**changes) -> RunPlan:
    figures = dict(
        title="t",
        networks=(NetworkCost("model", 10 * P, 9 * P, 3e9, 2.0**30),),
        num_images=1000,
        images_assumed=False,
        steps=50,
        global_batch_size=40,
        micro_batch_size=5,
        setup=Setup(2, True, {"zero_optimization": {"reduce_bucket_size": 1}}),
        stage=2,
    )
    return RunPlan(**figures | changes)


def test_lines_say_what_is_assumed_and_add_up():
    text = "\n".join(plan().lines())
    assert "50 steps = 2.0 epochs of 1,000 images (counted)" in text
    assert "global batch 40 = 2 processes × micro-batch 5 × 4 accumulated; 20 images per GPU and step" in text
    assert "0.12 TFLOP per step" in text
    assert "activations" in text and "frozen" not in text and "latents" not in text and "GPUs of" not in text
    (row,) = [line for line in text.splitlines() if "← this run" in line]
    assert row.split() == ["ZeRO", "2:", "0.0", "0.0", "0.0", "0.0", "5.0", "5.0", "←", "this", "run"]


def test_memory_is_said_in_units_of_1024_cubed():
    """64 · 2³⁰ parameters in float32, 20 bytes each (weights, gradients, three states), and 5 images of 1 GiB."""
    lines = plan(
        networks=(NetworkCost("model", 2**36, 2**36, 1e9, 2.0**30),),
        setup=Setup(1, False, frozen=2**34),
        num_images=1_000_000,
        images_assumed=True,
        global_batch_size=5,
        stage=0,
        latents=(32, 16),
        steps=1,
    ).lines()
    (row,) = [line.split() for line in lines if "← this run" in line]
    assert row[2:9] == ["256.0", "256.0", "768.0", "0.0", "5.0", "64.0", "1,349.0"]
    assert "  latents on disk: 65.5 GB (float32 32×16×16, two per image)" in lines  # disks are sold by powers of ten
    assert "  host memory for a save in the background: 1,024.0 GiB on the main process" in lines


def test_checkpoints_on_disk():
    """16 bytes a parameter; the newest is whole before the oldest is removed."""
    network = (NetworkCost("model", 10**9, 10**9, 1e9, 1.0),)
    for kept, written, most in ((3, 10, 4), (3, 2, 2), (None, 7, 7)):
        lines = plan(networks=network, keep_checkpoints=kept, checkpoints=written).lines()
        (line,) = [line for line in lines if "checkpoints on disk" in line]
        assert f"16.0 GB each, at most {most} at once: {16 * most:.1f} GB" in line


def fit(card: float, stage: int = 1, kind: bool | int | str = False, per_process: int = 24, **changes) -> Fit:
    """Images of 8, 4 and 2 GiB, and 2³⁰ / 2 parameters on 4 processes."""
    costs = {k: (NetworkCost("m", 0, 2**29, 0.0, size * GIB),) for k, size in ((False, 8), (2, 4), (True, 2))}
    setup = Setup(4, True, {"zero_optimization": {"reduce_bucket_size": 1}})
    return Fit(costs, setup, card, per_process, stage, kind, **changes)


def card_for(images: int, stage: int = 1) -> float:
    """Bytes of a card that has just room for so many images of 8 GiB."""
    memory = memory_of(fit(1).costs[False], fit(1).setup, stage, images, 24 // images)
    return (memory.backward + GIB) / 0.95


def test_the_largest_micro_batch_divides_and_fits():
    assert usable(card_for(8)) == pytest.approx(memory_of(fit(1).costs[False], fit(1).setup, 1, 8, 3).peak)
    for card, largest in ((card_for(8) + 1e6, 8), (card_for(8) - 1e6, 6), (card_for(1) - 1e6, 0), (1e13, 24)):
        assert fit(card).largest(1, False) == largest
    assert fit(card_for(8) + 1e6).largest(1, 2) == 12 and fit(card_for(8) + 1e6).largest(1, True) == 24
    assert fit(card_for(8) + 1e6).table()[2].split() == ["ZeRO", "1", "8", "12", "24"]


def test_overrides_that_help_are_the_least_that_do():
    card = card_for(8) + 1e6
    assert fit(card).suggestion(24) == fit(card).suggestion(4) == "train.micro_batch_size=8"
    assert fit(card).suggestion(8) is None  # the most that fits
    none = card_for(1) - 1e6
    assert fit(none).suggestion(24) == "train.micro_batch_size=1 train.use_checkpoint=2"
    assert fit(none, kind_key="model.use_checkpoint").suggestion(24).endswith("model.use_checkpoint=2")
    higher = fit(none, kind=True, deepspeed_file="zero1.json")
    least = memory_of(higher.costs[True], higher.setup, 1, 1, 24).peak
    states = replace(higher, card=(least + GIB) / 0.95 - 1e6)
    assert states.suggestion(24) == "train.micro_batch_size=1 deepspeed.zero_stage=2 deepspeed.file=zero2.json"
    assert fit(2 * GIB).suggestion(24) is None


@pytest.mark.parametrize(("number", "near", "said"), [(1024, 6, "4 and 8"), (1024, 2000, "1,024"), (7, 3, "1 and 7")])
def test_the_nearest_numbers_that_divide(number, near, said):
    assert nearest_that_divide(number, near) == said


def test_errors_name_what_would_do(capsys):
    command = ["train", "lightningdit", "lightningdit_xl_64ep.yaml", "--dry-run"]
    refused = [
        (["--gpus", "6"], "global_batch_size 1024 is no multiple of 6 processes; the nearest .* are 4 and 8"),
        (["--gpus", "8", "train.micro_batch_size=48"], "48 does not divide the 128 images .* are 32 and 64"),
        (["--gpus", "8", "--memory", "0.5"], "--memory is the GiB of one GPU, from 1 to 10,000, got 0.5"),
        (["--gpus", "0"], "--gpus must be at least 1, got 0"),
    ]
    for arguments, words in refused:
        assert main([*command, *arguments]) == 2
        assert re.search(words, capsys.readouterr().err.splitlines()[-2]), words
    assert main([*command[:-1], "--memory", "80"]) == 2
    assert "--gpus and --memory are for a plan: add --dry-run" in capsys.readouterr().err


def test_a_plan_without_gpus_says_for_how_many_processes_it_is(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    number, note = planned_processes(None)
    assert number == 1 and "1 process: there is no GPU here; --gpus N plans for N" in note
    assert planned_processes(5) == (5, None)
    assert f"  {note}" in plan(processes_note=note).lines()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert planned_processes(None) == (3, None)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_a_recipe_that_eight_gpus_of_80_gib_hold(size):
    run, _ = load(SHIPPED / f"lightningdit_{size}_64ep.yaml", kind="lightningdit")
    found = plan_run(run, "lightningdit", 8, card=80 * GIB)
    assert found.networks[0].parameters / 1e6 == pytest.approx(SIZES[size], rel=1e-4)
    assert found.memory(found.stage).peak <= usable(80 * GIB) and found.remarks == ()
    assert (found.steps, found.global_batch_size, run.optimizer.lr) == (80_000, 1024, 2e-4)
    assert run.train.exp_name == f"lightningdit_{size}_64ep"


@pytest.mark.parametrize("size", ["XL", "L", "B"])
def test_a_small_card_holds_a_step_of_the_same_batch(size):
    """Also one of 22.5 GiB, which is what cards of 24 GB with error correction have."""
    run, _ = load(SMALL_CARD, [f"model.model_type=LightningDiT-{size}/1"], kind="lightningdit")
    found = plan_run(run, "lightningdit", 1, card=24 * GIB)
    assert found.memory(found.stage).peak <= usable(22.5 * GIB)
    assert found.global_batch_size == 1024 and found.accumulation == 32
    assert found.fit.largest(found.stage, 2) >= 32 and found.setup.summed


def test_latents_on_the_device_are_counted(monkeypatch):
    run, _ = load(SHIPPED / "lightningdit_xl_64ep.yaml", kind="lightningdit")
    share = -(-1_281_167 // 8) * 2 * 32 * 256
    for placement, dtype, held in (
        ("device", "float32", 4 * share),
        ("device", "bfloat16", 2 * share),
        ("host", "", 0),
    ):
        data = run.data.model_copy(update={"placement": placement, "latent_dtype": dtype})
        found = plan_run(run.model_copy(update={"data": data}), "lightningdit", 8)
        assert found.memory(1).latents == held
        assert any("data.placement device" in line for line in found.lines()) is (held > 0)
    data = run.data.model_copy(update={"placement": "auto", "latent_dtype": "bfloat16"})
    (line,) = plan_run(run.model_copy(update={"data": data}), "lightningdit", 8).latent_store
    assert line.startswith(f"data.placement auto: {2 * share / GIB:.1f} GiB per GPU")


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
        (["train.valid_batches=2"], "train.valid_batches has no effect: data.valid_path names no data"),
        (["data.valid_path=/v", "train.valid_every=51"], "train.valid_every 51 is more than"),
        (["data.valid_path=/v", "train.valid_weights=model"], "train.valid_weights model has no effect: optimizer.ema"),
    ],
)
def test_what_has_no_effect_is_said(tmp_path, overrides, word):
    assert remarks(tokenizer(tmp_path), 50, 10) == []
    (said,) = remarks(tokenizer(tmp_path, *overrides), 50, 10)
    assert word in said


def test_of_two_checkpointing_keys_the_one_that_counts_is_said():
    path = SHIPPED / "lightningdit_xl_64ep.yaml"
    run, _ = load(path, ["model.use_checkpoint=true", "train.use_checkpoint=2"], kind="lightningdit")
    assert remarks(run, 10**6, 10**6) == ["train.use_checkpoint 2 has no effect: model.use_checkpoint True comes first"]
    run, _ = load(path, ["transport.lognorm_until_step=80000"], kind="lightningdit")
    assert remarks(run, 80_000, 10**6) == [
        "transport.lognorm_until_step 80,000 has no effect: the run has 80,000 steps"
    ]


def test_a_plan_names_one_decoder_where_images_are_kept(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr(dry_run, "_vavae_costs", lambda run, kinds: (dict.fromkeys(kinds, ()), 0, None))
    toy.write_images(tmp_path / "images")
    path = toy.write_run(tmp_path / "run.yaml", toy.VAVAE, data={"data_path": str(tmp_path / "images")})
    with caplog.at_level("INFO"):
        assert main(["train", "vavae", str(path), "--dry-run", "data.cache=true"]) == 0
    assert "images decoded by pil on" in capsys.readouterr().out
    assert "decoded by pil" in caplog.text and "torchvision" not in caplog.text
