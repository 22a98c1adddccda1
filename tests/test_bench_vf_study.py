"""The study of alignment: runs of a few steps, tables by hand, and the committed pages from the committed rows."""

import functools
import itertools
import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench import report, vf_study
from bench.gate import baseline
from bench.measure.program import USAGE
from bench.measure.rows import FORMAT, ROOT, Row, line, read
from bench.pages import alignment as pages
from bench.workloads import alignment
from launch import evaluate, extract, sample, train
from launch.digits_demo import classifier, dataset, foundation
from launch.evaluation import latent_space
from tests import run_rows

RESULTS = ROOT / "bench" / "results"
FEW_STEPS = (
    *("--tokenizer", "digits_vavae.yaml", "train.max_steps=2", "train.log_every=1"),
    *("--lightningdit", "digits.yaml", "train.max_steps=2", "sample.num_sampling_steps=2", "sample.fid_num=100"),
)


@dataclass
class Finished:
    """A study of one seed that was interrupted when the second LightningDiT was to be sampled, and begun again."""

    root: Path
    status: int
    ended: int
    rows_then: list[Row]
    calls: dict[str, int]

    @property
    def rows(self) -> list[Row]:
        return list(read(self.root / "vf_study.jsonl", "cpu"))


def small_digits() -> dict[str, dataset.Digits]:
    """12 of each class to train on, and 12 held out."""
    parts = dataset.source()
    chosen = {name: part.balanced(12) for name, part in parts.items()}
    return {name: dataset.Digits(part.images[chosen[name]], part.labels[chosen[name]]) for name, part in parts.items()}


def hasten(patch: pytest.MonkeyPatch) -> None:
    """Little data and steps enough to run, not to learn; the guards that ask for quality are lowered."""
    patch.setattr(dataset, "source", functools.partial(dict, small_digits()))
    patch.setattr(alignment, "train_foundation", functools.partial(foundation.train_foundation, steps=2))
    patch.setattr(foundation, "MIN_ACCURACY", 0.0)
    patch.setattr(classifier, "MIN_ACCURACY", 0.0)
    patch.setattr(extract, "LEAST_PSNR", 0.0)
    patch.setattr(latent_space, "VECTORS", 48)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    root, calls, samples = tmp_path_factory.mktemp("study"), [], itertools.count()
    command = ["--seeds", "5", "--repeats", "1", "--output", str(root), *FEW_STEPS]
    with pytest.MonkeyPatch.context() as patch:
        hasten(patch)
        for program in (train, extract, sample, evaluate):

            def counted(argv: list[str], main=program.main, name=program.__name__) -> int:
                if name == "launch.sample" and next(samples) == 1:
                    return 143  # as a program ends after SIGTERM
                calls.append(name)
                return main(argv)

            patch.setattr(program, "main", counted)
        with pytest.raises(SystemExit) as ended:
            vf_study.main(command)
        rows_then = list(read(root / "vf_study.jsonl", "cpu"))
        status = vf_study.main(command)
        return Finished(root, status, ended.value.code, rows_then, {name: calls.count(name) for name in set(calls)})


def test_a_study_goes_on_where_it_was_interrupted(finished):
    assert (finished.ended, finished.status) == (143, 0)
    assert [row["use_vf"] for row in finished.rows_then] == [False], "what is measured has a row at once"
    assert finished.rows[0] == finished.rows_then[0], "and keeps it"
    assert finished.calls == {"launch.train": 4, "launch.extract": 2, "launch.sample": 2, "launch.evaluate": 4}


def test_the_rows_of_a_study(finished):
    without, aligned = finished.rows
    assert (without["use_vf"], aligned["use_vf"], aligned["seed"]) == (False, True, 5)
    for name in ("study", "settings", "configs", "samples", "vectors", "torch", "cpu"):
        assert aligned[name] == without[name]
    assert aligned["settings"]["training_images"] == aligned["settings"]["heldout_images"] == 120
    assert aligned["settings"]["tokenizer"]["train"]["max_steps"] == aligned["configs"]["tokenizer"]["steps"] == 2
    assert aligned["configs"]["tokenizer"]["overrides"] == ["train.max_steps=2", "train.log_every=1"]
    assert (aligned["samples"], aligned["vectors"], aligned["repeats"]) == (100, 48, 1)
    assert aligned["figures"].keys() >= {figure.key for figure in pages.FIGURES}
    assert all(math.isfinite(value) for value in aligned["figures"].values())
    stored = [json.loads((finished.root / f"seed5-{name}" / "fid.json").read_text()) for name in ("no-vf", "vf")]
    distances = [each["metrics"]["fid"] for each in stored]
    assert [row["figures"]["frechet_distance"] for row in finished.rows] == distances and len(set(distances)) == 2
    assert stored[0]["settings"]["seed"] == stored[1]["settings"]["seed"] == 5, "the same noise"
    text = (finished.root / "vf_study.md").read_text()
    assert "## Handwritten digits" in text and (finished.root / "vf_study.svg").exists()


