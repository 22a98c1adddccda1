"""The program `scaling`: its page, what it takes from run files, rows and options, what it refuses."""

import json
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.config import load
from launch.scaling_model.inputs import overlap_of
from launch.scaling_model.plan import MTBF_HOURS
from launch.training.config import TrainConfig
from tests import scaling_page, toy

XL = "launch/configs/lightningdit_xl_64ep.yaml"
ROWS = [
    {"kind": "step", "status": "ok", "model": "LightningDiT-XL/1", "variant": "trainer", "batch": batch, "date": date}
    | {"images_per_second": rate, "gpu": "NVIDIA Test", "breakdown_ms": {"optimizer": 5.0}}
    for batch, date, rate in ((64, "2026-01-01", 500.0), (128, "2026-01-01", 590.0), (128, "2026-02-01", 600.0))
]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])


def plan(capsys, *arguments: str) -> dict:
    assert main(["scaling", XL, *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments: str) -> str:
    assert main(["scaling", *arguments]) == 2
    return capsys.readouterr().err


def test_the_page_has_the_tables_that_the_program_prints():
    page = scaling_page.PAGE.read_text("utf-8")
    assert scaling_page.filled(page) == page and page.count("| GPUs") + page.count("|  GPUs") >= 6
    with pytest.raises(ValueError, match="lacks its other half"):
        scaling_page.filled(page.replace("<!-- /scaling -->", "", 1))


def test_figures_come_with_their_inputs_and_are_called_computed(capsys):
    found = plan(capsys, "--gpus", "8,64", "--mfu", "0.4")
    assert found["computed"] is True and set(found["inputs"]["network"]) == {"value", "source"}
    assert found["gpu"]["images_per_second"] == pytest.approx(0.4 * 989e12 / 711.76e9, rel=1e-4)
    assert (
        found["work"]["images"] == 80_000 * 1024
        and found["work"]["ckpt_every"] == load(XL, kind="lightningdit")[0].train.ckpt_every
    )
    assert [each["gpus"] for each in found["strong"]] == [8, 64]
    step = found["strong"][0]
    assert step["seconds"] == pytest.approx(step["compute"] + step["optimizer"] + step["exposed"])
    assert found["last_efficient"]["efficiency"] >= 0.5 == found["last_efficient"]["least"]
    assert {each["stage"] for each in found["stages"]} == {0, 1, 2, 3}


def test_nothing_is_looked_at_but_the_run_file(tmp_path, capsys):
    """A folder of data that could not be opened; images are those of the file."""
    where = [f"data.data_path={tmp_path}", "data.num_images=50000", "train.max_steps=null", "train.max_epochs=64"]
    found = plan(capsys, *where, "--gpus", "8", "--mfu", "0.4")
    assert found["work"]["images"] == pytest.approx(64 * 50_000, rel=1024 / (64 * 50_000))
    assert found["inputs"]["training"]["source"] == "run file; images: data.num_images"


@pytest.mark.parametrize(("precision", "peak"), [("bfloat16", 989e12), ("float32", 67e12)])
def test_a_share_of_the_peak_is_that_of_the_precision(capsys, precision, peak):
    found = plan(capsys, "--gpus", "8", "--mfu", "0.4", f"train.precision={precision}")
    assert found["gpu"]["images_per_second"] == pytest.approx(0.4 * peak / 711.76e9, rel=1e-4)
    assert f"of {peak / 1e12:g} TFLOP/s, dense {precision} of H100" in found["inputs"]["one GPU"]["source"]
    given = plan(capsys, "--gpus", "8", "--mfu", "0.4", "--peak", "100", f"train.precision={precision}")
    assert given["gpu"]["images_per_second"] == pytest.approx(0.4 * 100e12 / 711.76e9, rel=1e-4)


def test_a_run_that_failures_let_come_to_no_end_is_valid_json_and_said(capsys):
    options = ["--gpus", "8", "--mfu", "0.4", "--mtbf-hours", "0.001"]
    assert main(["scaling", XL, *options, "--json"]) == 0

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)["strong"][0]["training"]
    assert (found["lost"], found["total"]) == (None, None) and found["hours"] > 1
    assert main(["scaling", XL, *options]) == 0
    text = capsys.readouterr().out
    assert "no end |" in text and "inf" not in text.partition("Strong scaling")[2]


def test_mfu_and_rate_are_the_same_by_hand(capsys):
    """20.4 % of 989 TFLOP/s are 284 images/s of XL: 8 GPUs take 10 hours where nothing is lost."""
    fast = ("--network", "intra=1e9,inter=1e9,latency=1e-9", "--optimizer-ms", "1e-6", "--mtbf-hours", "1e15")
    found = plan(capsys, "--gpus", "8", "--mfu", "0.2044", *fast)
    assert round(found["gpu"]["images_per_second"]) == 284
    assert found["strong"][0]["training"]["total"] == pytest.approx(10, rel=0.005)


