"""Pages and pictures from planted rows, and agreement of the committed pages with the committed rows."""

import json
import re
import shutil
from pathlib import Path

import pytest

import kernels
from bench import report
from bench.gemms import DIRECTIONS, LAYERS
from bench.measure.rows import FORMAT, ROOT
from bench.pages import pictures, tables
from bench.pages.measured import Measured, load, representative
from bench.pages.targets import TARGETS, gemm_rate, missed, verdict

MACHINE = {
    "format": FORMAT,
    "date": "2026-01-01T00:00:00+00:00",
    "device": "cuda",
    "gpu": "NVIDIA H200",
    "capability": "9.0",
    "driver": "580.1",
    "python": "3.12",
    "torch": "2.11.0",
    "cuda": "13.0",
    "triton": "3.6.0",
    "revision": "0123456789abcdef",
}
SPENT = {"optimizer": 8.0, "attention": 20.0, "gemm": 125.0, "communication": 0.0, "memory": 30.0, "idle": 2.0}


def op(job, direction: str, provider: str, p50_us: float, fraction: float, **others: float) -> dict:
    return MACHINE | {
        "kind": "op",
        **job.names,
        "direction": direction,
        "provider": provider,
        "status": "ok",
        "reason": "",
        "includes": "",
        "version": "1",
        "p20_us": p50_us,
        "p50_us": p50_us,
        "p80_us": p50_us,
        "spread": 0.01,
        "bytes": 10**8,
        "flops": 4 * 10**9,
        "limit_us": p50_us * fraction,
        "bound": "memory",
        "fraction": fraction,
        "times_faster_than": others,
    }


def step(variant: str, rate: float, **more) -> dict:
    return (
        MACHINE
        | {
            "kind": "step",
            "model": "LightningDiT-XL/1",
            "batch": 128,
            "variant": variant,
            "status": "ok",
            "reason": "",
            "features": {"engine": variant.split("-")[0]},
            "images_per_second": rate,
            "p50_ms": 128e3 / rate,
            "mfu": 0.5,
            "fraction": 0.6,
            "spread": 0.01,
            "peak_gb": 40.0,
            "times_faster_than": {"plain-eager": 3.5},
        }
        | more
    )


def comparison(kind: str, rate: float, **more) -> dict:
    """A row of sampling or of the tokenizer."""
    return (
        MACHINE
        | {
            "kind": kind,
            "provider": "auto",
            "batch": 64,
            "precision": "bfloat16",
            "status": "ok",
            "reason": "",
            "ours": True,
            "images_per_second": rate,
            "p50_ms": 64e3 / rate,
            "spread": 0.01,
            "fraction": 0.55,
            "peak_gb": 20.0,
            "times_faster_than": {},
        }
        | more
    )


def comparisons() -> list[dict]:
    """Sampling at 4.5 images/s; a tokenizer that encodes, whose decoding was cut off, and that cannot train."""
    parts = {"guided": 60.25, "unguided": 30.5, "decode": 320.0, "noise": 4.0}
    cut = {"rounds": 1, "of": 4, "interleaved": False, "cut_off": "SIGTERM"}
    xl, plain = {"model": "LightningDiT-XL/1"}, {"provider": "plain-eager", "ours": False}
    ours, theirs = ({"extrapolated": {"parts_ms": found}} for found in (parts, {"guided": 120.0}))
    rows = [
        comparison("sampling", 4.5, **xl, latents_per_second=4.75, **ours, times_faster_than={"plain-eager": 2.25}),
        comparison("sampling", 2.0, **xl, **plain, latents_per_second=2.1, **theirs),
        comparison("sampling", 90.0, model="LightningDiT-B/1", latents_per_second=99, **ours),
        comparison("tokenizer", 2100.0, part="encode", breakdown_ms=SPENT, times_faster_than={"reference": 1.75}),
        comparison("tokenizer", 2900.0, part="encode", provider="reference", ours=False),
        comparison("tokenizer", 900.0, part="decode", coverage=cut),
        comparison("tokenizer", 1.0, part="train", status="unavailable", reason="not installed: lpips"),
    ]
    products = [
        MACHINE
        | {
            "kind": "gemm",
            "model": "LightningDiT-XL/1",
            "batch": 128,
            "layer": layer,
            "ours": False,
            "direction": direction,
            "provider": name,
            "shape": [32768, 3456, 1152],
            "status": "ok",
            "reason": "",
            "flops": 10**12,
            "p50_ms": ms,
            "tflops": 1e3 / ms,
            "spread": 0.01,
            "fraction": 0.9,
        }
        for name, ms in (("torch", 1.6), ("cublaslt", 1.25))
        for layer in LAYERS
        for direction in DIRECTIONS
    ]
    return rows + products


