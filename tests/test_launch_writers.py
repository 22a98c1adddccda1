"""Where a run's log goes: events, wandb by a stand-in of its signatures, and the line on the screen."""

import io
import json
import logging
import sys

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.config import ConfigError
from launch.training.log import RunLog, describe, describe_event
from launch.training.wandb_writer import require_wandb
from tests import stand_ins

ROW = {
    "step": 12_300,
    "last_step": 80_000,
    "epoch": 9.83,
    "images": 12_595_200,
    "global_batch_size": 1024,
    "loss": 0.5432,
    "mse": 0.5003,
    "cos_loss": 0.0429,
    "grad_norm": 0.1234,
    "lr": 2e-4,
    "skipped": 0,
    "images_per_second": 6001.2,
    "seconds_per_step": 0.17,
    "eta_seconds": 11_500.0,
    "mfu": 0.543,
    "data_wait": 0.003,
    "memory_gb": 61.2,
    "hours": 0.6,
    "wall_hours": 1.2,
    "ahead_hours": 0.94,
}


class Wandb:
    """What wandb 0.31 would be called with; `fails`: names of calls that raise, by mode of the start for `init`.

    As there, the id of a start that has failed is in use until `teardown`, and a terminal without a key is asked.
    """

    def __init__(self):
        self.started, self.logged, self.finished, self.fails, self.in_use = [], [], 0, {}, False

    def modules(self) -> dict:
        fails = self.fails

        class Error(Exception):
            pass

        class Settings:
            def __init__(self, *, console, silent, init_timeout, finish_timeout):
                assert (console, silent) == ("off", True) and init_timeout > 0 and finish_timeout > 0
                if "Settings" in fails:
                    raise TypeError("Settings has no silent")

        class Picture:
            def __init__(self, data_or_path, mode=None, caption=None):
                self.size = Image.open(data_or_path).size

        def init(*, project, id, name, config, dir, resume, settings, mode=None):
            assert not sys.stdin.isatty(), "asks for a key and waits"
            if self.in_use:
                raise Error(f"run ID {id} is in use")
            if mode in fails.get("init", ()):
                self.in_use = True
                raise Error("no such host\nsecond line")
            self.started.append({"project": project, "id": id, "name": name, "config": config, "mode": mode})
            assert resume == "allow" and isinstance(settings, Settings) and isinstance(dir, str)
            return self

        def teardown(exit_code=None):
            self.in_use = False

        names = {"init": init, "teardown": teardown, "Settings": Settings, "Image": Picture, "Error": Error}
        return {"wandb": names}

    def define_metric(self, name, step_metric=None):
        assert (name, step_metric) == ("*", "step")

    def log(self, data, step=None, commit=None):
        assert step is None and commit is None  # its own count cannot go back after a resume
        if "log" in self.fails:
            raise BrokenPipeError("the service is gone")
        self.logged.append(data)

    def finish(self, exit_code=None):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch) -> Wandb:
    found = Wandb()
    stand_ins.install(monkeypatch, found.modules())
    return found


def test_a_run_goes_on_in_wandb_where_it_was(tmp_path, wandb, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    run = {"train": {"exp_name": "xl"}, "data": {"data_path": "x"}}
    for start in (0, 2):
        log = RunLog(tmp_path, start, 9, tensorboard=False, wandb="dit", run=run)
        log.write_row(ROW | {"step": start + 1, "gone": None, "lr": 0.5})
        log.write_event({"step": start + 1, "event": "rollback", "to": 1})
        log.write_picture("previews", start + 1, lambda path: picture(path))
        log.close()
    assert sys.stdin is terminal
    first, second = wandb.started
    assert first == second and first["id"] and first["mode"] is None
    assert (first["project"], first["name"], first["config"]) == ("dit", "xl", run)
    row, event, shown = wandb.logged[:3]
    assert row["step"] == 1 and row["lr"] == 0.5 and "gone" not in row and row["epoch"] == 9.83
    assert (event["step"], event["event"], event["to"]) == (1, "rollback", 1)
    assert shown["step"] == 1 and shown["previews"].size == (6, 4)
    assert [data["step"] for data in wandb.logged] == [1, 1, 1, 3, 3, 3] and wandb.finished == 2


def picture(path) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (6, 4)).save(path)


def warned(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if "wandb_writer" in r.name and r.levelno == logging.WARNING]


@pytest.mark.parametrize(("modes", "said"), [((None,), 1), ((None, "offline"), 2)])
def test_where_no_server_answers_the_log_is_kept_here_and_training_goes_on(tmp_path, wandb, caplog, modes, said):
    wandb.fails["init"] = modes
    caplog.clear()
    log = RunLog(tmp_path, 0, 9, tensorboard=False, wandb="dit")
    log.write_row(ROW)
    log.close()
    found = warned(caplog)
    assert len(found) == said and f"(no such host): its log is kept in {tmp_path / 'wandb'}" in found[0]
    assert [each["mode"] for each in wandb.started] == ["offline"][: 2 - said] and len(wandb.logged) == 2 - said
    assert json.loads(log.path.read_text()) == ROW


