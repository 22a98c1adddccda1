"""Batches made in devices' memory, here of CPU tensors: those of the host loader, bit for bit, over any processes."""

import re
import threading
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from launch.config import ConfigError, load
from launch.runtime.processes import Processes
from launch.train import main
from launch.training import checkpoint, device_batches, placement
from launch.training.device_batches import DeviceBatches
from launch.training.dry_run import plan_run
from launch.training.engine import start_processes
from launch.training.loader import BatchSplit, SampleOrder, micro_batches
from launch.training.memory import memory_of
from lightningdit.data import LatentDataset
from lightningdit.device_latents import DeviceLatents
from lightningdit.latents_writer import LatentsWriter, finish
from tests import toy
from tests.children import call
from tests.run_rows import rows

SHAPE = (4, 3, 5)
SETS = {
    "sample": ("sample", "float32", 20),
    "mean": ("mean", "float16", 20),
    "moments": ("moments", "bfloat16", 20),
    "moments_float32": ("moments", "float32", 20),
    "two": ("sample", "bfloat16", 2),  # fewer than processes
}
DTYPES = (torch.float32, torch.bfloat16)
GLOBAL, STEPS, LATER = 12, 5, 4  # epochs of 20 end within steps 2 and 4; LATER: where a resume begins
BOTH = STEPS + STEPS + 1 - LATER


def write(directory: Path, store: str, dtype: str, count: int) -> None:
    """Latents in shards of 8, each channel of its own size, mirror images unlike them."""
    g = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.1, 1.0, 3.0, 20.0]).view(4, 1, 1)
    parts = [scale * (torch.randn(count, *SHAPE, generator=g) + 2) for _ in range(1 + (store == "moments"))]
    stored = torch.cat([parts[0], *(part.abs() for part in parts[1:])], 1)
    writer = LatentsWriter(directory, shard_size=8, store=store, dtype=dtype)
    writer.add(stored, stored + 1, torch.arange(count) % 7)
    writer.close()
    finish(directory)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    for name, kind in SETS.items():
        write(root / name, *kind)
    return root


def pairs(data: LatentDataset, split: BatchSplit, rank: int, first_step: int = 1):
    """Batches on the device and of the host loader, one after the other."""
    order = SampleOrder(len(data), GLOBAL, 5)
    made = DeviceBatches(DeviceLatents(data, "cpu", rank, split.world_size))
    options = {"first_step": first_step, "last_step": STEPS, "num_workers": 2, "pin_memory": False}
    return zip(*(micro_batches(source, order, split, rank, **options) for source in (made, data)), strict=True)