def planted() -> list[dict]:
    rows = [MACHINE | {"kind": "baseline", "reason": "the first | rows"}]
    for name, rate, unit in (("copy", 4.2, "TB/s"), ("matmul bfloat16", 760.0, "TFLOP/s")):
        rows.append(
            MACHINE
            | {
                "kind": "ceiling",
                "ceiling": name,
                "rate": rate,
                "unit": unit,
                "spread": 0.002,
                "sheet": 4.8,
                "source": "a data sheet",
                "method": "graph",
            }
        )
    for name, declared in kernels.OPS.items():
        for direction in ("forward", "backward") if declared.differentiable else ("forward",):
            job = representative(name)
            rows += [
                op(job, direction, "cuda", 30.0, 0.8, triton=0.9, eager=5.0, compile=1.4),
                op(job, direction, "triton", 27.0, 0.89, cuda=1.11, eager=5.5, compile=1.5),
                op(job, direction, "compile", 40.0, 0.6),
                op(job, direction, "eager", 150.0, 0.16),
            ]
    rows.append(
        op(representative("swiglu"), "forward", "liger", 0, 0) | {"status": "incorrect", "reason": "its result"}
    )
    rows += [
        step(
            "trainer",
            640.0,
            breakdown_ms=SPENT,
            longest=[{"kernel": "nvjet", "kind": "gemm", "calls": 336, "ms": 125.0}],
        ),
        step("plain-eager", 180.0, breakdown_ms=SPENT),
        step("bare", 1.0) | {"status": "failed", "reason": "out of memory"},
    ]
    return rows + comparisons()


def gpu() -> Measured:
    return Measured("nvidia-h200", tuple(planted()))


@pytest.fixture
def tree(tmp_path):
    """A repository's two pages, with planted rows."""
    (tmp_path / "bench" / "results").mkdir(parents=True)
    shutil.copy(ROOT / "README.md", tmp_path)
    rows = "".join(json.dumps(row) + "\n" for row in planted())
    (tmp_path / "bench" / "results" / "nvidia-h200.jsonl").write_text(rows)
    return tmp_path


