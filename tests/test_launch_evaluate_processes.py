"""Evaluation by one, two and three processes: the same figures, the same hashes, the same notes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from launch import evaluate
from launch.evaluation import one_pass, options
from launch.evaluation.encoded_images import EncodedImages
from launch.evaluation.features import TogetherFeatures
from launch.evaluation.reconstructions import evaluate_reconstructions
from launch.evaluation.reference import Reference
from launch.evaluation.runner import evaluate_samples
from launch.evaluation.shares import Share
from launch.runtime import launcher
from launch.runtime.processes import Processes
from launch.training.engine import start_processes
from tests import children
from tests.measured import FACTS, MemoryImages, images, means, small_foundation

COUNT, BATCH = 61, 3  # in parts of twelve: shares are of one, two and more parts, and the last is not full


def logits(batch):
    return {"logits": means(batch)["features"][:, :5] - 12}


def first_pixels(batch):
    return {"dinov2": batch[:, 0, :5, 1].double() / 100}


def measure_all(root):
    processes = start_processes()
    real = Reference("real", MemoryImages(images(1, 50)))
    networks = TogetherFeatures(means, logits, first_pixels)
    got = evaluate_samples(
        EncodedImages(root / "samples"), real, networks, metadata=FACTS, batch_size=BATCH, processes=processes
    )
    pair = MemoryImages(images(2, 20)), MemoryImages(images(3, 20))
    decoded = evaluate_reconstructions(
        *pair, extractor=means, lpips=None, metadata={}, batch_size=2, processes=processes
    )
    name = f"{processes.world_size}.{processes.rank}.json"
    (root / name).write_text(json.dumps([got, decoded]))
    images_of = ["--samples", str(root / "samples"), "--reference", str(root / "real.npz"), "--batch-size", str(BATCH)]
    network = ["--foundation", str(root / "net.safetensors"), "--device", "cpu"]
    evaluate.main([*images_of, *network, "--output", str(root / f"program.{processes.world_size}.json")])
    reference = ["--reference", str(root / "samples"), "--write-reference", str(root / f"{processes.world_size}.npz")]
    evaluate.main([*reference, *network, "--batch-size", str(BATCH)])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """World size → the results, of every process."""
    root = tmp_path_factory.mktemp("processes")
    (root / "samples").mkdir()
    pixels = images(4, COUNT)
    pixels[51] = pixels[7]
    for number, image in enumerate(pixels):
        lossless = number % 10  # every tenth is stored with loss
        name = f"{number:02d}.{'png' if lossless else 'jpg'}"
        Image.fromarray(image.numpy()).save(root / "samples" / name)
    np.savez(root / "real.npz", images(1, 50).numpy())
    small_foundation(root)
    results = {"root": root}
    for world_size in (1, 2, 3):
        assert children.call(measure_all, root, world_size=world_size) == [0] * world_size
        results[world_size] = [
            json.loads((root / f"{world_size}.{rank}.json").read_text("utf-8")) for rank in range(world_size)
        ]
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes_give_the_figures_of_one(found, world_size):
    (alone,) = found[1]
    figures = {"fid", "inception_score", "precision", "recall", "kid", "kid_std", "fdd"}
    assert set(alone[0]["metrics"]) == figures and set(alone[1]["metrics"]) == {"rfid", "psnr", "ssim"}
    for result in found[world_size]:
        for one, several in zip(alone, result, strict=True):
            assert several["metrics"] == pytest.approx(one["metrics"], rel=1e-9, abs=1e-12)
            assert {**several, "metrics": 0, "self_test": 0} == {**one, "metrics": 0, "self_test": 0}


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_program_writes_what_one_process_writes(found, world_size):
    root = found["root"]
    alone, several = (json.loads((root / f"program.{size}.json").read_text("utf-8")) for size in (1, world_size))
    assert several["metrics"] == pytest.approx(alone["metrics"], rel=1e-9, abs=1e-12) and "kid" in alone["metrics"]
    assert several["samples_sha256"] == alone["samples_sha256"] and several["notes"] == alone["notes"]
    with np.load(root / "1.npz") as one, np.load(root / f"{world_size}.npz") as other:
        for name in ("mu", "sigma"):
            assert np.allclose(other[name], one[name], rtol=1e-12, atol=1e-14)
        assert np.array_equal(other["arr_0"], one["arr_0"]) and len(one["arr_0"]) == COUNT


def test_the_figures_of_several_processes_are_of_all_images(found):
    got, _ = found[3][0]
    notes = " ".join(got["notes"])
    assert "1 of 61 samples have the pixels of an earlier one" in notes
    assert "7 samples were stored with loss" in notes
    assert got["samples"] == COUNT and got["basis"]["precision"]["reference"] == 50


def test_shares_are_whole_parts_and_make_up_the_set():
    for total in (1, 11, 12, 13, 61, 100):
        for world_size in (1, 2, 3, 7):
            shares = [
                Share.of(total, BATCH, Processes(rank, world_size, torch.device("cpu"))) for rank in range(world_size)
            ]
            covered = [place for share in shares for place in range(share.start, share.stop)]
            assert covered == list(range(total))
            assert all(share.start % (BATCH * one_pass.BATCHES_PER_PART) == 0 for share in shares)


def test_the_pass_holds_the_features_of_few_images_only(monkeypatch):
    monkeypatch.setattr(one_pass, "MAX_KEPT", 20)
    few, many = (one_pass.measure(MemoryImages(images(5, count)), means, 4) for count in (20, 21))
    assert few.kept.shape == (20, 12) and many.kept is None and many.features.count == 21
    assert np.allclose(few.kept.double().mean(0), few.features.mean)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--latents", "x"], "evaluate --latents runs as one process: start it with `python -m launch`"),
        (
            ["--samples", "x", "--reference", "y", "--device", "cuda:0"],
            "--device cuda:0: of several processes each has",
        ),
    ],
)
def test_what_several_processes_cannot_do_is_said_before_they_meet(monkeypatch, arguments, message):
    environment = launcher.LaunchEnvironment(0, 2, 0, "node-0", 29500)
    monkeypatch.setattr(launcher, "launch_environment", lambda: environment)
    monkeypatch.setattr(options, "require_device", lambda name: name)
    with pytest.raises(launcher.LaunchError, match=message):
        evaluate.main(arguments)