def compare(root: Path, rank: int, world_size: int) -> int:
    """How many batches were compared, of each set in each way; raises where a bit differs."""
    compared = 0
    for name, dtype, flip, micro in product(SETS, DTYPES, (True, False), {2, GLOBAL // world_size}):
        data = LatentDataset(root / name, latent_flip=flip, latent_dtype=dtype, latent_multiplier=0.7, seed=3)
        for first_step in (1, LATER):
            for on_device, on_host in pairs(data, BatchSplit(GLOBAL, world_size, micro), rank, first_step):
                assert on_device.keys() == on_host.keys()
                for key, value in on_host.items():
                    found = on_device[key]
                    assert found.dtype == value.dtype and torch.equal(found, value), (name, dtype, flip, micro, key)
                compared += 1
    return compared


def compare_in_processes(root: Path) -> None:
    processes = start_processes()
    compared = compare(root, processes.rank, processes.world_size)
    (root / f"compared{processes.rank}_of_{processes.world_size}").write_text(str(compared))
    dist.destroy_process_group()


def test_the_batches_of_the_host_loader(sets):
    """Over ends of epochs, with and without mirroring, accumulation, and a start in the middle."""
    assert compare(sets, 0, 1) == len(SETS) * 2 * 2 * BOTH * (6 + 1)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_send_each_other_what_each_needs(sets, world_size):
    assert call(compare_in_processes, sets, world_size=world_size) == [0] * world_size
    cuts = {2, GLOBAL // world_size}
    counted = sum(GLOBAL // world_size // micro for micro in cuts) * len(SETS) * 2 * 2 * BOTH
    for rank in range(world_size):
        assert int((sets / f"compared{rank}_of_{world_size}").read_text()) == counted


def test_what_is_held_is_spread_evenly_and_no_wider_than_it_must_be(sets):
    for name, (store, dtype, count) in SETS.items():
        for asked, flip in product(DTYPES, (True, False)):
            data = LatentDataset(sets / name, latent_flip=flip, latent_dtype=asked)
            held = [DeviceLatents(data, "cpu", rank, 3) for rank in range(3)]
            for part in held:
                part.load()
            width = torch.bfloat16 if asked == torch.bfloat16 else getattr(torch, dtype)
            row = 60 * (2 if store == "moments" else 1) * width.itemsize * (2 if flip else 1)
            assert sum(part.rows.nbytes for part in held) == count * row
            assert {part.bytes for part in held} == {-(-count // 3) * row}
            assert max(part.rows.nbytes for part in held) <= held[0].bytes
            held[0].free()
            assert held[0].rows is None


class Waits(TorchDispatchMode):
    """Notes operators that wait for a device: those that read a value of a tensor or make one of unknown size."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket.__name__ in ("_local_scalar_dense", "item", "nonzero", "masked_select"):
            self.found.add(op)
        return op(*args, **(kwargs or {}))


def test_a_batch_waits_for_nothing_on_the_device(sets):
    """Plans are made in a thread, where this mode does not look: on the host, before they are moved."""
    data = LatentDataset(sets / "moments", seed=3)
    with Waits() as waits:
        assert len(list(pairs(data, BatchSplit(GLOBAL, 1, 4), 0))) == 3 * STEPS
        assert not waits.found
        torch.ones(3).nonzero()
    assert waits.found, "the mode looks"


def test_a_stream_that_is_closed_leaves_no_thread_and_its_memory_can_be_had_back(sets):
    made = DeviceBatches(DeviceLatents(LatentDataset(sets / "sample"), "cpu"))
    order, split = SampleOrder(20, GLOBAL, 5), BatchSplit(GLOBAL, 1, GLOBAL)
    stream = micro_batches(made, order, split, 0, first_step=1, last_step=10**9, num_workers=0, pin_memory=False)
    first = next(stream)["y"]
    stream.close()
    made.close()
    assert made.latents.rows is None and not [t for t in threading.enumerate() if "loader" in t.name]
    again = micro_batches(made, order, split, 0, first_step=1, last_step=1, num_workers=0, pin_memory=False)
    assert torch.equal(next(again)["y"], first)


class Stream:
    """Stands in for a stream of a GPU: notes what is done with it."""

    def __init__(self, notes: list):
        self.notes = notes

    def record_event(self) -> int:
        self.notes.append("recorded")
        return len(self.notes)

    def wait_event(self, event: int) -> None:
        assert self.notes[event - 1] == "recorded", "what is waited for has happened"
        self.notes.append("waited")


def test_steps_are_made_ready_one_ahead_in_a_stream_of_their_own(sets, monkeypatch):
    """By stand-ins for streams and page-locked memory: the one step waits for the other stream's work and marks it."""
    notes: list = []
    side, present, pinned, marked = Stream(notes), Stream(notes), [], []
    data, order, split = LatentDataset(sets / "moments", seed=3), SampleOrder(20, GLOBAL, 5), BatchSplit(GLOBAL, 1, 6)
    made = DeviceBatches(DeviceLatents(data, "cpu"))
    made._stream = side
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t.clone()) or pinned[-1])
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, stream: marked.append((t.data_ptr(), stream)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: present)
    entered: list = []
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered.append(stream) or nullcontext())
    options = {"first_step": 1, "last_step": 3, "num_workers": 0, "pin_memory": False}
    found = list(micro_batches(made, order, split, 0, **options))
    want = list(micro_batches(data, order, split, 0, **options))
    assert all(torch.equal(a[key], b[key]) for a, b in zip(found, want, strict=True) for key in a)
    assert notes == ["recorded", "recorded", "waited", "recorded", "waited", "waited"] and entered == [side] * 3
    assert {pointer for pointer, _ in marked} == {t.data_ptr() for t in pinned} and len(pinned) == 3 * 3
    assert all(stream is present for _, stream in marked)


# --- training


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    return toy.write_latents(tmp_path_factory.mktemp("latents") / "set")


@pytest.fixture
def run_file(tmp_path, latents) -> str:
    data = {"data_path": str(latents), "valid_path": str(latents)}
    train = {"output_dir": str(tmp_path), "micro_batch_size": 2, "max_steps": 4, "ckpt_every": 2}
    return str(toy.write_run(tmp_path / "run.yaml", toy.LIGHTNINGDIT, data=data, train=train))


def trained(directory: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Numbers of the rows of a run, and all tensors of its last checkpoint."""
    told = ("step", "loss", "mse", "grad_norm", "valid_ema/loss")
    newest = checkpoint.newest(directory / "checkpoints")
    names = [name.split(".")[:2] for name in newest.manifest.files if name.endswith(".safetensors")]
    tensors = {f"{key}/{n}": t for network, key in names for n, t in newest.tensors(network, key).items()}
    return [{key: row.get(key) for key in told} for row in rows(directory)], tensors


def train_in_both_ways(run_file: str) -> None:
    for place in ("host", "device"):
        assert main(["lightningdit", run_file, f"train.exp_name={place}", f"data.placement={place}"]) == 0
    dist.destroy_process_group()


def test_training_from_the_device_is_training_from_the_host(tmp_path, run_file):
    """Of two processes with two micro-batches each."""
    assert call(train_in_both_ways, run_file, world_size=2) == [0, 0]
    (rows, tensors), (other_rows, others) = trained(tmp_path / "host"), trained(tmp_path / "device")
    assert len(rows) == 4 + 2 and rows == other_rows
    assert tensors.keys() == others.keys() and all(torch.equal(tensors[n], others[n]) for n in tensors)


def test_bfloat16_trains_to_the_same_bits_wherever_it_lies(tmp_path, run_file, caplog):
    """Also when a run on the device is stopped and goes on."""
    caplog.set_level("INFO")
    runs = [("host", "float32", 4), ("host", "bfloat16", 4), ("device", "bfloat16", 2), ("device", "bfloat16", 4)]
    for place, dtype, last in runs:
        changes = [f"data.placement={place}", f"data.latent_dtype={dtype}", f"train.max_steps={last}"]
        assert main(["lightningdit", run_file, *changes, f"train.exp_name={place}-{dtype}"]) == 0
    names = ("host-float32", "host-bfloat16", "device-bfloat16")
    (exact, _), (rows, tensors), (other_rows, others) = (trained(tmp_path / name) for name in names)
    assert rows == other_rows and all(torch.equal(tensors[n], others[n]) for n in tensors)
    assert rows[0]["mse"] != exact[0]["mse"] == pytest.approx(rows[0]["mse"], rel=1e-2), "it rounds"
    assert caplog.text.count("20 latents, rounded to bfloat16") == 3 * 2, "validation's, too"
    for said in ("device: latents in the memory of cpu: 0.00 GiB", "0.00 GiB of latents in bfloat16 on cpu, read in"):
        assert caplog.text.count(said) == 2
    assert caplog.text.count("data.num_workers 0 has no effect on training") == 2


# --- the choice


def placed(run_file: str, monkeypatch, *, device: str, free: float = 0.0, changes=(), world_size: int = 2):
    """What is chosen on so many processes whose devices have so many bytes free."""
    run = load(run_file, list(changes), kind="lightningdit")[0]
    monkeypatch.setattr(placement, "free_bytes", lambda device, processes: int(free))
    monkeypatch.setattr(Processes, "all_gather", lambda self, value: [value + 1000, value])
    latents = LatentDataset.from_config(run.data, 0)
    return placement.place_latents(run, latents, Processes(0, world_size, torch.device(device)))


HELD = 10 * 2 * 64 * 4  # bytes of a process's half of the 20 latents


def test_auto_is_the_device_where_it_has_room_and_the_host_else(run_file, monkeypatch, caplog):
    """ "meta" stands in for a GPU, to which nothing is read before training begins."""
    caplog.set_level("INFO", "launch.training.placement")
    auto = ["data.placement=auto"]
    training = placement.run_bytes(load(run_file, kind="lightningdit")[0], 2)
    needed = (HELD + training) * 8 / 7
    assert placed(run_file, monkeypatch, device="cpu", changes=auto) is None
    assert not [r for r in caplog.records if r.name == "launch.training.placement"], "nothing to say: one memory"
    chosen = placed(run_file, monkeypatch, device="meta", free=needed + 8, changes=auto)
    assert chosen.latents.bytes == HELD and chosen.latents.rows is None
    assert placed(run_file, monkeypatch, device="meta", free=needed - 8, changes=auto) is None
    texts = [r.getMessage() for r in caplog.records if r.name == "launch.training.placement"]
    assert texts[0].startswith("data.placement auto: latents in the memory of meta: 0.00 GiB of latents beside an")
    assert re.search(r"read from files, as .* GiB of free memory .* would not leave 1/8", texts[-1])
    for changes in ([], ["data.placement=host"]):  # the default, too, until the device has been measured
        assert placed(run_file, monkeypatch, device="meta", free=1e12, changes=changes) is None


def test_what_is_asked_for_and_does_not_fit_is_refused_with_figures(run_file, monkeypatch, caplog):
    """The latents alone; that training beside them may not is a warning, as it is estimated."""
    asked = ["data.placement=device"]
    training = placement.run_bytes(load(run_file, kind="lightningdit")[0], 2)
    for free, warned in ((HELD + training, 0), (HELD + training - 1, 1), (HELD, 2)):
        assert placed(run_file, monkeypatch, device="cpu", free=free, changes=asked).latents.bytes == HELD
        warnings = [r for r in caplog.records if r.name == "launch.training.placement" and r.levelname == "WARNING"]
        assert len(warnings) == warned
    assert "memory will run out: data.latent_dtype bfloat16, a smaller" in warnings[0].getMessage()
    figures = r"no room for 0\.00 GiB of latents beside an estimated [0-9.]+ GiB of training in the 0\.00 GiB of free"
    with pytest.raises(ConfigError, match=figures + ".*use placement host, data.latent_dtype bfloat16, more proc"):
        placed(run_file, monkeypatch, device="cpu", free=HELD - 1, changes=asked)
    with pytest.raises(ConfigError) as raised:
        placed(run_file, monkeypatch, device="cpu", changes=[*asked, "data.latent_dtype=bfloat16"])
    assert "latent_dtype" not in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_estimate_of_training_is_that_of_the_dry_run(run_file, stage, precision):
    changes = [f"deepspeed.zero_stage={stage}", f"train.precision={precision}", "train.micro_batch_size=4"]
    run = load(run_file, changes, kind="lightningdit")[0]
    plan = plan_run(run, "lightningdit", 2)
    assert plan.micro_batch_size == 4
    accumulation = plan.global_batch_size // (4 * 2)
    assert placement.run_bytes(run, 2) == int(memory_of(plan.networks, plan.setup, stage, 4, accumulation).peak)


def test_a_process_s_share_of_the_free_memory():
    whole, half = (placement.free_bytes(torch.device("cpu"), processes) for processes in (1, 2))
    assert whole > 2**26 and half == pytest.approx(whole / 2, rel=0.5)


def test_the_exchange_knows_all_sizes_beforehand(sets, monkeypatch):
    """What each process sends to another is what that one expects of it, over all processes of a step."""
    data, order, split = LatentDataset(sets / "sample"), SampleOrder(20, GLOBAL, 5), BatchSplit(GLOBAL, 3, 2)
    seen = []
    monkeypatch.setattr(device_batches, "read_in_threads", lambda plan, steps, threads: [*map(plan, steps)])
    monkeypatch.setattr(DeviceBatches, "_micro_batches", lambda self, plans, split: seen.append(plans))
    for rank in range(3):
        made = DeviceBatches(DeviceLatents(data, "cpu", rank, 3))
        made.stream(order, split, rank, first_step=1, last_step=STEPS, num_workers=0)
    assert len(seen) == 3 and all(len(plans) == STEPS for plans in seen)
    for plans in zip(*seen, strict=True):
        sent, received = (torch.tensor([getattr(plan, name) for plan in plans]) for name in ("sent", "received"))
        assert torch.equal(sent, received.T) and sent.sum() == GLOBAL and (received.sum(1) == GLOBAL // 3).all()
        assert [len(plan.tensors["outgoing"]) for plan in plans] == sent.sum(1).tolist()
