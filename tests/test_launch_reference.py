"""References that are made once: statistics and images in an npz, of the same figures, and readable by ADM's code."""

import json

import numpy as np
import pytest

from launch import evaluate
from launch.evaluation.features import TogetherFeatures
from launch.evaluation.image_source import open_images
from launch.evaluation.one_pass import measure
from launch.evaluation.reference import Reference, open_reference, write_reference
from launch.evaluation.runner import evaluate_samples
from tests.measured import FACTS, MemoryImages, images, means, quarters, save_folder
from tests.test_launch_evaluate_processes import first_pixels


class Named:
    """The features of `means` by a network with a hash."""

    name = "means"

    def __init__(self, sha256="ab"):
        self.facts = {"name": self.name, "sha256": sha256, "gives": {"features": "12 means"}}

    def __call__(self, batch):
        return means(batch)


@pytest.fixture
def written(tmp_path):
    """A reference of 40 images, of which it holds 10."""
    source, networks = MemoryImages(images(1, 40)), TogetherFeatures(Named(), first_pixels)
    path = tmp_path / "reference.npz"
    write_reference(path, source, measure(source, networks, 7), networks, 10)
    return path


def test_a_written_reference_is_what_numpy_computes_and_adm_reads(written):
    with np.load(written) as content:  # without pickles, as ADM's evaluator
        assert set(content) == {"arr_0", "facts", "mu", "sigma", "mu_dinov2", "sigma_dinov2"}
        features = quarters(images(1, 40))
        assert np.allclose(content["mu"], features.mean(0), rtol=1e-7)
        assert np.allclose(content["sigma"], np.cov(features.T), rtol=1e-5, atol=1e-6)
        assert content["mu"].dtype == content["sigma"].dtype == np.float64
        assert np.array_equal(content["arr_0"], images(1, 40)[::4].numpy())
        facts = json.loads(str(content["facts"]))
    assert facts["images"] == 40 and facts["image_size"] == "16×16" and facts["networks"][0]["sha256"] == "ab"


def test_a_written_reference_gives_the_figures_of_its_images(written):
    fake, networks = MemoryImages(images(2, 30)), TogetherFeatures(Named(), first_pixels)
    whole = evaluate_samples(fake, Reference("r", MemoryImages(images(1, 40))), networks, metadata=FACTS)
    got = evaluate_samples(fake, open_reference(written), networks, metadata=FACTS)
    for figure in ("fid", "fdd"):
        assert got["metrics"][figure] == pytest.approx(whole["metrics"][figure], rel=1e-9)
    assert got["basis"]["fid"]["reference"] == "statistics of 40" and got["basis"]["kid"]["reference"] == 10
    assert got["reference"]["statistics"]["images"] == 40 and got["reference"]["images"] == 10


def test_a_reference_without_statistics_of_a_network_serves_by_its_images(written, tmp_path):
    with np.load(written) as content:
        kept = {name: content[name] for name in ("arr_0", "mu", "sigma")}
    np.savez(tmp_path / "adm.npz", **kept)
    networks = TogetherFeatures(Named(), first_pixels)
    got = evaluate_samples(MemoryImages(images(2, 30)), open_reference(tmp_path / "adm.npz"), networks, metadata=FACTS)
    (note,) = [note for note in got["notes"] if note.startswith("fdd")]
    assert "to the 10 images of the reference, which has no statistics of dinov2" in note
    assert got["basis"]["fdd"]["reference"] == 10 and got["basis"]["fid"]["reference"] == "statistics"


def test_a_reference_of_another_size_or_network_is_refused(written, tmp_path):
    statistics = tmp_path / "statistics.npz"
    with np.load(written) as content:
        np.savez(statistics, **{name: content[name] for name in ("mu", "sigma", "facts")})
    large = MemoryImages(images(3, 30, size=20))
    with pytest.raises(ValueError, match=r"images of 20×20, .*statistics\.npz statistics of images of 16×16"):
        evaluate_samples(large, open_reference(statistics), Named(), metadata=FACTS)
    other = r"statistics\.npz holds statistics by means with SHA-256 ab; the network to compare by has cd"
    with pytest.raises(ValueError, match=other):
        evaluate_samples(MemoryImages(images(3, 30)), open_reference(statistics), Named("cd"), metadata=FACTS)


@pytest.mark.parametrize(("text", "message"), [("[1]", "holds list, not a JSON object"), ("{", "is no JSON")])
def test_facts_that_are_none_are_refused(tmp_path, text, message):
    np.savez(tmp_path / "a.npz", mu=np.zeros(12), sigma=np.eye(12), facts=np.array(text))
    with pytest.raises(ValueError, match=rf"a\.npz: facts {message}"):
        open_reference(tmp_path / "a.npz")


def test_the_program_writes_a_reference_and_never_over_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "_extractor", lambda args, device: Named())
    folder = save_folder(tmp_path / "real", images(1, 40))
    path = tmp_path / "r.npz"
    run = ["--reference", str(folder), "--write-reference", str(path), "--reference-images", "4"]
    with pytest.raises(ValueError, match=r"holds 40 images, --expect says 50,000"):
        evaluate.main([*run, "--expect", "50000"])
    assert evaluate.main([*run, "--device", "cpu"]) == 0
    assert f"{path}: statistics of 40 images, 4 of them inside" in capsys.readouterr().out
    assert len(open_images(path)) == 4 and open_reference(path).facts["source"] == str(folder)
    with pytest.raises(ValueError, match=r"r\.npz is already there"):
        evaluate.main(run)
    with pytest.raises(ValueError, match="--write-reference needs --reference"):
        evaluate.main(["--write-reference", str(tmp_path / "s.npz")])
    with pytest.raises(ValueError, match=r"has to end in \.npz"):
        evaluate.main([*run[:2], "--write-reference", str(tmp_path / "s.pt")])
