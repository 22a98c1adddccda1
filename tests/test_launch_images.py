"""Every program that reads images, from folders and tars, by another decoder than Pillow; and what is none of them."""

import json
import re
import shutil
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import kernels
from launch import evaluate
from launch.__main__ import main
from launch.config import ConfigError
from launch.runtime import exit_status
from launch.runtime.processes import Processes
from launch.training import checkpoint, image_rate
from launch.training.build import require_one_decoder
from tests import toy
from tests.children import Moment, launch
from tests.photographs import encoded, photographs
from tests.run_rows import rows
from vavae.config import AutoencoderConfig
from vavae.images import psnr
from vavae.model import AutoencoderKL
from vavae.weights import write_export

COUNT, STEPS = 14, 9


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    """14 photographs of two classes as a folder and as two tars, one of them a PNG; and weights of a tokenizer."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for number in range(COUNT):
        image = photographs()[number % 10].convert("RGB").resize((int(rng.integers(20, 40)), int(rng.integers(18, 40))))
        kind, ending = ("PNG", "png") if number == 5 else ("JPEG", "jpg")
        path = root / "folder" / "ab"[number > 6] / f"{number:02}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image, kind))
    for shard, name in enumerate("ab"):
        with tarfile.open(root / f"shard-{shard}.tar", "w") as tar:
            (root / "cls").write_text(name)
            for path in sorted((root / "folder" / name).iterdir()):
                tar.add(path, path.name)
                tar.add(root / "cls", f"{path.stem}.cls")
    config = AutoencoderConfig(**toy.VAVAE["model"])
    write_export(
        root / "vae.safetensors", AutoencoderKL(config, kernels.select("reference")).state_dict(), config, step=0
    )
    return {"folder": f"{root}/folder", "tar": f"{root}/shard-{{0..1}}.tar", "weights": f"{root}/vae.safetensors"}


@pytest.fixture
def run_file(tmp_path, sources):
    def write(path: str, **data) -> str:
        data = {"data_path": path, "decoder": "dali", "num_workers": 2, **data}
        train = {"output_dir": str(tmp_path), "max_steps": STEPS, "ckpt_every": 2}
        return str(toy.write_run(tmp_path / "run.yaml", toy.VAVAE, data=data, train=train))

    return write


@pytest.mark.parametrize(
    ("decoder", "source", "ended_by"),
    [
        ("dali", "folder", signal.SIGKILL),
        ("dali", "tar", signal.SIGKILL),
        ("dali", "tar", signal.SIGTERM),
        ("torchvision", "tar", signal.SIGTERM),
    ],
)
def test_training_goes_on_after_an_end_in_mid_epoch(tmp_path, sources, run_file, decoder, source, ended_by):
    path = run_file(sources[source], flip=True, decoder=decoder)
    assert launch("train", "vavae", path, "train.exp_name=whole", log=tmp_path / "log") == [0]
    assert f"{sources[source]}: decoded by {decoder} on cpu (asked for)" in (tmp_path / "log.0").read_text()
    # Of two engines from the third step on: in the seventh, after the checkpoint of the sixth.
    moment = Moment("launch.training.engine:Engine", "step", 11, ended_by)
    status = -ended_by if ended_by == signal.SIGKILL else exit_status.STOPPED
    assert launch("train", "vavae", path, "train.exp_name=ended", at=moment) == [status]
    assert 0 < checkpoint.newest(tmp_path / "ended/checkpoints").step < STEPS
    assert launch("train", "vavae", path, "train.exp_name=ended") == [0]
    assert rows(tmp_path / "ended") == rows(tmp_path / "whole")
    pngs = sum(row["by_pillow"] for row in rows(tmp_path / "whole"))
    assert 1 <= pngs <= 3  # the PNG, in two and a half epochs
    newest = checkpoint.newest(tmp_path / "whole/checkpoints")
    assert newest.state["config"]["data"]["decoder"] == decoder and newest.state["task"]["classes"] == ["a", "b"]


def test_a_labels_file_is_that_of_the_validation_images(tmp_path, sources, run_file, capsys):
    """Training folders have labels of their own; ImageNet's flat validation folder has them in a file."""
    for name in ("train/n00000001", "train/n00000002", "val"):
        (tmp_path / name).mkdir(parents=True)
    for number, path in enumerate(sorted(Path(sources["folder"]).glob("a/*.jpg"))):
        shutil.copy(path, tmp_path / f"train/n0000000{number % 2 + 1}")
        shutil.copy(path, tmp_path / f"val/ILSVRC2012_val_{number + 1:08}.JPEG")
    (tmp_path / "synsets").write_text("n00000002\n" * 6)
    path = run_file(str(tmp_path / "train"), valid_path=str(tmp_path / "val"), labels_file=str(tmp_path / "synsets"))
    assert main(["train", "vavae", path, "train.max_steps=2", "train.valid_batches=1"]) == 0
    assert any("valid/psnr" in row for row in rows(tmp_path / "run"))


