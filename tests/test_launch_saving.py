"""Checkpoints written in the background: the bytes of an inline save, the state at the call, and errors that surface.

Each of several processes copies and sends its own part, so the same is done by one process and by two.
"""

import errno
import os
import threading
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import kernels
from common.files import WriteError, read_json, write_json
from launch.config import ConfigError, load
from launch.training import checkpoint, saving
from launch.training.build import make_trainer
from launch.training.config import TrainConfig
from launch.training.deepspeed_options import deepspeed_config
from launch.training.engine import Engine, start_processes
from launch.training.optimizer import AdamWEma
from launch.training.saving import Saver
from tests import toy
from tests.children import call

OFFLOADED = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
WEIGHTS_OFFLOADED = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}
#: ZeRO stage, bfloat16, DeepSpeed's options.
CASES = [
    *((stage, bf16, {}) for stage in (0, 1, 2, 3) for bf16 in (False, True)),
    *((stage, True, OFFLOADED) for stage in (1, 2, 3)),
    (3, True, WEIGHTS_OFFLOADED),
    (1, True, {"zero_optimization": {"parameter_alignment": True}}),
    (2, True, {"data_types": {"grad_accum_dtype": "fp32"}}),
]


class Network(torch.nn.Module):
    """Its sizes are no multiples of a number of processes; a frozen weight, and buffers that forward passes change."""

    def __init__(self):
        super().__init__()
        self.frozen = torch.nn.Parameter(torch.rand(3), requires_grad=False)
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 17), torch.nn.SiLU(), torch.nn.Linear(17, 5))
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers(x * self.frozen.to(x.dtype))
        self.mean.add_(y.detach().mean(0).to(self.mean.dtype))
        self.calls.add_(1)
        return y


def make_engine(stage: int, bf16: bool = False, overrides: dict | None = None) -> Engine:
    def optimizer(parameters, partitioned: bool) -> AdamWEma:
        options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "ema_decay": 0.9}
        ops = kernels.select("reference")
        return AdamWEma(parameters, ops, max_grad_norm=0.0, partitioned=partitioned, **options)

    processes = start_processes()
    config = deepspeed_config(
        stage=stage,
        bf16=bf16,
        micro_batch_size=2,
        accumulation=1,
        world_size=processes.world_size,
        overrides=overrides or {},
    )
    torch.manual_seed(0)
    return Engine(Network(), optimizer, config)


def train(engine: Engine, steps: int, bf16: bool) -> None:
    generator = torch.Generator().manual_seed(1 + start_processes().rank)
    for _ in range(steps):
        x = torch.randn(2, 3, generator=generator)
        engine.backward(engine(x.bfloat16() if bf16 else x).float().square().mean())
        engine.step()


def state_of(engines: dict[str, Engine], step: int) -> dict:
    counters = {name: {"applied": float(step), "skipped": 0.0, "skipped_in_a_row": 0.0} for name in engines}
    return toy.checkpoint_state(step, "toy", counters=counters)


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def saver(directory: Path, engines: dict[str, Engine], **train) -> Saver:
    return Saver(directory, engines, start_processes(), TrainConfig(**train))


@mock.patch("os.fsync", lambda handle: None)  # of hundreds of files
def compare(directory: Path) -> None:
    """Per case, whether both saves of a state gave the same files; then what follows an error in writing."""
    processes, equal = start_processes(), []
    for number, (stage, bf16, overrides) in enumerate(CASES):
        engines = {"one": make_engine(stage, bf16, overrides)}
        train(engines["one"], 2, bf16)
        if not bf16:  # a discriminator beside an autoencoder
            engines["two"] = make_engine(stage)
            train(engines["two"], 1, bf16)
        state = state_of(engines, 2) if processes.is_main else None
        paths = []
        for background in (False, True):
            own = saver(directory / f"{number}{background}", engines, background_save=background)
            own.save(state)
            own.wait()
            paths.append(directory / f"{number}{background}" / "step_0000002")
            if background:  # the memory is used again, and what is there now is saved
                train(engines["one"], 1, bf16)
                later = {name: each.full_state(keep=processes.is_main) for name, each in engines.items()}
                own.save(state_of(engines, 3) if processes.is_main else None)
                own.wait()
                if processes.is_main:
                    paths.append(checkpoint.save(directory / f"{number}later", state_of(engines, 3), later))
            own.close()
        if processes.is_main:
            third = paths[1].with_name("step_0000003")
            equal.append(
                content(paths[0]) == content(paths[1])
                and content(paths[2]) == content(third) != content(paths[1])
                and len(content(third)) == 2 + 4 * len(engines)
            )
        for engine in engines.values():
            engine.close()
    if processes.is_main:
        write_json(directory / "equal.json", equal)


