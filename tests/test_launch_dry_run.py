"""What a plan says: its arithmetic by hand, which micro-batches fit, and what of a file has no effect."""

import re
from dataclasses import replace

import pytest
import torch

from launch.__main__ import main
from launch.config import load
from launch.config_files import SHIPPED
from launch.training import dry_run
from launch.training.build import open_dataset
from launch.training.checkpoint import prune
from launch.training.checks import check_run
from launch.training.dry_run import plan_run, planned_processes
from launch.training.memory import GIB, NetworkCost, Setup, latents_bytes, memory_of, usable
from launch.training.micro_batches import Fit, nearest_that_divide
from launch.training.plan import RunPlan
from lightningdit.device_latents import DeviceLatents
from lightningdit.latents_writer import LatentsWriter, finish
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
    pinned = "  host memory for a save in the background: 1,024.0 GiB on the main process (pinned, in blocks of powers"
    assert any(line.startswith(pinned) for line in lines)


def test_checkpoints_on_disk():
    """16 bytes a parameter; the newest is whole before the oldest is removed."""
    network = (NetworkCost("model", 10**9, 10**9, 1e9, 1.0),)
    for kept, written, most in ((3, 10, 4), (3, 2, 2), (None, 7, 7)):
        lines = plan(networks=network, keep_checkpoints=kept, checkpoints=written).lines()
        (line,) = [line for line in lines if "checkpoints on disk" in line]
        assert f"16.0 GB each, at most {most} at once: {16 * most:.1f} GB" in line


@pytest.mark.parametrize(
    ("keep", "keep_every", "most"), [(3, 20_000, 7), (3, 5_000, 16), (20, 20_000, 16), (1, 40_000, 3), (3, None, 4)]
)
def test_checkpoints_on_disk_are_as_many_as_pruning_leaves(tmp_path, keep, keep_every, most):
    """80,000 steps, one every 5,000."""
    seen = []
    for step in range(5_000, 80_001, 5_000):
        (tmp_path / f"step_{step:07d}").mkdir()
        seen.append(len(list(tmp_path.iterdir())))
        prune(tmp_path, keep, keep_every)
    kept = dict(keep_checkpoints=keep, keep_every=keep_every, checkpoints=16, ckpt_every=5_000)
    assert plan(**kept).most_checkpoints == max(seen) == most


def fit(card: float, stage: int = 1, kind: bool | int | str = False, per_process: int = 24, **changes) -> Fit:
    """Images of 8, 4 and 2 GiB, and 2³⁰ / 2 parameters on 4 processes."""
    costs = {k: (NetworkCost("m", 0, 2**29, 0.0, size * GIB),) for k, size in ((False, 8), (2, 4), (True, 2))}
    setup = Setup(4, True, {"zero_optimization": {"reduce_bucket_size": 1}})
    return Fit(costs, changes.pop("setup", setup), card, per_process, stage, kind, **changes)


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
    higher = fit(none, kind=True, files={1: "zero1.json", 2: "zero2.json"})
    least = memory_of(higher.costs[True], higher.setup, 1, 1, 24).peak
    states = replace(higher, card=(least + GIB) / 0.95 - 1e6)
    assert states.suggestion(24) == "train.micro_batch_size=1 deepspeed.zero_stage=2 deepspeed.file=zero2.json"
    assert replace(states, files={}).suggestion(24) == "train.micro_batch_size=1 deepspeed.zero_stage=2"
    assert fit(2 * GIB).suggestion(24) is None