def test_the_decoder_that_auto_took_is_kept_with_the_checkpoint(tmp_path, sources, run_file):
    path = run_file(sources["folder"], decoder="auto")
    assert launch("train", "vavae", path, "train.max_steps=2") == [0]
    changed = ("train.max_steps=4", "data.decoder=pil")
    assert launch("train", "vavae", path, *changed, log=tmp_path / "log") == [0]
    assert "resuming with a changed config: data.decoder: 'torchvision' → 'pil'" in (tmp_path / "log.0").read_text()


def test_extraction_from_folder_and_tars_is_the_same(tmp_path, sources, run_file, capsys, caplog):
    latents = {}
    for source in ("folder", "tar"):
        weights = f"ckpt_path={sources['weights']}"
        arguments = [
            "extract",
            run_file(sources[source]),
            weights,
            "--output",
            str(tmp_path / source),
            "--batch-size",
            "4",
        ]
        with caplog.at_level("INFO"):
            assert main([*arguments, "--least-psnr=-inf"]) == 0
        printed = capsys.readouterr().out
        assert f"{sources[source]}: decoded by dali on cpu (asked for)" in caplog.text
        assert "1 images decoded by Pillow" in printed and f"{COUNT} images of 2 classes (a, b) as latents" in printed
        latents[source] = [load_file(path) for path in sorted((tmp_path / source).glob("*.safetensors"))]
    assert len(latents["tar"]) == 1
    for key, value in latents["folder"][0].items():
        assert torch.equal(value, latents["tar"][0][key]), key


@pytest.mark.parametrize("source", ["folder", "tar"])
def test_evaluation_by_the_decoder_of_a_config(tmp_path, sources, run_file, source, monkeypatch, caplog):
    def absent(*_):
        raise RuntimeError("no network here")

    monkeypatch.setattr(evaluate, "_extractor", absent)
    monkeypatch.setattr(evaluate, "perceptual_distance", absent)
    found = {}
    for decoder in ("dali", "pil"):
        output = tmp_path / f"{decoder}.json"
        arguments = [
            run_file(sources[source]),
            f"data.decoder={decoder}",
            "--originals",
            sources[source],
            "--device",
            "cpu",
        ]
        with caplog.at_level("INFO"):
            assert evaluate.main([*arguments, "--tokenizer", sources["weights"], "--output", str(output)]) == 0
        assert f"decoded by {decoder} on cpu (asked for)" in caplog.text
        found[decoder] = json.loads(output.read_text())
        assert found[decoder]["decoder"] == decoder and found[decoder]["images"] == COUNT
    assert found["dali"]["metrics"]["psnr"] == pytest.approx(found["pil"]["metrics"]["psnr"], abs=0.05)


