"""The program `compare`: means at common steps, differences, hours to a loss, the picture, and what it refuses."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.files import read_json
from launch.__main__ import main
from launch.comparison import picture
from launch.comparison.curves import PUBLISHED_MSE, Curve, published, read_curves, short_names
from launch.comparison.table import common_steps, common_window, duration, labels, report
from tests.test_launch_run_directory import row, save, write

GOLDEN = Path(__file__).parent / "golden" / "10_upstream_train_log.json"


def curve(name="run", steps=(10, 20, 30), values=(3.0, 2.0, 1.0), hours=None, **facts) -> Curve:
    steps = np.array(steps)
    hours = steps / 100 if hours is None else np.array(hours, dtype=float)
    return Curve(name, steps, np.array(values, dtype=float), hours, int(np.median(np.diff(steps, prepend=0))), **facts)


def a_run(path: Path, losses=(3.0, 2.0, 1.0), every=10, seconds=36.0, batch=8, **values) -> Path:
    facts = {"global_batch_size": batch, "seconds_per_step": seconds, "images_per_second": batch / seconds} | values
    rows = [row(every * (i + 1), last_step=100, mse=loss, **facts) for i, loss in enumerate(losses)]
    write(path / "metrics.jsonl", *rows)
    return path


def test_the_published_curve_is_that_of_its_log():
    log = read_json(GOLDEN)
    every = {step: loss for step, loss, _ in log["rows"]}
    assert {step: every[step] for step in PUBLISHED_MSE} == PUBLISHED_MSE
    found = published()
    assert found.hours[-1] == 10.0 and found.steps[-1] == 80_000
    assert found.images_per_second / found.gpus == pytest.approx(284, abs=1)


def test_means_are_over_the_steps_of_the_window():
    values = np.random.default_rng(0).normal(size=200)
    found = curve(steps=range(1, 201), values=values)
    at = np.array([50, 100, 200])
    assert found.means(at, 50) == pytest.approx([values[0:50].mean(), values[50:100].mean(), values[150:200].mean()])
    assert np.isnan(found.means(np.array([400]), 50)).all()


def test_there_are_no_means_of_steps_that_were_not_made():
    """Nor of rows that tell of fewer steps; the last row of a run that logs every 40 steps may be late."""
    run = curve(steps=range(10, 60, 10), values=[1.0] * 5)
    assert np.isnan(run.means(np.array([50, 51, 100]), 100)).all()
    assert list(np.isfinite(run.means(np.array([10, 20, 50, 51]), 20))) == [False, True, True, False]
    seldom = curve(steps=(40, 80, 120), values=(1.0, 2.0, 3.0))
    assert seldom.means(np.array([100]), 80) == pytest.approx([(20 * 0 + 40 * 1 + 40 * 2) / 80])


def test_a_run_is_not_compared_beyond_its_end():
    long, short = curve("long", (100, 200), (1.0, 0.5)), curve("short", range(10, 60, 10), [2.0] * 5)
    text = report([long, short], "mse", [], None)
    assert "|  100 | 1.0000 |     – |" in text and "|   50 |" not in text and "2.0000" not in text


def test_rows_weigh_as_many_steps_as_they_are_means_of():
    found = curve(steps=(10, 40), values=(4.0, 1.0))
    assert found.means(np.array([40]), 40)[0] == pytest.approx((10 * 4 + 30 * 1) / 40)
    gaps = curve(steps=(10, 20, 30), values=(4.0, math.nan, 1.0))
    assert gaps.means(np.array([30, 20]), 20) == pytest.approx([1.0, 4.0])


def test_when_a_loss_is_reached():
    found = curve()
    assert found.reached(2.0, 10) == (20, 0.2) and found.reached(2.5, 10) == (20, 0.2)
    assert found.reached(1.5, 20) == (30, 0.3) and all(map(math.isnan, found.reached(1.4, 20)))
    assert math.isnan(found.reached(0.5, 10)[0])
    known = published()
    assert known.reached(0.3045, 100) == (80_000, 10.0) and known.reached(1.3, 100) == (100, 0.0125)
    step, hours = known.reached((0.3379 + 0.3270) / 2, 100)  # in the middle, of the steps by their logarithm
    assert step == pytest.approx(math.sqrt(5_000 * 10_000)) and hours == pytest.approx(step / 8_000)


def test_runs_of_other_intervals_are_compared_over_the_longer():
    fine = curve("fine", steps=range(1, 201), values=[1.0] * 100 + [3.0] * 100)
    coarse = curve("coarse", steps=(100, 200), values=(2.0, 2.0))
    text = report([fine, coarse], "mse", [], None)
    assert "mean of the 100 steps" in text
    assert "|  100 | 1.0000 | 2.0000 (+100.0%) |" in text and "|  200 | 3.0000 |  2.0000 (-33.3%) |" in text


def test_runs_shorter_than_a_published_mean_are_compared_over_their_own():
    fine, coarse = (
        curve("fine", steps=range(1, 81), values=[1.0] * 80),
        curve("coarse", steps=(40, 80), values=(2.0,) * 2),
    )
    assert published().window == 100 and common_window([published(), fine, coarse]) == 40
    long = curve("long", steps=range(1, 201), values=[1.0] * 200)
    assert common_window([published(), long]) == 100 and common_window([published(), long, coarse]) == 40


def test_common_steps_are_those_of_the_published_curve_or_round_ones():
    ours = curve(steps=range(100, 12_001, 100), values=np.linspace(1, 0.3, 120))
    assert common_steps([published(), ours], 100) == [100, 500, 1_000, 2_000, 5_000, 10_000, 12_000]
    assert common_steps([ours], 100) == [100, 200, 500, 1_000, 2_000, 5_000, 10_000, 12_000]
    short = curve(steps=(5, 10), values=(1.0, 1.0))
    assert common_steps([published(), short], 100) == [10]  # before the first published point


def test_a_report_by_hand(tmp_path):
    a, b = a_run(tmp_path / "a"), a_run(tmp_path / "b", (4.0, 1.0, 0.8), seconds=18.0)
    curves, loss, kind = read_curves([a, b])
    assert (loss, kind) == ("mse", "lightningdit")
    text = report(curves, loss, [2.0], "c.png")
    assert "|   10 | 3.0000 | 4.0000 (+33.3%) |" in text and "|   20 | 2.0000 | 1.0000 (-50.0%) |" in text
    assert "| a   |    30 |     8 |      18 min |" in text and "| b   |    30 |     8 |       9 min |" in text
    assert "12 min (step 20) | 6 min (step 20)" in text and "![mse over steps and over hours](c.png)" in text


def test_against_the_published_curve_our_mse_is_compared(tmp_path, capsys):
    losses = [PUBLISHED_MSE.get(100 * (i + 1), 1.0) * 1.1 for i in range(10)]
    run = a_run(tmp_path / "run", losses, every=100, loss=9.0, batch=1024)
    assert main(["compare", str(run), "--published", "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert text in capsys.readouterr().out
    assert text.count("(+10.0%)") == 3 and "hustvl/LightningDiT" in text and "a claim" in text
    assert "0.125 h" not in text and "7.5 min (step 1,000)" in text  # of the published curve, at its own 0.3854
    diverged = a_run(tmp_path / "diverged", [None, None], grad_norm=None)
    assert main(["compare", str(diverged)]) == 2
    assert "metrics.jsonl has no finite 'mse' in its 2 rows" in capsys.readouterr().err
    for arguments, said in (
        (["--loss", "loss"], "--loss loss"),
        (["--loss", "nothing"], "has no 'nothing'; its rows have"),
    ):
        assert main(["compare", str(run), "--published", *arguments]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("every", [100, 500])
def test_means_of_other_spans_than_the_published_ones_have_no_difference(every):
    """The published run itself, logged more rarely: its first 500 steps have a mean of 0.61, the 100 at 500 of 0.42."""
    logged = np.array([loss for _, loss, _ in read_json(GOLDEN)["rows"][:100]]).reshape(-1, every // 100).mean(1)
    text = report([published(), curve(steps=range(every, 10_001, every), values=logged)], "mse", [], None)
    assert ("(+0.0%)" in text, "%" in text) == (every == 100, every == 100)
    assert ("of published of 100, so that no difference is told" in text) == (every == 500)
    (row,) = [line for line in text.splitlines() if line.startswith("|    500 |")]
    assert row.split("|")[2:4] == (["    0.4186 ", " 0.4186 (+0.0%) "] if every == 100 else ["    0.4186 ", " 0.6143 "])


def test_runs_that_end_before_the_first_published_point_have_losses_of_their_own_to_reach(tmp_path):
    curves = [published(), curve("a"), curve("b", values=(4.0, 3.0, 2.0))]
    text = report(curves, "mse", [], None)
    assert "mean of the 10 steps" in text and "|   30 |         – | 1.0000 | 2.0000 |" in text and "%" not in text
    assert "|            1 | 1.16 min (step 154) | 18 min (step 30) |   – |" in text


def test_what_differs_between_the_runs_is_listed(tmp_path):
    paths = []
    for name, lr in (("a", 1e-3), ("b", 1e-2)):
        paths.append(a_run(tmp_path / name))
        config = {section: {} for section in ("data", "model")} | {"optimizer": {"lr": lr}, "train": {"exp_name": name}}
        save(paths[-1] / "checkpoints", 24, config=config, world_size=2)
    curves, *_ = read_curves(paths)
    text = report(curves, "mse", [], None)
    assert "* b: optimizer.lr: 0.001 → 0.01" in text and "exp_name" not in text and curves[0].gpus == 2
    (paths[1] / "checkpoints" / "step_0000024" / "state.json").unlink()
    curves, *_ = read_curves(paths)
    assert "* b: not known, b has no whole checkpoint" in report(curves, "mse", [], None)


def test_resumes_skips_and_other_batches_are_remarked(tmp_path):
    a, b = a_run(tmp_path / "a", skipped=4), a_run(tmp_path / "b", batch=16)
    with open(a / "metrics.jsonl", "a") as f:
        f.write(
            json.dumps({"step": 20, "event": "resumed"})
            + "\n{\n"
            + json.dumps({"step": 25, "event": "rollback"})
            + "\n"
        )
    curves, *_ = read_curves([a, b])
    text = report(curves, "mse", [], None)
    for remark in ("resumed: once", "rolled back: once", "4 steps skipped", "1 lines of metrics.jsonl could"):
        assert f"* a: {remark}" in text
    assert "The batches differ" in text


@pytest.mark.parametrize(("count", "kind"), [(1, "png"), (2, "svg"), (8, "svg")])
def test_a_picture_of_one_to_eight_runs(tmp_path, count, kind):
    values = np.linspace(2, 0.4, 30)
    names = ["$x_1$", "_hidden", *(f"a long name of a run {i}" for i in range(6))][:count]
    curves = [published(), *(curve(name, range(10, 301, 10), values + i / 9) for i, name in enumerate(names))]
    path = tmp_path / "new" / f"c.{kind}"
    picture.draw(curves, "mse", path)
    if kind == "png":
        assert Image.open(path).size == (1430, 598)
        return
    first = path.read_bytes()
    picture.draw(curves, "mse", path)
    assert path.read_bytes() == first  # the same bytes for the same rows
    colours = [colour for colour in picture.COLOURS if colour.lower() in first.decode().lower()]
    assert colours == list(picture.COLOURS[:count])


def test_colours_are_told_apart_also_in_grey():
    """Neighbours differ in luminance, or else in their dashes."""

    def luminance(colour: str) -> float:
        return float(np.dot([int(colour[i : i + 2], 16) for i in (1, 3, 5)], [0.2126, 0.7152, 0.0722]))

    styles = [(luminance(c), picture.DASHES[i % len(picture.DASHES)]) for i, c in enumerate(picture.COLOURS)]
    for i, (shade, dashes) in enumerate(styles):
        assert all(abs(shade - other) > 15 or dashes != line for other, line in styles[:i])


def test_a_run_whose_rows_tell_no_time_is_drawn_over_steps_alone(tmp_path):
    path = tmp_path / "run"
    write(path / "metrics.jsonl", *({"step": s, "lr": 1, "mse": 2 / s} for s in (1, 2, 3)))
    assert main(["compare", str(path), "--output", str(tmp_path / "out"), "--format", "svg"]) == 0
    assert (tmp_path / "out" / "comparison.svg").exists() and "– (step" in (
        tmp_path / "out" / "comparison.md"
    ).read_text()


def test_tokenizers_are_compared_by_reconstruction(tmp_path, capsys):
    path = tmp_path / "run"
    write(path / "metrics.jsonl", *(row(s, rec=1 / s) for s in (1, 2, 3)))
    curves, loss, kind = read_curves([path])
    assert (loss, kind) == ("rec", "vavae") and curves[0].values.tolist() == [1, 1 / 2, 1 / 3]
    assert main(["compare", str(path), "--published"]) == 2
    assert "kind vavae: the published curve is the mse of a lightningdit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: [p / "none"], "none does not exist"),
        (lambda p: [write(p / "file", "")], "file is no directory, which a run is"),
        (lambda p: [p], "has logged nothing yet"),
        (lambda p: [a_run(p / "a"), p / "b" / ".." / "a"], "is given twice"),
        (lambda p: [a_run(p / "a"), write(p / "b" / "metrics.jsonl", row(1, rec=1.0)).parent], "of different kinds"),
        (lambda p: [a_run(p / str(i)) for i in range(9)], "9 runs: a picture tells at most 8 apart"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, capsys, make, said):
    (tmp_path / "b").mkdir()
    paths = make(tmp_path)
    assert main(["compare", *map(str, paths), "--output", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_losses_to_reach_are_numbers(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["compare", str(a_run(tmp_path / "a")), "--reach", "low"])
    assert "numbers such as 0.35,0.32 are wanted (got 'low')" in capsys.readouterr().err


def test_names_are_as_short_as_they_may(tmp_path):
    assert short_names([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
    assert short_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    long = [curve("n" * 60), curve("m" * 60), curve("o" * 60)]
    assert list(labels(long).values()) == ["A", "B", "C"] and "| A: n" in report(long, "mse", [], None)


@pytest.mark.parametrize(("hours", "text"), [(2.5, "2.5 h"), (0.5, "30 min"), (0.001, "3.6 s"), (math.nan, "–")])
def test_durations_have_a_fitting_unit(hours, text):
    assert duration(hours) == text