def test_two_arms_differ_in_the_vf_loss_alone(finished):
    folders = zip(finished.rows, ("seed5-no-vf", "seed5-vf"), strict=True)
    without, aligned = ([command.replace(name, "X") for command in row["commands"]] for row, name in folders)
    assert [a for a, b in zip(without, aligned, strict=True) if a != b] == [c for c in without if "loss.use_vf" in c]
    assert [c.replace("loss.use_vf=false", "loss.use_vf=true") for c in without] == aligned
    logs = [run_rows.rows(finished.root / name / "tokenizer") for name in ("seed5-no-vf", "seed5-vf")]
    assert "vf_cos" not in logs[0][-1] and logs[1][-1]["vf_cos"] > 0, "and that loss is there where it is asked for"


def material(folder: Path, *more: str, tokenizer=(), lightningdit=()) -> alignment.Material:
    """That of a study of image folders: a study's digits as such, and its stand-in."""
    weights = str(folder / "foundation/foundation.safetensors")
    folders = ["--images", str(folder / "data/train"), "--heldout", str(folder / "data/heldout")]
    files = [*FEW_STEPS[:4], f"foundation.weights={weights}", *tokenizer, *FEW_STEPS[4:], *lightningdit]
    return vf_study.material(vf_study.parse([*folders, "--foundation", weights, *files, *more]))


def test_image_folders_are_measured_without_the_digits_classifier(finished, tmp_path, monkeypatch):
    """What a study of them makes of the latents and samples that are there."""
    monkeypatch.setattr(latent_space, "VECTORS", 48)
    folder = finished.root
    made = material(folder, "--repeats", "2")
    assert made.settings()["images"] == "data/train" and made.settings()["features"][0] == "--foundation"
    shutil.copytree(folder / "seed5-vf", tmp_path / "arm")
    alignment.Arm(tmp_path / "arm", made, 5, True).evaluate()
    found, known = json.loads((tmp_path / "arm" / "figures.json").read_text()), finished.rows[1]
    assert found["figures"].keys() == {
        *("psnr", "ssim", "density_cv", "gini", "normalized_entropy", "frechet_distance"),
    }
    for name in ("psnr", "ssim", "frechet_distance"):
        assert found["figures"][name] == pytest.approx(known["figures"][name], rel=1e-9)
    assert found["figures"]["gini"] != known["figures"]["gini"] and found["repeats"] == 2