def test_a_plan_says_the_decoder_and_whether_it_is_fast_enough(sources, run_file, capsys):
    assert main(["train", "vavae", run_file(sources["tar"], decoder="auto"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "images decoded by torchvision on cpu (the fastest without a GPU), 2 workers" in printed
    assert re.search(r"images/s: [\d,]+ read here \(2 s, one process\), needed by a GPU [\d,]+ \(at 200", printed)
    assert main(["train", "vavae", run_file("/nowhere/{000..137}.tar"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "not on this machine, so no run yet: data.data_path /nowhere/{000..137}.tar" in printed
    assert "images decoded by dali on cpu (asked for)" in printed and "images/s:" not in printed


class Slow:
    """Images of which each batch takes 10 ms to read."""

    seed, threaded = 0, True

    def __len__(self) -> int:
        return 100

    def batch(self, epochs, indices, *, pin_memory):
        time.sleep(0.01)
        return {"image": indices}


def test_what_is_read_is_held_against_what_all_gpus_of_a_machine_need(monkeypatch):
    monkeypatch.setattr(image_rate, "SECONDS", 0.5)
    one, four = (image_rate.measure_images(Slow(), workers) for workers in (1, 4))
    assert one < 3300 and 1.5 * one < four < 13_000  # 32 in 10 ms, by each worker
    flops = 4e12  # an image: 100 a second and GPU
    assert "needed by a GPU 100 (at 400 TFLOP/s each): enough" in image_rate.describe_rate(500, flops, "bfloat16", 1)
    many = image_rate.describe_rate(500, flops, "bfloat16", 8)
    assert "500 read here" in many and "needed by 8 GPUs 800 (at 400 TFLOP/s each): too few" in many


def test_processes_that_would_decode_differently_do_not_begin():
    class Two(Processes):
        def all_gather(self, value):
            return [value, "torchvision"]

    images = type("Images", (), {"decoder": "dali"})()
    with pytest.raises(ConfigError, match=r"dali \(first on rank 0\), torchvision \(first on rank 1\): name one"):
        require_one_decoder(images, Two(0, 2, torch.device("cpu"), None))
    require_one_decoder(images, Processes(0, 1, torch.device("cpu"), None))


def test_a_plan_for_another_machine_names_the_decoder_that_is_missing_here(sources, run_file, capsys, monkeypatch):
    monkeypatch.setattr("vavae.decoders.choice._dali_is_installed", lambda: False)
    assert main(["train", "vavae", run_file(sources["tar"]), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "not on this machine, so no run yet: data.decoder dali (nvidia-dali-cuda130 is not installed: pip" in printed
    assert "images decoded" not in printed and f"{COUNT} images (counted)" in printed
    assert main(["train", "vavae", run_file(sources["tar"])]) != 0
    assert "data.decoder is dali, but nvidia-dali-cuda130 is not installed" in capsys.readouterr().err


def test_a_plan_does_not_end_at_a_broken_image(tmp_path, sources, run_file, capsys):
    shutil.copytree(sources["folder"], tmp_path / "folder")
    for path in (tmp_path / "folder").rglob("*.jpg"):
        path.write_bytes(b"broken")
    assert main(["train", "vavae", run_file(str(tmp_path / "folder")), "--dry-run"]) == 0
    assert "images/s: not measured, and a run stops there: cannot read image" in capsys.readouterr().out


def unlabelled(root: Path, sources) -> str:
    with tarfile.open(root / "x.tar", "w") as tar:
        tar.add(Path(sources["folder"]) / "a/00.jpg", "00.jpg")
    return str(root / "x.tar")


def with_another_index(root: Path, sources) -> str:
    tars = [Path(sources["tar"].replace("{0..1}", number)) for number in "01"]
    main(["train", "vavae", str(root / "run.yaml"), f"data.data_path={tars[1]}", "--dry-run"])  # makes its index
    shutil.copy(tars[0], root / "x.tar")
    shutil.copy(f"{tars[1]}.index.json", root / "x.tar.index.json")
    return str(root / "x.tar")


def no_tar(root: Path, _) -> str:
    (root / "x.tar").write_text("this is no tar\n" * 100)
    return str(root / "x.tar")


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        (no_tar, "", r"x\.tar is no tar, or damaged at its begin"),
        (unlabelled, "", r"x\.tar: 00\.jpg has no label: its sample has no member with the ending \.cls"),
        (
            with_another_index,
            "",
            r"x\.tar\.index\.json is the index of another tar, .*; remove it to have it made anew",
        ),
        (lambda root, _: f"{root}/{{0..3}}.tar", "", r"4 of 4 tars of .* do not exist, the first is .*/0\.tar"),
        ("tar", "data.class_file=/no/names.txt", r"data\.class_file: /no/names\.txt does not"),
        ("folder", "data.labels_file=/no/labels.txt", r"data\.labels_file is /no/labels\.txt, but"),
        ("tar", "data.num_classes=3", r"data\.num_classes is 3, but .* has 2 classes: a, b"),
        ("tar", "data.decoder=jpeg", r"data\.decoder: must be 'auto', 'dali', 'torchvision' or"),
        ("tar", "data.cache=true", r"decoder is dali, but cache keeps what Pillow scaled"),
    ],
)
def test_what_is_no_source_of_images_is_one_clear_error(tmp_path, sources, run_file, capfd, source, change, message):
    config = run_file(sources["tar"])
    path = sources[source] if isinstance(source, str) else source(tmp_path, sources)
    capfd.readouterr()
    assert main(["train", "vavae", config, f"data.data_path={path}", *change.split()]) != 0
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")] or [""]
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


def test_squares_of_both_decoders_are_alike(sources):
    """What the programs above compare is of photographs, not of noise."""
    from vavae.config import DataConfig
    from vavae.data import ImageDataset

    every = torch.arange(COUNT)
    dali, pil = (
        ImageDataset(DataConfig(data_path=sources["tar"], image_size=16, decoder=name), 0).batch(0 * every, every)
        for name in ("dali", "pil")
    )
    found = psnr((127.5 * dali["image"] + 127.5).round().byte(), (127.5 * pil["image"] + 127.5).round().byte())
    assert found.min() > 35 and torch.equal(dali["y"], pil["y"]) and dali["by_pillow"].sum() == 1