def test_the_files_are_those_of_an_inline_save(tmp_path):
    """Byte for byte, in every stage and precision and with states in the host's memory."""
    compare(tmp_path)
    assert read_json(tmp_path / "equal.json") == [True] * len(CASES)


def test_the_files_of_two_processes_are_those_of_an_inline_save(tmp_path):
    assert call(compare_and_fail, tmp_path, world_size=2, limit=600) == [0, 0]
    assert read_json(tmp_path / "equal.json") == [True] * len(CASES)
    assert read_json(tmp_path / "failed.json") == ["cannot write there: No space left on device", 3, 0]


def compare_and_fail(directory: Path) -> None:
    """Then a save that the disk refuses: the main process learns why, peers go on, and the next one is written."""
    compare(directory)
    processes, engines = start_processes(), {"one": make_engine(1)}
    own, real, said = saver(directory / "failed", engines), checkpoint.write_tensors, ""
    checkpoint.write_tensors = refuse
    own.save(state_of(engines, 2) if processes.is_main else None)
    try:
        own.wait()
    except WriteError as e:
        said = str(e)
    checkpoint.write_tensors = real
    own.save(state_of(engines, 3) if processes.is_main else None)
    own.wait()
    if processes.is_main:
        left = [path for path in (directory / "failed").iterdir() if path.name != "step_0000003"]
        write_json(directory / "failed.json", [said, checkpoint.newest(directory / "failed").step, len(left)])
    else:
        assert not said
    processes.barrier()


def refuse(*_) -> None:
    raise WriteError(f"cannot write there: {os.strerror(errno.ENOSPC)}")


class Held:
    """Holds back the writing of files until `release`."""

    def __init__(self, monkeypatch):
        self._go, real = threading.Event(), checkpoint.write_tensors

        def held(*args):
            assert self._go.wait(60)
            return real(*args)

        monkeypatch.setattr(checkpoint, "write_tensors", held)

    def release(self) -> None:
        self._go.set()


@pytest.mark.parametrize("stage", [0, 2])
def test_what_training_changes_after_the_call_is_not_saved(tmp_path, monkeypatch, stage):
    engines = {"one": make_engine(stage)}
    train(engines["one"], 2, False)
    want = content(
        checkpoint.save(tmp_path / "want", state_of(engines, 2), {"one": engines["one"].full_state(keep=True)})
    )
    held, own, state = Held(monkeypatch), saver(tmp_path / "own", engines), state_of(engines, 2)
    own.save(state)
    train(engines["one"], 2, False)
    state["counters"]["one"]["applied"] = 7.0
    assert own.poll() == [] and not (tmp_path / "own/step_0000002").exists()
    held.release()
    own.wait()
    assert content(tmp_path / "own/step_0000002") == want
    (saved,) = own.poll()
    assert saved.step == 2 and saved.bytes == sum(map(len, want.values()))
    assert 0 < saved.pause_seconds < saved.seconds == pytest.approx(saved.pause_seconds + saved.write_seconds)


def test_a_save_waits_for_the_one_before_and_no_longer(tmp_path, monkeypatch):
    engines = {"one": make_engine(1)}
    held, own = Held(monkeypatch), saver(tmp_path, engines)
    own.save(state_of(engines, 2))
    second_save = threading.Thread(target=own.save, args=(state_of(engines, 3),))
    second_save.start()
    second_save.join(0.3)
    assert second_save.is_alive() and own.poll() == []
    held.release()
    second_save.join(60)
    own.wait()
    first, second = own.poll()
    assert (first.step, second.step) == (2, 3) and second.pause_seconds > 0.2 > first.pause_seconds
    assert [found.step for found in checkpoint.by_step(tmp_path)] == [3, 2]