def contents(tree: Path) -> dict[str, bytes]:
    return {str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*") if path.is_file()}


def test_the_committed_pages_agree_with_the_committed_rows(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_the_readme_is_short_and_has_every_table():
    text = (ROOT / "README.md").read_text()
    assert len(report.MARKER.sub("", text).splitlines()) <= 175, "without its tables, which grow with the ops"
    assert set(re.findall(r"<!-- bench:(\w+) -->", text)) == set(tables.BLOCKS)


def test_everything_is_reproducible_byte_for_byte(tree):
    assert report.main([], tree) == 0
    first = contents(tree)
    assert set(first) == {
        "README.md",
        "bench/results/README.md",
        "bench/results/nvidia-h200.jsonl",
        *(f"bench/results/nvidia-h200-{name}.svg" for name in pictures.PICTURES),
    }
    assert report.main([], tree) == 0 and contents(tree) == first
    assert report.main(["--check"], tree) == 0


@pytest.mark.parametrize("page", ["README.md", "bench/results/README.md"])
def test_a_typed_number_is_found(page, tree, capsys, monkeypatch):
    monkeypatch.setattr(pictures, "draw", lambda gpu, folder: [])
    report.main([], tree)
    path = tree / page
    text = path.read_text()
    path.write_text(text.replace("89.0 %", "99.0 %", 1))
    assert report.main(["--check"], tree) == 1
    printed = capsys.readouterr().out
    assert f"--- {page}" in printed and "99.0 %" in printed
    path.write_text(text + "\nmore prose\n")
    assert report.main(["--check"], tree) == (page != "README.md"), "the README's prose is its own"


def test_new_rows_or_a_lost_page_make_the_pages_stale(tree, monkeypatch):
    monkeypatch.setattr(pictures, "draw", lambda gpu, folder: [])
    report.main([], tree)
    (tree / "bench" / "results" / "README.md").unlink()
    assert report.main(["--check"], tree) == 1
    report.main([], tree)
    with (tree / "bench" / "results" / "nvidia-h200.jsonl").open("a") as file:
        file.write(json.dumps(step("bare-eager", 300.0)) + "\n")
    assert report.main(["--check"], tree) == 1


def test_without_rows_nothing_is_claimed(tmp_path):
    assert load(tmp_path) == []
    page = report.page([], tmp_path)
    assert page.count("not measured yet") == len(TARGETS) + 1 and "No GPU has been measured" in page
    assert tables.training([]).count("not measured yet") == 1
    assert "GPU |" in tables.training([]) and "650" in tables.training([]), "what is aimed at is said all the same"
    assert all(target.read(Measured("none", ())) is None for target in TARGETS)


def test_the_tables_of_training_and_ops():
    training = tables.training([gpu()]).splitlines()
    want = "| NVIDIA H200 | trainer | 640 (±0.5 %) | 60.0 % | 50.0 % | 3.50 |  | 40.0 GB | 4.4 h |"
    assert training[2].startswith("| NVIDIA H200 | trainer | 640 (±0.5 %) | 60.0 % |")
    hours = 64 * 1_281_167 / (8 * 640) / 3600
    assert training[2] == want.replace("4.4 h", f"{hours:.1f} h") and len(training) == 5, "not the plain model's"
    swiglu = next(line for line in tables.ops([gpu()]).splitlines() if "`swiglu`" in line)
    assert swiglu.count("89.0 % memory (triton) | 1.50 compile") == 2, "the faster backend, the fastest other"
    adamw = next(line for line in tables.ops([gpu()]).splitlines() if "`adamw_ema_`" in line)
    assert adamw.endswith("| – | – |")


def test_the_page_of_a_gpu(tmp_path):
    page = report.page([gpu()], tmp_path)
    for heading in ("Ceilings of the run", "Training steps", "Time of a step by kind of kernel", "Other providers"):
        assert f"### {heading}\n" in page
    assert "| LightningDiT-XL/1 | 128 | bare |  |  |  |  |  |  |  | failed: out of memory |" in page
    assert "| swiglu | liger | incorrect | 1 | its result |" in page
    assert "the first \\| rows" in page, "a bar in a reason ends no cell"
    assert "| trainer | 200.0 | 8.0 | 20.0 | 125.0 | 0.0 | 30.0 | 2.0 |" in page
    assert "| swiglu | forward | eager | 1 | 5.50 | triton |" in page
    for name in pictures.PICTURES:
        assert f"(nvidia-h200-{name}.svg)" in page
    every = [line for line in tables.every_op(gpu()).splitlines() if "| swiglu |" in line]
    assert len(every) == 4
    for line in (
        "| 2026-01-01T00:00:00+00:00 | 0123456789ab | 2.11.0 | 3.6.0 | 13.0 | 580.1 | the first \\| rows |",
        "| copy | 4.20 TB/s | 0.2 % | 4.8 TB/s | a data sheet |  |",
        "| LightningDiT-XL/1 | 128 | trainer | 640 (±0.5 %) | 60.0 % | 50.0 % | 3.50 |  | 40.0 GB | 4.4 h |  |",
        "| `nvjet` | gemm | 336 | 125.00 |",
        "| swiglu | XL | bfloat16 | forward | triton | 27.0 | 1.0 % | 89.0 % memory | 3.70 TB/s | 5.50 | 1.50 "
        "| 1.50 compile |",
        "| LightningDiT-XL/1 | 128 | qkv | wgrad | 32768 × 3456 × 1152 | torch | 625.0 | 1.0 % | 90.0 % |  |",
        "| LightningDiT-XL/1 | 128 | all | mean over a step |  | torch | 625.0 |  |  |  |",
    ):
        assert f"\n{line}\n" in page, "a format string that names no key leaves its cell empty"


def test_targets_by_hand():
    found = {target.name: target.read(gpu()) for target in TARGETS}
    assert found["training"] == 640 and found["plain-eager"] == 3.5 and found["plain-compile"] is None
    assert found["swiglu-forward"] == 0.89 and found["optimizer"] == 0.89
    assert found["attention-forward"] == pytest.approx(4e9 / 27e-6 / 1e12) and found["vf-loss"] == pytest.approx(5.5)
    assert found["gemm"] == pytest.approx(1000 / 1.6), "as torch runs them"
    products = 128 * 256 * 28 * (3 + 1 + 3 * 3072 / 1152) * 1152**2 * 2 * 3  # qkv, proj, w12, w3; forward, backward
    assert gemm_rate(gpu()) == pytest.approx(products / 0.125 / 1e12), "within a step"
    assert (found["sampling"], found["encode"], found["decode"]) == (4.5, 2100, 900) and found["vavae"] is None
    training = TARGETS[0]
    assert [verdict(training, value) for value in (649, 650, 750)] == ["missed", "reached", "moonshot"]
    assert {"training", "attention-forward", "swiglu-forward"} <= {target.name for target in missed(gpu())}
    assert len({target.name for target in TARGETS}) == len(TARGETS)


def test_the_tables_of_comparisons(tmp_path):
    page = report.page([gpu()], tmp_path)
    xl = "| LightningDiT-XL/1 | 64 | bfloat16 |"
    assert f"{xl} auto | 4.50 | 1.0 % | 4.75 | 55.0 % | 2.25 |  | 60.25 | 30.50 | 320.00 | 4.00 |  |" in page
    assert f"{xl} plain-eager | 2.00 | 1.0 % | 2.10 | 55.0 % |  |  | 120.00 |  |  |  |  |" in page
    encode = "| encode | bfloat16 | 64 | auto | 2,100.0 | 1.0 % | 55.0 % | 20.0 GB | 1.75 |  |  |"
    assert f"{encode} 30.5 | 125.0 | 30.0 | 2.0 |  |" in page
    assert page.index("| reference | 2,900.0 |") < page.index("| auto | 2,100.0 |"), "the fastest first"
    assert "| 1 of 4 rounds, not by turns, cut off: SIGTERM |" in page
    assert (
        "| train | bfloat16 | 64 | auto |  |  |  |  |  |  |  |  |  |  |  | unavailable: not installed: lpips |" in page
    )
    assert "| qkv | wgrad | 32768 × 3456 × 1152 | cublaslt | 800.0 | 1.0 % | 90.0 % |  |" in page
    assert "| all | mean over a step |  | torch | 625.0 |" in page and "| best | 800.0 |" in page
    assert "| all | within a step, by the profiler |  | torch |" in page
    others = tables.BLOCKS["others"]([gpu()]).splitlines()
    assert len(others) == 2 + 5 and others[2].endswith("| 625 TFLOP/s, missed |")
    assert others[3].endswith("| 4.5 images/s, reached |")


def test_a_step_that_was_cut_off_says_so():
    rests = {"rounds": 2, "of": 4, "interleaved": True, "cut_off": "SIGTERM"}
    row = tables.training([Measured("x", (step("trainer", 640.0, coverage=rests),))]).splitlines()[2]
    assert row.startswith("| NVIDIA H200 | trainer (2 of 4 rounds, cut off: SIGTERM) | 640")


def test_the_loader_is_read_from_its_rows(tmp_path):
    row = MACHINE | {
        "kind": "data",
        "workers": 0,
        "batch_size": 128,
        "status": "ok",
        "device": "cpu",
        "gpu": None,
        "cpu": "a CPU",
        "cores": 2,
        "spread": 0.1,
        "bytes": 32768,
        "times_faster_than": {},
    }
    slower = {"times_faster_than": {"file-per-sample-0": 0.5}}
    rows = [
        row | {"provider": "latents", "latents_per_second": 60_000.0},
        row | {"provider": "latents", "latents_per_second": 70_000.0, "workers": 2} | slower,
        row | {"provider": "file-per-sample", "latents_per_second": 140_000.0},
    ]
    target = next(target for target in TARGETS if target.name == "latents-host")
    rows.append(op(representative("swiglu"), "forward", "eager", 1, 1) | {"device": "cpu"})
    (tmp_path / "cpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (cpu,) = load(tmp_path)
    assert target.read(cpu) == 70_000.0 and cpu.gpu == "a CPU, 2 cores"
    page = report.page([cpu], tmp_path)
    assert "| latents | 2 | 70,000 | 10.0 % | 2.29 | 2 | 2.00 |" in page
    assert page.count("(nvidia") == 0 and "### Other providers" not in page, "ops on a CPU are no rows"


def test_decoders_are_read_from_their_rows(tmp_path):
    row = comparison(
        "images", 2400.0, provider="dali", batch_size=32, source="tar", workers=16, spread=0.02, cores=16
    ) | {
        "bytes_per_file": 45_000.0,
        "psnr_mean": 56.2,
        "psnr_min": 55.7,
        "times_faster_than": {"pil-tar-16": 4.0},
    }
    equal = {"psnr_mean": None, "psnr_min": None}
    slower = {"times_faster_than": {"dali-tar-16": 0.25}}
    rows = [
        row,
        row | {"provider": "pil", "images_per_second": 600.0} | slower | equal,
        row | {"provider": "file-per-sample", "images_per_second": 9000.0, "ours": False},
        row | {"provider": "torchvision", "status": "unavailable", "reason": "built without nvJPEG"},
    ]
    gpu = Measured("nvidia-h200", tuple(rows))
    target = next(target for target in TARGETS if target.name == "images")
    assert target.read(gpu) == 2400 and target in missed(gpu), "the fastest of ours"
    page = report.page([gpu], tmp_path)
    assert "| dali | tar | cuda | 16 | 2,400 | 2.0 % | 1.00 | 56.2 dB | 55.7 dB | 45 | 16 |  |" in page
    assert "| pil | tar | cuda | 16 | 600 | 2.0 % | 4.00 |  |  | 45 | 16 |  |" in page
    assert "| torchvision | tar | cuda | 16 |  |  |  |  |  |  |  | unavailable: built without nvJPEG |" in page


def test_a_missed_target_is_explained_or_it_is_said_that_it_is_not(tmp_path):
    assert f"* **training, bfloat16**, 640 images/s of 650 images/s: {report.NO_NOTE}" in report.page([gpu()], tmp_path)
    (tmp_path / "training.md").write_text("The products take 125 ms.\n")
    page = report.page([gpu()], tmp_path)
    assert "640 images/s of 650 images/s: The products take 125 ms.\n" in page and report.NO_NOTE in page


def test_markers_are_a_pair_and_name_a_table():
    assert "| not measured yet |" in report.filled("<!-- bench:ops -->\n<!-- /bench:ops -->", [])
    for text, why in (
        ("<!-- bench:ops -->\n", "other half"),
        ("<!-- bench:ops -->\n<!-- /bench:training -->", "other half"),
        ("<!-- bench:speed -->\n<!-- /bench:speed -->", "no table is called speed; known: backends, training"),
    ):
        with pytest.raises(ValueError, match=why):
            report.filled(text, [])


def test_the_roofline_has_every_op_on_it(tmp_path):
    paths = pictures.draw(gpu(), tmp_path)
    text = {path.stem.removeprefix("nvidia-h200-"): path.read_text() for path in paths}
    assert all(f">{name} forward<" in text["roofline"] for name in kernels.OPS)
    assert ">10 hours, 285<" in text["throughput"] and ">swiglu forward: compile<" in text["ratios"]
    assert all(f">{kind}<" in text["breakdown"] for kind in SPENT)