@pytest.mark.parametrize(
    ("tokenizer", "lightningdit", "message"),
    [
        ([], ["data.num_classes=9"], "data.num_classes is 9 in digits.yaml, but .* has 10 classes"),
        ([], ["model.in_chans=8"], "model.embed_dim and model.in_chans: 4 in digits_vavae.yaml, 8 in digits.yaml"),
        (["model.ch_mult=[1,2]"], [], "down-sampling and vae.downsample_ratio: 2 .* 4"),
        ([], ["data.image_size=64"], "data.image_size: 32 in digits_vavae.yaml, 64"),
        (["loss.use_vf=false"], [], "loss.use_vf=false: loss.use_vf is what the study itself sets"),
        ([], ["sample.seed=3"], "sample.seed=3: sample.seed is what the study itself sets"),
        (["foundation.weights=none.safetensors"], [], "foundation.weights: none.safetensors"),
        (["loss.vf_weight=null"], [], "not set: loss.vf_weight"),
        ([], ["sample.fid_num=96"], "sample.fid_num: 96 images for 96 features"),
        ([], ["sample.fid_nun=96"], "fid_nun"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(finished, tokenizer, lightningdit, message):
    with pytest.raises(ValueError, match=message):
        material(finished.root, tokenizer=tokenizer, lightningdit=lightningdit)


def test_too_few_images_for_the_uniformity_of_their_latents(finished, tmp_path):
    shutil.copytree(finished.root / "data", tmp_path / "data")
    for label in range(10):
        for path in sorted((tmp_path / "data" / "train" / str(label)).iterdir())[3:]:
            path.unlink()
    (tmp_path / "foundation").symlink_to(finished.root / "foundation")
    with pytest.raises(ValueError, match="train: 30 images; the uniformity of their latents needs over 30"):
        material(tmp_path)


def test_few_images_are_compared_where_that_is_asked_for(finished):
    made = material(finished.root, "--allow-few", lightningdit=["sample.fid_num=96"])
    assert made.runs[1].sample.fid_num == 96


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heldout", "x"], "--heldout changes nothing without --images"),
        (["--allow-few"], "--allow-few changes nothing without --images"),
        (["--images", "x", "--tokenizer", "a"], "--images needs --heldout, --lightningdit"),
        (["--seeds", "1", "2", "1"], "--seeds 1 2 1: each once"),
        (["--seeds", "-1"], "no whole number from 0"),
        (["--images", "x", "--heldout", "y", "--tokenizer", "a", "--lightningdit", "b", "--foundation", "f",
          "--inception-weights", "g"], "--inception-weights changes nothing beside --foundation"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        vf_study.parse(options)
    assert message in capsys.readouterr().err


def test_a_folder_holds_one_study(finished, capsys):
    other = ["--seeds", "5", "--repeats", "1", "--output", str(finished.root), *FEW_STEPS, "sample.cfg_scale=2"]
    before = (finished.root / "study.json").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        hasten(patch)
        assert vf_study.main(other) == USAGE
    assert "holds a study with other settings (lightningdit)" in capsys.readouterr().err
    assert (finished.root / "study.json").read_bytes() == before


def row(seed: int, use_vf: bool, study: str = "a study", **more) -> Row:
    """A row of a study of the digits, on a CPU."""
    run = {"file": "x.yaml", "overrides": ["train.max_steps=7000"], "steps": 7000, "batch": 16, "sha256": "0"}
    settings = {"images": "handwritten digits", "training_images": 1297, "heldout_images": 500}
    machine = {"device": "cpu", "gpu": None, "cpu": "a processor", "threads": 1, "torch": "2.11.0", "revision": "01234"}
    names = {"format": FORMAT, "kind": "vf_study", "run": "r", "study": study, "seed": seed, "use_vf": use_vf}
    facts = {"samples": 500, "vectors": 1297, "repeats": 3, "features": "a network", "digits": True}
    return names | machine | facts | {"settings": settings, "configs": {"tokenizer": run, "LightningDiT": run}} | more


def rows() -> list[Row]:
    """Two seeds: PSNR falls by 1 and 2 dB, the distance falls by 0.5 and 0.25, recognition goes up and down."""
    values = {
        (1, True): {"psnr": 30.0, "frechet_distance": 1.0, "recognised": 0.5, "ssim": 0.5},
        (0, False): {"psnr": 30.0, "frechet_distance": 1.5, "recognised": 0.5},
        (0, True): {"psnr": 29.0, "frechet_distance": 1.0, "recognised": 0.625, "ssim": 0.5},
        (1, False): {"psnr": 32.0, "frechet_distance": 1.25, "recognised": 0.75},
    }
    return [row(*name, figures=found) for name, found in values.items()]


def test_the_table_by_hand():
    (study,) = pages.studies(rows())
    assert pages.results_table(study).splitlines() == [
        "|  | better | without VF (seeds 0, 1) | with VF | with − without | its spread | better with VF |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| reconstructions of held-out images, PSNR in dB | higher | 31.00 (30.00, 32.00) | 29.50 (29.00, 30.00) "
        "| −1.50 | 0.71 | 0 of 2 seeds |",
        "| samples, Fréchet distance | lower | 1.375 (1.500, 1.250) | 1.000 (1.000, 1.000) "
        "| −0.375 | 0.177 | 2 of 2 seeds |",
        "| samples recognised as their class | higher | 62.5 % (50.0 %, 75.0 %) | 56.2 % (62.5 %, 50.0 %) "
        "| −6.2 % | 26.5 % | 1 of 2 seeds |",
    ], "SSIM was not measured without VF"
    assert pages.verdict(study).splitlines() == [
        "* Better with VF in all 2 seeds: Fréchet distance.",
        "* Worse with VF in all 2 seeds: PSNR (dB).",
        "* Now better, now worse or equal: recognised.",
    ]


def test_what_is_no_difference_is_neither_better_nor_worse():
    figures = [{"psnr": 30.0, "gini": 0.5}, {"psnr": 30.0, "gini": 0.25}]
    (study,) = pages.studies(row(4, bool(use_vf), figures=figures[use_vf]) for use_vf in (0, 1))
    assert [(pair.better, pair.worse, pair.spread) for pair in study.pairs] == [(0, 0, None), (1, 0, None)]
    assert "| +0.00 | – | 0 of 1 seeds |" in pages.results_table(study)


def test_a_seed_counts_once_both_its_rows_are_there():
    again = row(0, True, figures={"psnr": 28.0, "frechet_distance": 1.0, "recognised": 0.5})
    (study,) = pages.studies([*rows(), row(2, True, figures={"psnr": 99.0}), again])
    assert study.seeds == [0, 1] and study.pairs[0].aligned == (28.0, 30.0), "a later row replaces an earlier one"
    assert pages.studies([row(0, True, figures={})])[0].pairs == []


def test_studies_of_other_settings_are_apart(tmp_path):
    path = tmp_path / "vf_study.jsonl"
    folders = {"study": "another", "digits": False, "revision": "89-dirty"}
    folders |= {"settings": rows()[0]["settings"] | {"images": "ImageNet/train"}}
    others = [each | folders | {"seed": 1 + each["seed"]} for each in rows()]
    path.write_text("".join(map(line, rows() + others)))
    text, picture = (found.read_text() for found in pages.write(path))
    assert text.count("## Handwritten digits\n") == text.count("## `ImageNet/train`\n") == text.count(pages.CAVEAT) == 1
    assert "revision 01234\n" in text and "revision 89-dirty\n" in text
    assert [picture.count(f"seed {seed}<") for seed in range(4)] == [1, 1, 1, 0], "one legend for both"
    assert picture.count("recognised") == 2


def test_rows_take_the_place_of_those_with_their_names(tmp_path):
    path = tmp_path / "vf_study.jsonl"
    first, *others = rows()
    vf_study.merge(path, [first, *others])
    vf_study.merge(path, [first | {"run": "later", "figures": {}}, row(7, True, device="cuda")])
    found = [(each["run"], each["seed"], each["device"]) for device in ("cpu", "cuda") for each in read(path, device)]
    assert found == [("later", 1, "cpu"), ("r", 0, "cpu"), ("r", 0, "cpu"), ("r", 1, "cpu"), ("r", 7, "cuda")]


def test_a_study_on_a_gpu_is_no_row_of_speeds(tmp_path):
    path = tmp_path / "vf_study.jsonl"
    path.write_text(line(row(0, True, device="cuda", gpu="NVIDIA H200")))
    assert list(baseline.rows_of(path)) == []


def test_the_committed_page_and_picture_are_those_of_the_committed_rows(tmp_path):
    names = ["vf_study.md", "vf_study.svg"]
    shutil.copy(RESULTS / "vf_study.jsonl", tmp_path)
    assert [path.name for path in pages.write(tmp_path / "vf_study.jsonl")] == names
    assert [(tmp_path / name).read_bytes() for name in names] == [(RESULTS / name).read_bytes() for name in names]


def test_the_report_keeps_the_page(tmp_path):
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "README.md", tmp_path)
    (folder / "vf_study.jsonl").write_text("".join(map(line, rows())))
    assert report.main([], tmp_path) == 0 and report.main(["--check"], tmp_path) == 0
    assert (folder / "vf_study.svg").exists()
    page = folder / "vf_study.md"
    page.write_text(page.read_text().replace("31.00", "41.00"))
    assert report.main(["--check"], tmp_path) == 1


def test_the_committed_study_is_whole():
    """Two seeds or more, both ways, of one study, and of a revision that is known."""
    (study,) = pages.load(RESULTS / "vf_study.jsonl")
    assert len(study.seeds) >= 2 and len(study.arms) == 2 * len(study.seeds)
    assert [pair.figure for pair in study.pairs] == list(pages.FIGURES)
    assert all(re.fullmatch("[0-9a-f]{40}", each["revision"]) for each in study.rows)
    assert not [c for each in study.rows for c in each["commands"] if "/tmp" in c or "/work" in c or "/home" in c]