def test_what_writing_meets_is_raised_once_and_the_checkpoint_before_stays(tmp_path, monkeypatch):
    engines = {"one": make_engine(1)}
    own = saver(tmp_path, engines)
    own.save(state_of(engines, 2))
    own.wait()
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, "write_tensors", refuse)
        own.save(state_of(engines, 3))
        own._thread.join(60)
        with pytest.raises(WriteError, match="No space left"):
            own.poll()
    assert own.wait() and [path.name for path in tmp_path.iterdir()] == ["step_0000002"]
    own.save(state_of(engines, 4))
    own.wait()
    assert checkpoint.newest(tmp_path).verify().step == 4


def test_a_run_that_ends_gives_a_save_some_time_and_no_more(tmp_path, monkeypatch, caplog):
    engines = {"one": make_engine(1)}
    held, own = Held(monkeypatch), saver(tmp_path, engines)
    own.save(state_of(engines, 2))
    monkeypatch.setattr(saving, "LEAVE_TIMEOUT", 0.1)
    begin = time.monotonic()
    own.leave()
    assert time.monotonic() - begin < 15
    assert "given up" in caplog.messages[-1] and checkpoint.newest(tmp_path) is None
    monkeypatch.setattr(saving, "LEAVE_TIMEOUT", 60.0)
    held.release()
    own.close()
    assert checkpoint.newest(tmp_path).verify().step == 2


def test_the_newest_are_kept_and_those_of_every_so_many_steps(tmp_path):
    engines = {"one": make_engine(0)}
    own = saver(tmp_path, engines, ckpt_every=1, keep_checkpoints=2, keep_every=4)
    for step in range(1, 11):
        own.save(state_of(engines, step))
        own.wait()
    assert [found.step for found in checkpoint.by_step(tmp_path)] == [10, 9, 8, 4]


def test_the_device_waits_for_a_copy_before_it_changes_what_is_copied(monkeypatch):
    """Streams of a GPU, by stand-ins: forward and backward passes run beside the copy, the update comes after it."""
    engine, waited = make_engine(1), []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(wait_event=waited.append))
    engine.copied = "a copy"
    engine.backward(engine(torch.ones(2, 3)).square().mean())
    assert waited == []
    before = engine.full_state(keep=True)["model"]["layers.0.weight"]
    engine.optimizer.register_step_pre_hook(lambda *_: waited.append("the update"))
    engine.step()
    assert waited == ["a copy", "the update"]
    state = engine.full_state(keep=True)
    assert not torch.equal(state["model"]["layers.0.weight"], before)
    engine.copied = "another"
    with engine.averaged():
        assert waited[-1] == "another"
    engine.copied = "a third"
    engine.load_states({key: state[key] for key in checkpoint.KEYS})
    assert waited[-1] == "a third" and engine.copied is None


def test_the_time_of_a_copy_on_a_gpu_is_in_the_record_of_a_save(tmp_path, monkeypatch):
    """By a stand-in for the GPU's events."""
    monkeypatch.setattr(saving.HostCopy, "wait", lambda copy: 0.25)
    own = saver(tmp_path, engines := {"one": make_engine(1), "two": make_engine(1)})
    own.save(state_of(engines, 2))
    own.wait()
    (saved,) = own.poll()
    assert saved.row()["copy_seconds"] == 0.5


@pytest.mark.parametrize("while_writing", [False, True])
def test_a_run_directory_that_is_gone_is_not_made_again(tmp_path, monkeypatch, while_writing):
    def move(*_) -> None:
        (tmp_path / "run").rename(tmp_path / "moved")

    own = saver(tmp_path / "run/checkpoints", engines := {"one": make_engine(1)})
    own.save(state_of(engines, 2))
    own.wait()
    if while_writing:
        write = checkpoint.write_tensors
        monkeypatch.setattr(checkpoint, "write_tensors", lambda *a, **k: move() or write(*a, **k))
    else:
        move()
    own.save(state_of(engines, 3))
    with pytest.raises(WriteError, match="run/checkpoints: it is gone"):
        own.wait()
    assert not (tmp_path / "run").exists()


