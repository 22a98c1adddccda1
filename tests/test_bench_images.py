"""The bench of image decoders: its files, what is compared, what a row says, with a clock that tells invented times."""

import io
import json
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from bench import data as bench_data
from bench import images as bench_images
from bench.gate import baseline, compare
from bench.images import BATCHES, ImageComparison, ImageJob, parts
from bench.measure import rows
from bench.triage.tasks import IMAGES
from bench.workloads import photographs
from bench.workloads.image_loading import Chosen, Reference, Turns, closeness
from tests.test_bench_data import Told
from vavae.decoders import torchvision_decoder
from vavae.decoders.choice import lacking
from vavae.sources import open_source

CPU = torch.device("cpu")
COUNT = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The same files in class folders and in tars."""
    root = tmp_path_factory.mktemp("images")
    files, _ = photographs.photographs(COUNT)
    photographs.write_folder(root / "folder", files)
    photographs.write_tars(root / "tar", files)
    return {name: str(root / name) for name in ("folder", "tar")}


@pytest.fixture(scope="module")
def reference(made):
    return Reference(made["folder"], COUNT)


def installed(decoder: str) -> bool:
    return not lacking(decoder)


DECODERS = [decoder for decoder in bench_images.DECODERS if installed(decoder)]


def test_photographs_are_a_function_of_the_seed():
    first, words = photographs.photographs(6)
    assert first == photographs.photographs(6)[0] == photographs.photographs(8)[0][:6]
    assert not set(first) & set(photographs.photographs(6, seed=1)[0])
    assert all(Image.open(io.BytesIO(file)).size == (500, 375) for file in first)
    assert all(package in words for package in photographs.shipped()) and "500 x 375" in words


def test_without_photographs_there_is_noise_of_the_same_size_on_disk(monkeypatch):
    lengths = [len(file) for file in photographs.photographs(24)[0]]
    monkeypatch.setattr(photographs, "SHIPPED", {("no_such_module", "none"): ("photograph.jpg",)})
    files, words = photographs.photographs(3)
    assert words.startswith("noise") and files == photographs.photographs(3)[0]
    assert np.mean(lengths) == pytest.approx(50_000, rel=0.3), "or else they cost a decoder other time than ImageNet's"
    assert [len(file) for file in files] == pytest.approx([50_000] * 3, rel=0.2)


def test_folders_and_tars_hold_the_same_images(made, monkeypatch, tmp_path):
    monkeypatch.setattr(photographs, "SHARD", 5)
    files, _ = photographs.photographs(COUNT)
    photographs.write_tars(tmp_path / "tar", files)
    assert len(list((tmp_path / "tar").iterdir())) == 3
    for path in (made["folder"], made["tar"], str(tmp_path / "tar")):
        source = open_source(path)
        assert [source.read(index) for index in range(len(source))] == files
        assert source.labels.tolist() == [number * 8 // COUNT for number in range(COUNT)]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("source", ["folder", "tar"])
def test_every_decoder_gives_the_pixels_of_pillow(decoder, source, made, reference):
    wrong, found = reference.check(Chosen(made[source], decoder, COUNT, 1, CPU))
    assert wrong == "" and found["by_pillow"] == 0
    if decoder == "pil":
        assert found["psnr_mean"] is found["psnr_min"] is None
    else:
        assert 35 <= found["psnr_min"] <= found["psnr_mean"]


def test_the_published_way_gives_the_pixels_of_pillow(reference):
    samples = reference.file_per_sample()
    assert reference.check_published(samples) == ("", {"psnr_mean": None, "psnr_min": None, "by_pillow": None})
    samples._labels[0] += 1
    assert "labels" in reference.check_published(samples)[0]
    samples.scale.size = 264
    assert "not Pillow's" in reference.check_published(samples)[0]


def test_how_close_pixels_have_to_be():
    """Of four images one is off by 4 of 255 everywhere, 36.1 dB, or by 5, 34.2 dB; one by 1, 48.1 dB; two are equal."""
    want = torch.full((4, 3, 8, 8), 100, dtype=torch.uint8)

    def close(*off: int) -> tuple:
        return closeness(want + torch.tensor(off, dtype=torch.uint8).view(-1, 1, 1, 1), want)

    assert close(0, 0, 0, 0) == ("", {"psnr_mean": None, "psnr_min": None})
    wrong, found = close(4, 1, 0, 0)
    assert wrong == "" and found == pytest.approx({"psnr_mean": 42.11, "psnr_min": 36.09}, abs=0.01)
    assert close(5, 1, 0, 0)[0] == (
        "its pixels are not Pillow's: PSNR 41.1 dB in the mean, 34.2 at worst; at least 40 and 35 are wanted"
    )
    assert "PSNR 39.1 dB in the mean, 36.1 at worst" in close(4, 2, 0, 0)[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_is_whole_epochs_of_the_chosen_images(workers, made):
    chosen = Chosen(made["tar"], "pil", 6, workers, CPU)
    assert chosen.indices.tolist() == [0, 2, 4, 6, 8, 10], "from all over"
    stream = chosen.stream(3, pin_memory=False)
    labels = [batch["y"] for batch in islice(stream, 4)]
    stream.close()
    want = sorted(chosen.images.labels[chosen.indices].tolist())
    assert all(torch.cat(epoch).sort().values.tolist() == want for epoch in (labels[:2], labels[2:]))


def test_one_stream_is_open_at_a_time():
    events = []

    def stream(name):
        events.append(f"{name} opened")
        try:
            while True:
                yield {"image": torch.zeros(1)}
        finally:
            events.append(f"{name} closed")

    turns = Turns()
    for name in "ab":
        turns.open(lambda name=name: stream(name))
        turns.read(2, CPU)
    turns.close()
    turns.close()
    assert events == ["a opened", "a closed", "b opened", "b closed"]


def run(job: ImageJob, *seconds: float, out=None) -> tuple[ImageComparison, list[dict]]:
    comparison = ImageComparison(Told(*seconds), rows.Log("cpu", out), None)
    return comparison, comparison.run(job)


def test_what_a_row_says(made, tmp_path, capsys):
    """Iterations of 4 × 3 images in 6, 3, 4, … ms, in the order of providers."""
    out = tmp_path / "rows.jsonl"
    job = ImageJob(made, False, COUNT, 3, (1,))
    names = [name for name in job.providers if installed(parts(name)[0]) or "file-per-sample" in name]
    times = {"pil-folder-1": 6, "pil-tar-1": 3, "file-per-sample-folder-1": 8}
    comparison, got = run(job, *(times.get(name, 2) / 1000 for name in names), out=out)
    assert {f"{row['provider']}-{row['source']}-{row['workers']}" for row in got} == set(job.providers)
    found = {(row["provider"], row["source"]): row for row in got}
    assert len(found) == 7 and [row["status"] for row in got if row["status"] == "ok"] == ["ok"] * len(names)
    pil, fast, peer = (
        found[name] for name in (("pil", "folder"), ("torchvision", "tar"), ("file-per-sample", "folder"))
    )
    assert [row["images_per_second"] for row in (pil, fast, peer)] == pytest.approx([2000, 6000, 1500])
    assert pil["p50_ms"] == pytest.approx(0.5) and pil["calls"] == BATCHES * 3
    assert [row["ours"] for row in (pil, fast, peer)] == [True, True, False]
    assert pil["psnr_min"] is None and fast["psnr_mean"] >= 40 and fast["by_pillow"] == 0
    assert "processes" in pil["includes"] and "threads" in fast["includes"] and "on the CPU" in fast["includes"]
    assert fast["bytes_per_file"] == pytest.approx(45_000, rel=0.4) and fast["image_size"] == 256
    assert fast["cpu"] and fast["cores"] >= 1 and fast["load"] >= 0 and fast["device"] == "cpu"
    assert fast["times_faster_than"]["pil-tar-1"] == pytest.approx(1.5)
    assert list(rows.read(out, "cpu")) == json.loads(json.dumps(got))
    comparison.conclude(got)
    printed = capsys.readouterr().out
    assert "best against best: 4.00x the way that opens one file per sample" in printed
    assert "torchvision over pil with the same workers: 3.00x (folder, 1 workers), 1.50x (tar, 1 workers)" in printed
    assert f"{fast['psnr_mean']:.1f}, {fast['psnr_min']:.1f}" in printed and "equal" in printed
    assert list(baseline.rows_of(out)) == json.loads(json.dumps(got)), "they count from a CPU"
    assert compare.compare(got, got, again=lambda row: []) == [], "loaders have no limit"


def test_a_decoder_with_other_pixels_is_not_timed(made, monkeypatch, capsys):
    right = torchvision_decoder.scaled_square
    monkeypatch.setattr(torchvision_decoder, "scaled_square", lambda *args: right(*args).roll(1, 0))
    comparison, got = run(ImageJob({"tar": made["tar"]}, False, COUNT, 2, (0,)), 0.01)
    found = {row["provider"]: row for row in got}
    assert found["torchvision"]["status"] == "incorrect" and "not Pillow's: PSNR" in found["torchvision"]["reason"]
    assert "p50_ms" not in found["torchvision"] and found["pil"]["status"] == "ok"
    assert any(map(comparison.alarming, got))
    assert "incorrect: its pixels" in capsys.readouterr().out


def test_a_decoder_with_other_labels_is_found(made, reference):
    chosen = Chosen(made["folder"], "pil", COUNT, 0, CPU)
    chosen.images.labels = chosen.images.labels.flip(0)
    assert reference.check(chosen)[0] == "its labels are not those of Pillow's batch"


def test_a_decoder_that_is_not_installed_has_a_row(made, monkeypatch):
    monkeypatch.setattr("vavae.decoders.choice._dali_is_installed", lambda: False)
    comparison, got = run(ImageJob({"tar": made["tar"]}, False, COUNT, 2, (0,)), 0.01)
    found = {row["provider"]: (row["status"], row["reason"]) for row in got}
    assert found["dali"][0] == "unavailable" and found["dali"][1].startswith("nvidia-dali-cuda130 is not installed")
    assert found["pil"] == found["torchvision"] == ("ok", "") and not any(map(comparison.alarming, got))


def test_files_that_only_pillow_reads_are_no_measure_of_a_decoder(tmp_path):
    (tmp_path / "class").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (260, 300, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "class" / f"{number}.png")
    _, got = run(ImageJob({"folder": str(tmp_path)}, False, 2, 2, (0,)), 0.01)
    found = {row["provider"]: (row["status"], row["reason"]) for row in got}
    assert found["torchvision"] == ("unsupported", "it left all of 2 files to Pillow")
    assert found["pil"] == found["file-per-sample"] == ("ok", "")


def test_from_the_command_line(made, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_images, "HostClock", lambda kind: Told(0.01))
    monkeypatch.setattr(bench_images, "DECODERS", {"torchvision": bench_images.DECODERS["torchvision"]})
    monkeypatch.setattr(photographs, "SHIPPED", {})
    out = tmp_path / "rows.jsonl"
    common = ["--images", "--batch-size", "2", "--workers", "0", "--out", str(out), "--device", "cpu"]
    assert bench_data.main([*common, "--samples", "4"]) == 0
    own = list(rows.read(out, "cpu"))
    assert [(row["provider"], row["source"]) for row in own] == [
        ("torchvision", "folder"),
        ("torchvision", "tar"),
        ("file-per-sample", "folder"),
    ]
    assert all(row["files"].startswith("noise") for row in own)
    for source in ("folder", "tar"):
        out.unlink()
        assert bench_data.main([*common, "--samples", "4", "--directory", made[source]]) == 0
        got = list(rows.read(out, "cpu"))
        assert {row["source"] for row in got} == {source} and len(got) == (2 if source == "folder" else 1)
    assert "4 files" in capsys.readouterr().out
    assert bench_data.main([*common, "--minutes", "0"]) == 0
    assert "time is up, not measured" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "value"), [("samples", "0"), ("batch-size", "-1"), ("workers", "a")])
def test_what_is_refused(option, value, capsys):
    with pytest.raises(SystemExit):
        bench_data.main(["--images", f"--{option}", value])
    assert f"--{option}: '{value}' is no whole number" in capsys.readouterr().err


def test_directories_without_images_are_refused_in_a_line(tmp_path, capsys):
    for path, why in ((tmp_path / "none", "does not exist"), (tmp_path, str(tmp_path))):
        assert bench_data.main(["--images", "--directory", str(path)]) == 64
        printed = capsys.readouterr()
        assert why in printed.err and len(printed.err.splitlines()) == 1 and printed.out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(capsys):
    assert bench_data.main(["--images", "--device", "cuda"]) == 2
    assert "bench.data --images --device cuda needs a GPU" in capsys.readouterr().err


def test_the_triage_asks_what_the_program_understands():
    assert IMAGES.module == "bench.data" and IMAGES.arguments[0] == "--images"
    options = bench_images.parse([*IMAGES.arguments[1:], "--minutes", "1"])
    assert options.workers == [bench_images.cores()] and options.minutes == 1