def test_what_makes_a_run_fit_may_be_held_by_the_host():
    """Latents, then the optimizer, then both; not what is there already, and no optimizer under ZeRO 0."""
    offload = "'deepspeed.overrides.zero_optimization.offload_optimizer={device: cpu}'"
    card = card_for(8) + 1e6
    held = fit(card, setup=replace(fit(card).setup, latents=card))
    assert held.suggestion(24) == "train.micro_batch_size=8 data.placement=host"
    least = fit(card, kind=True, stages=(0, 1))
    without = replace(least.setup, options={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
    tight = replace(least, card=(memory_of(least.costs[True], without, 1, 1, 24).peak + GIB) / 0.95 + 1e9)
    assert tight.suggestion(24) == f"train.micro_batch_size=1 {offload}"
    both = replace(tight, setup=replace(tight.setup, latents=card))
    assert both.suggestion(24) == f"train.micro_batch_size=1 data.placement=host {offload}"
    assert replace(both, setup=replace(without, latents=card)).suggestion(24).endswith("=1 data.placement=host")
    assert replace(tight, stages=(0,), stage=0).suggestion(24) is None
    # One process, for which a higher stage shares nothing out, but offloads.
    fits = memory_of(tight.costs[True], replace(without, processes=1), 1, 1, 24).peak
    one_process = replace(tight.setup, processes=1)
    alone = replace(tight, setup=one_process, stage=0, card=(fits + GIB) / 0.95 + 1e6)
    assert alone.suggestion(24) == f"train.micro_batch_size=1 deepspeed.zero_stage=1 {offload}"
    assert replace(tight, card=1.1 * GIB).suggestion(24) is None


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
    keep = ["train.ckpt_every=5000", "train.keep_checkpoints=3", "train.keep_every=20000"]
    run, _ = load(SHIPPED / f"lightningdit_{size}_64ep.yaml", keep, kind="lightningdit")
    found = plan_run(run, "lightningdit", 8, card=80 * GIB)
    assert found.networks[0].parameters / 1e6 == pytest.approx(SIZES[size], rel=1e-4)
    assert found.memory(found.stage).peak <= usable(80 * GIB) and found.remarks == ()
    assert (found.steps, found.global_batch_size, run.optimizer.lr) == (80_000, 1024, 2e-4)
    assert run.train.exp_name == f"lightningdit_{size}_64ep" and found.most_checkpoints == 7


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
        ("host", "float32", 0),
    ):
        data = run.data.model_copy(update={"placement": placement, "latent_dtype": dtype})
        found = plan_run(run.model_copy(update={"data": data}), "lightningdit", 8)
        assert found.memory(1).latents == held
        assert any("data.placement device" in line for line in found.lines()) is (held > 0)
    data = run.data.model_copy(update={"placement": "auto", "latent_dtype": "bfloat16"})
    (line,) = plan_run(run.model_copy(update={"data": data}), "lightningdit", 8).latent_store
    assert line.startswith(f"data.placement auto: {2 * share / GIB:.1f} GiB per GPU of latents in bfloat16 (assumed: ")


@pytest.mark.parametrize(
    ("store", "dtype", "asked"),
    [("moments", "float32", "float32"), ("moments", "float32", "bfloat16"), ("sample", "bfloat16", "float32")],
)
def test_latents_that_are_here_are_counted_as_they_are_held_and_stored(tmp_path, store, dtype, asked):
    folder, channels = tmp_path / "set", 4 * (1 + (store == "moments"))
    writer, values = LatentsWriter(folder, shard_size=16, store=store, dtype=dtype), torch.rand(20, channels, 4, 4)
    writer.add(values, values, torch.arange(20) % 3)
    writer.close()
    finish(folder)
    data = {"data_path": str(folder), "placement": "device", "latent_dtype": asked}
    run, _ = load(toy.write_run(tmp_path / "run.yaml", toy.LIGHTNINGDIT, data=data), kind="lightningdit")
    found, parts = (
        plan_run(run, "lightningdit", 4),
        [DeviceLatents(open_dataset(run, "data_path"), "cpu", r, 4) for r in range(4)],
    )
    for part in parts:
        part.load()
    assert found.memory(1).latents == max(part.rows.nbytes for part in parts)
    headers = 2 * 2**10
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size - headers < latents_bytes(20, *found.latents, found.stored[1]) < size
    kind = f"{'moments in ' * (store == 'moments')}{dtype}"
    assert any(f"({kind} 4×4×4, two per image)" in line for line in found.lines())
    assert not any("assumed: shards" in line for line in found.lines())


BUCKETS = '{"zero_optimization": {"overlap_comm": false}}'
STAGE_1 = '{"zero_optimization": {"stage": 1, "overlap_comm": false}}'


@pytest.mark.parametrize(
    ("config", "overrides", "mine", "stages"),
    [
        ("xl_64ep", [], None, {0: None, 1: "zero1.json", 2: "zero2.json", 3: "zero3.json"}),
        ("xl_64ep", ["train.grad_sum_dtype=float32"], None, {1: "zero1.json", 2: "zero2.json", 3: "zero3.json"}),
        ("xl_64ep", ["train.compile=inductor"], None, {0: None, 1: "zero1.json", 2: "zero2.json"}),
        ("xl_24gb", [], None, {1: None, 2: None, 3: None}),  # float32 sums, and a size of buckets
        ("xl_64ep", ["deepspeed.file=mine.json"], BUCKETS, {1: "mine.json", 2: "mine.json", 3: "mine.json"}),
        ("xl_64ep", ["deepspeed.file=mine.json"], STAGE_1, {1: "mine.json"}),
        ("xl_64ep", [], STAGE_1, {1: "zero1.json"}),  # one's own of that name
    ],
)
def test_stages_are_those_that_the_run_itself_would_take(tmp_path, monkeypatch, config, overrides, mine, stages):
    monkeypatch.chdir(tmp_path)
    if mine is not None:
        (tmp_path / ("mine.json" if overrides else "zero1.json")).write_text(mine)
    path = SHIPPED / f"lightningdit_{config}.yaml"
    run, _ = load(path, overrides, kind="lightningdit")
    found = plan_run(run, "lightningdit", 1, card=80 * GIB)
    assert (found.stages_allowed, found.fit.files) == (tuple(stages), stages)
    for stage in range(4):  # what a start says, file by file
        files = {stages.get(stage, run.deepspeed.file), run.deepspeed.file}
        starts = []
        for file in files:
            changes = [*overrides, f"deepspeed.zero_stage={stage}", f"deepspeed.file={file or 'null'}"]
            try:
                check_run(load(path, changes, kind="lightningdit")[0])
            except ValueError:
                continue
            starts.append(file)
        assert bool(starts) == (stage in stages) and (not starts or stages[stage] in starts)


def test_a_plan_names_one_decoder_where_images_are_kept(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr(dry_run, "network_costs", lambda run, kinds: (dict.fromkeys(kinds, ()), 0, None))
    toy.write_images(tmp_path / "images")
    path = toy.write_run(tmp_path / "run.yaml", toy.VAVAE, data={"data_path": str(tmp_path / "images")})
    with caplog.at_level("INFO"):
        assert main(["train", "vavae", str(path), "--dry-run", "data.cache=true"]) == 0
    said = capsys.readouterr().out
    assert "images decoded by pil on" in said and "host memory for a save in the background" in said
    assert ("(pinned, in blocks" in said) == torch.cuda.is_available()  # on a CPU nothing is pinned
    assert "decoded by pil" in caplog.text and "torchvision" not in caplog.text
