"""How a run gets on, against numbers worked out by hand: MFU, waiting for data, memory, hours, the published pace."""

import resource
from types import SimpleNamespace

import pytest
import torch

from launch.config import load
from launch.runtime.processes import Processes
from launch.training import checkpoint, progress
from launch.training.build import make_trainer
from launch.training.engine import start_processes
from launch.training.flops import training_flops
from launch.training.progress import DataWait, Progress, RunTime, peak_flops, peak_memory
from lightningdit.cost import flops_per_image
from tests import toy
from tests.run_rows import events, read_lines

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def scripted(*times: float):
    """A clock that shows these seconds, one after the other."""
    return iter(times).__next__


@pytest.fixture
def gpu(monkeypatch) -> SimpleNamespace:
    """A stand-in of a device: its name, the bytes at most allocated, and how often the count began anew."""
    found = SimpleNamespace(name="NVIDIA H200", peak=61_200_000_000, resets=0)

    def reset(device):
        found.resets += 1

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: found.name)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: found.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    return found


class Gathering(Processes):
    """Two processes of which the other one's values are given."""

    def all_gather(self, value):
        return [value, (0.25, 70e9)]


def measured(device: torch.device, precision: str = "bfloat16", **changes) -> Progress:
    settings = dict(last_step=80_000, global_batch_size=1024, num_samples=1_281_167, precision=precision)
    settings |= dict(processes=Processes(0, 1, device), flops=lambda step: 711.76e9, paced=True)
    return Progress(**settings | changes)


def test_mfu_is_the_models_flops_over_the_peak_of_all_devices(gpu):
    """1,000 steps of 1,024 images in 512 s on two H200: 2,000 images/s at 712 GFLOP, of 2 × 989 TFLOP/s."""
    run = measured(CUDA, processes=Gathering(0, 2, CUDA))
    run._throughput = progress.Throughput(scripted(0.0, 0.0, 512.0))
    run.start(0)
    row = run.read(1000)
    assert row["images_per_second"] == 2000 and row["mfu"] == pytest.approx(2000 * 711.76e9 / (2 * 989e12))
    assert (row["data_wait"], row["memory_gb"]) == (0.25, 70.0)  # of the slowest loader and the fullest device
    assert measured(CUDA, "float32", processes=Gathering(0, 2, CUDA))._peak == 67e12
    assert measured(CUDA, processes=Gathering(1, 2, CUDA))._mfu(1, 1.0) is None  # the main process writes rows


def test_where_no_peak_is_known_there_is_no_mfu(gpu):
    gpu.name = "NVIDIA T4"
    assert peak_flops(CUDA, "bfloat16") is None and peak_flops(CPU, "bfloat16") is None
    flops = []
    run = measured(CPU, flops=flops.append)
    run.begin(0)
    row = run.read(1)
    assert row["mfu"] is None and row["ahead_hours"] is None and not flops  # counting operators takes seconds
    assert row["memory_gb"] == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, rel=0.1)


def test_memory_is_the_most_since_the_row_before(gpu):
    assert peak_memory(CUDA) == 61_200_000_000 and gpu.resets == 1
    assert 50e6 < peak_memory(CPU) < 100e9


def test_waiting_is_the_time_inside_and_starts_anew():
    wait = DataWait(scripted(10.0, 10.5, 20.0, 21.0, 30.0, 30.25))
    for _ in range(2):
        with wait:
            pass
    assert (wait.read(), wait.read()) == (1.5, 0.0)
    with pytest.raises(StopIteration), wait:
        next(iter(()))
    assert wait.read() == 0.25


def test_what_was_waited_for_before_a_pause_counts_in_no_row():
    run = measured(CPU)
    run._throughput, run.data_wait = progress.Throughput(scripted(0, 0, 8.0)), DataWait(scripted(0, 3, 4, 6))
    with run.data_wait:
        pass
    run.start(0)
    with run.data_wait:
        pass
    assert run.read(4)["data_wait"] == 2 / 8


def test_hours_go_on_with_the_checkpoint_and_the_calendar_does_not_stop():
    """Two starts: 2 hours on 8 GPUs, a day of nothing, 1 hour on 4."""
    first = RunTime(8, scripted(100.0, 100.0 + 7200), scripted(1e9))
    first.begin()
    saved = first.state_dict()
    assert saved == {"hours": 2.0, "gpu_hours": 16.0, "started": 1e9}
    second = RunTime(4, scripted(5.0, 5.0 + 3600), scripted(2e9, 1e9 + 27 * 3600))
    second.load_state({"step": 3, **saved})
    second.begin()
    row = second.read(25 * 1_024_000, paced=True)  # images of 25 GPU hours of the published run, in 20
    assert row == {"hours": 3.0, "wall_hours": 27.0, "ahead_hours": pytest.approx(5 / 4)}


def test_the_published_pace_is_64_epochs_in_10_hours_on_8_gpus():
    for gpus, hours in ((8, 10.0), (1, 80.0), (64, 1.25)):
        run = RunTime(gpus, scripted(0.0, 3600.0 * hours, 3600.0 * (hours + 1)))
        run.begin()
        assert run.read(80_000 * 1024, paced=True)["ahead_hours"] == pytest.approx(0, abs=1e-9)
        assert run.read(80_000 * 1024, paced=True)["ahead_hours"] == pytest.approx(-1)


def test_an_earlier_checkpoint_says_nothing_of_time():
    run = RunTime(8)
    run.load_state({"step": 1000})
    run.begin()
    assert set(run.read(10, paced=True).values()) == {None} and set(run.state_dict().values()) == {None}


def test_a_resumed_run_goes_on_with_its_hours_and_says_that_it_was_resumed(tmp_path):
    data = {"data_path": str(toy.write_latents(tmp_path / "latents"))}
    train = {"output_dir": str(tmp_path), "max_steps": 1}
    path = toy.write_run(tmp_path / "run.yaml", toy.LIGHTNINGDIT, data=data, train=train)
    for steps in (1, 2):
        run, _ = load(path, [f"train.max_steps={steps}"], kind="lightningdit")
        make_trainer(run, "lightningdit", start_processes()).run()
    one, two = (checkpoint.Checkpoint(tmp_path / f"run/checkpoints/step_000000{n}").state for n in (1, 2))
    assert 0 < one["hours"] == one["gpu_hours"] < two["hours"] and one["started"] == two["started"]
    (resumed,) = events(tmp_path / "run", "resumed")
    assert resumed["step"] == 1 and resumed["checkpoint"].endswith("run/checkpoints/step_0000001")
    row = [line for line in read_lines(tmp_path / "run") if "event" not in line][-1]
    assert row["step"] == 2 and one["hours"] < row["hours"] <= two["hours"] and row["wall_hours"] >= row["hours"]
    assert row["mfu"] is None and row["ahead_hours"] is None and 0 <= row["data_wait"] <= 1 and row["memory_gb"] > 0.05


def test_flops_are_those_of_the_terms_in_force(tmp_path):
    """A tokenizer's discriminator begins after two steps; a LightningDiT has the same in every step."""
    data = {"data_path": str(tmp_path)}
    run, _ = load(toy.write_run(tmp_path / "v.yaml", toy.VAVAE, data=data), kind="vavae")
    flops = training_flops(run, 10)
    assert 0 < flops(1) == flops(2) < flops(3) == flops(100)
    run, _ = load(toy.write_run(tmp_path / "l.yaml", toy.LIGHTNINGDIT, data=data), kind="lightningdit")
    assert training_flops(run, 10)(1) == flops_per_image(run.network())[1]