# --- in a run


@pytest.fixture
def run_file(tmp_path) -> str:
    toy.write_latents(tmp_path / "latents")
    data, train = {"data_path": str(tmp_path / "latents")}, {"output_dir": str(tmp_path), "ckpt_every": 2}
    return str(toy.write_run(tmp_path / "run.yaml", toy.LIGHTNINGDIT, data=data, train=train))


def make(run_file: str, *settings: str):
    return make_trainer(load(run_file, list(settings), kind="lightningdit")[0], "lightningdit", start_processes())


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, run_file, monkeypatch):
    """The next save is what waits; the run's end has all of them."""
    held, trainer, events = Held(monkeypatch), make(run_file, "train.max_steps=5"), []
    step = trainer.train_step

    def release_in_step_4(stream):
        step(stream)
        if trainer.step == 3:
            assert checkpoint.newest(tmp_path / "run/checkpoints") is None
        if trainer.step == 4:
            held.release()

    monkeypatch.setattr(trainer, "train_step", release_in_step_4)
    monkeypatch.setattr("launch.training.log.RunLog.write_event", lambda log, row: events.append(row), raising=False)
    assert trainer.run() is None
    found = checkpoint.by_step(tmp_path / "run/checkpoints")
    assert [each.verify().step for each in found] == [5, 4, 2] == [row["step"] for row in events][::-1]
    assert {"step", "event", "pause_seconds", "write_seconds", "bytes"} == events[0].keys()
    assert events[0]["bytes"] == sum(map(len, content(found[-1].path).values())) and events[0]["event"] == "saved"
    trainer.close()


def test_a_full_disk_ends_the_run_at_its_next_step(tmp_path, run_file, monkeypatch):
    trainer = make(run_file, "train.max_steps=9")
    real, in_step_5 = checkpoint.write_tensors, threading.Event()

    def full_from_step_4(path, *args):
        if "0000004" in str(path):
            assert in_step_5.wait(60)
            refuse()
        return real(path, *args)

    def wait_in_step_5(stream, step=trainer.train_step):
        step(stream)
        if trainer.step == 5:
            in_step_5.set()
            trainer.saver._thread.join(60)

    monkeypatch.setattr(checkpoint, "write_tensors", full_from_step_4)
    monkeypatch.setattr(trainer, "train_step", wait_in_step_5)
    with pytest.raises(WriteError, match="No space left"):
        trainer.run()
    assert trainer.step == 5 and [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_0000002"]
    trainer.close()


def test_a_run_that_ends_with_an_error_finishes_what_it_was_writing(tmp_path, run_file, monkeypatch):
    held, trainer = Held(monkeypatch), make(run_file)

    def fail_in_step_3(stream, step=trainer.train_step):
        step(stream)
        if trainer.step == 3:
            threading.Timer(0.2, held.release).start()
            raise ValueError("no such image")

    monkeypatch.setattr(trainer, "train_step", fail_in_step_3)
    with pytest.raises(ValueError, match="no such image"):
        trainer.run()
    assert checkpoint.newest(tmp_path / "run/checkpoints").verify().step == 2
    trainer.close()


def test_inline_saves_are_written_before_training_goes_on(tmp_path, run_file):
    with closing(make(run_file, "train.background_save=false")) as trainer, closing(trainer.stream()) as stream:
        trainer.train_step(stream)
        trainer.save(wait=False)
        assert checkpoint.newest(tmp_path / "run/checkpoints").verify().step == 1
        (saved,) = trainer.saver.poll()
        assert saved.pause_seconds == saved.seconds >= saved.write_seconds > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["train.keep_every=4"], "keep_every is 4, but without keep_checkpoints every checkpoint is kept"),
        (["train.keep_every=5", "train.keep_checkpoints=1"], "keep_every 5 is no multiple of ckpt_every 2"),
    ],
)
def test_a_setting_that_would_keep_nothing_is_refused(run_file, settings, said):
    with pytest.raises(ConfigError, match=said):
        load(run_file, settings, kind="lightningdit")