def test_a_measured_step_is_taken_from_rows(tmp_path, capsys):
    path = tmp_path / "gpu.jsonl"
    path.write_text("\n".join(map(json.dumps, [*ROWS, {"kind": "op"}, {**ROWS[0], "batch": 256, "status": "failed"}])))
    found = plan(capsys, "--rows", str(path), "--gpus", "8")
    assert (found["gpu"]["images_per_second"], found["gpu"]["micro_batch"], found["gpu"]["optimizer"]) == (
        600,
        128,
        5e-3,
    )
    assert found["inputs"]["one GPU"]["source"] == "measured: gpu.jsonl, NVIDIA Test, trainer, batch 128"
    assert plan(capsys, "--rows", str(path), "--micro-batch", "64")["gpu"]["images_per_second"] == 500
    said = refused(capsys, XL, "--rows", str(path), "--variant", "bare")
    assert f"{path} has no measured step of LightningDiT-XL/1 bare; it has LightningDiT-XL/1 trainer batch 128" in said
    path.write_text("{")
    assert "is no file of JSON lines" in refused(capsys, XL, "--rows", str(path))
    assert "does not exist" in refused(capsys, XL, "--rows", str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the rate of one GPU is wanted once: --rows FILE .* (got none)"),
        (["--mfu", "0.4", "--images-per-second", "3"], "(got images_per_second, mfu)"),
        (["--images-per-second", "3"], "give --micro-batch"),
        (["--mfu", "0.4", "--optimizer-ms", "900"], "the optimizer's 900.0 ms are no part of a step of 230.3 ms"),
        (["--mfu", "0.4", "--network", "h100-nrd"], "did you mean 'h100-ndr'"),
        (["--mfu", "0.4", "--efficiency", "8:0.5", "--half-batch", "2"], "give one"),
    ],
)
def test_what_is_missing_or_contradicts_itself_is_one_line(capsys, arguments, said):
    error = refused(capsys, XL, *arguments)
    assert all(part in error for part in said.split(" .* ")) and error.count("error:") == 1
    assert "Traceback" not in error


@pytest.mark.parametrize("value", ["0", "1.5", "x", "nan"])
def test_shares_and_counts_are_checked(capsys, value):
    with pytest.raises(SystemExit):
        main(["scaling", XL, "--mfu", value])
    assert "a number above 0, at most 1, is wanted" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["scaling", XL, "--gpus", f"8,{value}"])
    assert "a whole number above 0 is wanted" in capsys.readouterr().err


def test_gpus_that_cannot_share_the_batch_are_named_and_the_others_planned(capsys):
    assert main(["scaling", XL, "--mfu", "0.4", "--gpus", "8,12,2048"]) == 0
    text = capsys.readouterr().out
    assert "2,048 GPUs: a global batch of 1,024 is less than one image for each GPU." in text
    assert "12 GPUs: --gpus 12 is no multiple of the 8 GPUs of a node (h100-ndr)." in text
    assert "images for each" in text and "|     8 |            128 |" in text


def test_options_reach_what_they_are_for(capsys):
    options = {"--epochs": "32", "--gradients": "float32", "--restart-minutes": "30", "--host-rate": "50"}
    options |= {"--storage-rate": "4", "--critical-batch": "5000", "--half-batch": "8", "--mtbf-hours": "1000"}
    found = plan(capsys, "--mfu", "0.4", *(word for pair in options.items() for word in pair))
    assert found["work"]["images"] == 32 * 1_281_167 and found["work"]["gradient_bytes"] == 4
    assert found["surroundings"] == {
        "mtbf": 1000, "restart": 0.5, "host_rate": 50e9, "storage_rate": 4e9, "critical_batch": 5000
    }  # fmt: skip
    assert found["gpu"]["half_batch"] == 8 and found["inputs"]["failures of a GPU"]["source"] == "given"
    assert pytest.approx(50_677, abs=1) == MTBF_HOURS


def test_traffic_follows_the_run_file(capsys):
    overrides = "deepspeed.overrides={communication_data_type: fp32, zero_optimization: {reduce_bucket_size: 1000000}}"
    work = plan(capsys, "--mfu", "0.4", overrides, "train.compile=regional")["work"]
    assert (work["gradient_bytes"], work["bucket"]) == (4, 1_000_000)
    assert work["overlapped"] == [False, True, True, True]
    assert plan(capsys, "--mfu", "0.4")["work"]["overlapped"] == [False, False, False, True]  # compiled whole
    assert plan(capsys, "--mfu", "0.4", "--overlap", "no")["work"]["overlapped"] == [False] * 4


@pytest.mark.parametrize(
    ("stage", "comm", "compile", "expected", "why"),
    [
        (0, True, "none", False, "ZeRO 0"),
        (1, None, "none", False, "overlap_comm is false"),
        (1, True, "auto", False, "one graph"),
        (2, True, "cudagraphs", False, "one graph"),
        (2, True, "regional", True, "regional"),
        (3, None, "auto", True, "none"),
        (3, False, "auto", False, "overlap_comm is false"),
    ],
)
def test_sums_overlap_where_gradients_come_one_by_one(stage, comm, compile, expected, why):
    found, reason = overlap_of(TrainConfig(compile=compile), stage, comm)
    assert found is expected and why in reason
    assert overlap_of(TrainConfig(compile=compile), stage, comm, "yes")[0] is (stage > 0)


def test_a_tokenizer_is_planned_too(tmp_path, capsys):
    config = toy.write_run(tmp_path / "v.yaml", toy.VAVAE, data={"data_path": str(tmp_path / "not here")})
    arguments = ["--kind", "vavae", "--images-per-second", "40", "--micro-batch", "2", "--gpus", "2", "--json"]
    assert main(["scaling", str(config), *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["work"]["images"] == pytest.approx(5 * 4) and found["strong"][0]["gpus"] == 2
    assert "--rows has steps of LightningDiT" in refused(capsys, str(config), "--kind", "vavae", "--rows", "x")