def no_module(wandb, monkeypatch, folder) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)


def no_settings(wandb, monkeypatch, folder) -> None:
    wandb.fails["Settings"] = True


def no_id(wandb, monkeypatch, folder) -> None:
    (folder / "wandb_run_id").mkdir()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [(no_module, "import of wandb halted"), (no_settings, "Settings has no silent"), (no_id, "wandb_run_id")],
)
def test_whatever_keeps_wandb_from_starting_is_said_once_and_training_goes_on(
    tmp_path, wandb, monkeypatch, caplog, wrong, said
):
    wrong(wandb, monkeypatch, tmp_path)
    log = RunLog(tmp_path, 0, 9, tensorboard=False, wandb="dit")
    log.write_row(ROW)
    log.write_picture("previews", 1, picture)
    log.close()
    (found,) = warned(caplog)
    assert said in found and found.endswith("this start of the run has no log there") and not wandb.logged
    assert json.loads(log.path.read_text()) == ROW


def test_wandb_that_fails_later_is_named_once_and_training_goes_on(tmp_path, wandb, caplog):
    log = RunLog(tmp_path, 0, 9, tensorboard=False, wandb="dit")
    wandb.fails["log"] = True
    caplog.clear()
    for step in (1, 2):
        log.write_row(ROW | {"step": step})
    log.close()
    (said,) = warned(caplog)
    assert "wandb failed (BrokenPipeError: the service is gone)" in said
    assert len(log.path.read_text().splitlines()) == 2


def test_a_project_without_the_package_is_refused(tmp_path, monkeypatch):
    stand_ins.remove(monkeypatch, "wandb")
    require_wandb(None)
    with pytest.raises(ConfigError, match=r"train\.wandb is 'dit', but the package wandb is not installed: pip inst"):
        require_wandb("dit")


def test_a_folder_of_its_name_is_not_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    (tmp_path / "wandb").mkdir()
    with pytest.raises(ConfigError, match="the package wandb is not installed"):
        require_wandb("dit")


def test_events_stay_up_to_the_step_that_is_resumed_from(tmp_path):
    log = RunLog(tmp_path, 0, 9)
    for step in (2, 4, 6):
        log.write_row(ROW | {"step": step})
        log.write_event({"step": step, "event": "saved", "bytes": step})
    log.close()
    log = RunLog(tmp_path, 4, 9)
    log.write_event({"step": 4, "event": "resumed", "checkpoint": "step_0000004"})
    log.close()
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [(line["step"], line.get("event")) for line in lines] == [
        (2, None), (2, "saved"), (4, None), (4, "saved"), (4, "resumed"),
    ]  # fmt: skip
    assert all(line["time"][:2] == "20" and "T" in line["time"] for line in lines if "event" in line)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (resumed,) = board.Tensors("events/resumed")
    assert resumed.step == 4 and json.loads(resumed.tensor_proto.string_val[0])["checkpoint"] == "step_0000004"


def test_a_line_says_where_a_run_stands_how_fast_it_is_and_when_it_ends():
    assert describe(ROW) == (
        "step  12,300/80,000  epoch 9.83  images 12,595,200  (batch 1024)  loss 0.5432  mse 0.5003  cos 0.0429  "
        "grad 0.1234  lr 0.0002  6,001 img/s  MFU 54.3%  data wait 0.3%  61.2 GB  56m24s ahead  eta 3h11m"
    )
    assert "  3h00m behind  " in describe(ROW | {"ahead_hours": -3.0})
    without = describe(ROW | {"mfu": None, "ahead_hours": None})
    assert "MFU" not in without and "ahead" not in without and "not finite" not in without
    assert "mse not finite" in describe(ROW | {"mse": None})


def test_a_line_leaves_out_what_is_of_single_blocks_and_times():
    row = ROW | {"watch/logit/3": 7.0, "valid_ema/loss_t0.1": 7.0, "valid/loss": 0.25, "loss_spikes": 0, "skipped": 2}
    said = describe(row)
    assert "watch" not in said and "t0.1" not in said and "spikes" not in said
    assert "  valid/loss 0.25  " in said and "  skipped 2  " in said
    assert "  loss_spikes 3  " in describe(row | {"loss_spikes": 3})


def test_an_event_is_a_line():
    event = {"step": 6, "event": "rollback", "to": 3, "why": "10 steps skipped", "seconds": 1.5}
    assert describe_event(event | {"time": "2026"}) == "step       6  rollback  to 3  why 10 steps skipped  seconds 1.5"
