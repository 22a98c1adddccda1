"""What is said beside figures, and what is refused: numbers of images, labels, equal images, the self-test."""

import hashlib
import json

import numpy as np
import pytest
import torch

from launch.evaluation import self_test as tests_of_itself
from launch.evaluation.image_source import open_images
from launch.evaluation.labels import read_labels
from launch.evaluation.metadata import beside, labels_beside, repeatable, require_described, require_promised
from launch.evaluation.notes import count_notes
from launch.evaluation.reference import Reference
from launch.evaluation.runner import evaluate_samples
from launch.evaluation.self_test import check_extractor, self_test
from tests.measured import FACTS, MemoryImages, images, means, save_folder


@pytest.mark.parametrize(("count", "words"), [(9_999, "fall as N grows"), (10_000, "are of 50,000"), (50_000, None)])
def test_the_number_of_samples_is_set_against_the_protocol(count, words):
    notes = count_notes(count)
    assert notes == [] if words is None else words in notes[0] and f"{count:,} samples" in notes[0]


def test_equal_images_are_counted():
    pixels, real = images(0, 30), images(1, 40)
    pixels[5] = pixels[20] = pixels[3]
    real[7], real[9] = pixels[0], pixels[3]
    got = evaluate_samples(MemoryImages(pixels), Reference("r", MemoryImages(real)), means, metadata=FACTS)
    assert "2 of 30 samples have the pixels of an earlier one" in got["notes"]
    assert "2 samples have the pixels of a reference image" in got["notes"]


def npz(path, count, labels=None):
    np.savez(path, images(2, count).numpy(), **({} if labels is None else {"arr_1": np.asarray(labels)}))
    return open_images(path)


@pytest.mark.parametrize(
    ("labels", "metadata", "message"),
    [
        ([0, 1, 2], {}, r"a\.npz: arr_1 has 3 labels of 4 images"),
        ([0, 1, 2, 4], {"classes": list("abcd")}, r"arr_1: image 3 has label 4; labels are 0 to 3"),
        ([0, 1, -1, 2], {}, "image 2 has label -1; labels are 0 or more"),
        ([0.5, 1, 1, 1], {}, r"arr_1 must be whole numbers \[N\], they are float64"),
        ([[0], [1], [1], [1]], {}, r"arr_1 must be whole numbers \[N\], .* \[4, 1\]"),
        ([0, 1, 2, 3], {"labels": [0, 1, 3, 2]}, "other labels than the metadata's: image 2 has 2, and 3 there"),
        (None, {"labels": [0, 1, 2]}, r"metadata of .*a\.npz: labels has 3 labels of 4 images"),
        (None, {"labels": ["a", 1, 2, 3]}, r"metadata of .*a\.npz: labels must be whole numbers"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, labels, metadata, message):
    with pytest.raises(ValueError, match=message):
        read_labels(npz(tmp_path / "a.npz", 4, labels), metadata)


def test_labels_are_described_and_unevenness_is_said(tmp_path):
    even = read_labels(npz(tmp_path / "a.npz", 6, [0, 1, 2, 0, 1, 2]), {"labels": "index", "num_classes": 3})
    assert even.facts == {"protocol": "index", "classes": 3, "per_class": [2, 2]} and even.notes() == []
    uneven = read_labels(npz(tmp_path / "b.npz", 60, [0] * 50 + [1] * 9 + [3]), {}, 4)
    assert uneven.facts == {"protocol": "not stated", "classes": 4, "per_class": [0, 50]}
    absent, spread = uneven.notes()
    assert absent == "1 of 4 classes have no sample"
    assert spread.startswith("classes have 0 to 50 samples each: more uneven than random labels")
    drawn = np.random.default_rng(0).integers(0, 10, 500)
    (spread,) = read_labels(npz(tmp_path / "c.npz", 500, drawn), {"labels": drawn.tolist()}, 10).notes()
    assert "no more uneven than random labels" in spread
    assert read_labels(MemoryImages(images(0, 3)), {}).facts == "not stated"


def test_as_many_images_as_were_promised_or_an_error(tmp_path):
    source = npz(tmp_path / "samples.npz", 4)
    size = (tmp_path / "samples.npz").stat().st_size
    require_promised(source, {"num_samples": 4, "npz": {"bytes": size}}, None)
    require_promised(source, {"num_samples": 5}, 4)
    with pytest.raises(ValueError, match=r"holds 4 images, the metadata beside them promise 5 \(--expect 4"):
        require_promised(source, {"num_samples": 5}, None)
    with pytest.raises(ValueError, match=r"holds 4 images, --expect says 50,000"):
        require_promised(source, {"num_samples": 4}, 50_000)
    with pytest.raises(ValueError, match="is not the file that was described"):
        require_promised(source, {"num_samples": 4, "npz": {"bytes": size + 1}}, None)


def test_a_file_of_other_bytes_than_were_described_is_refused_and_no_hash_is_repeated(tmp_path):
    """Of a folder, whose files nobody has compared with it."""
    source = npz(tmp_path / "samples.npz", 4)
    said = {"npz": {"bytes": 9, "sha256": hashlib.sha256((tmp_path / "samples.npz").read_bytes()).hexdigest()}}
    require_described(source, said)
    assert repeatable(source, said) == said
    with pytest.raises(ValueError, match=r"has SHA-256 [0-9a-f]{64}, and its description says 00: it is not the file"):
        require_described(source, {"npz": {"sha256": "00"}})
    folder = open_images(save_folder(tmp_path / "images", images(0, 2)))
    require_described(folder, said)
    assert repeatable(folder, {"images": {"files": 2, "sha256": "00"}, "step": 7}) == {"step": 7}


def test_the_description_is_found_beside_a_folder_of_images(tmp_path):
    """`sample` writes images below images/, and pictures of them beside it."""
    save_folder(tmp_path, images(0, 1))
    folder = save_folder(tmp_path / "images", images(1, 3))
    (tmp_path / "samples.json").write_text(json.dumps(FACTS))
    assert beside(folder) == beside(tmp_path) == tmp_path / "samples.json"
    assert len(open_images(tmp_path)) == 3


def test_labels_of_a_folder_lie_beside_it(tmp_path):
    """By index, as `sample` writes them, also where images are in a folder for each class."""
    save_folder(tmp_path / "images", images(1, 4))
    (tmp_path / "samples.json").write_text(json.dumps(FACTS))
    np.save(tmp_path / "labels.npy", [2, 0, 2, 1])
    file, source = labels_beside(tmp_path / "images"), open_images(tmp_path)
    assert file == labels_beside(tmp_path) == tmp_path / "labels.npy"
    said = {"label_counts": [1, 1, 2], "labels": [2, 0, 2, 1]}
    assert read_labels(source, said, None, file).values.tolist() == [2, 0, 2, 1]
    found = read_labels(source, said | {"by_class": True}, None, file)
    assert found.values.tolist() == [2, 0, 2, 1] and found.num_classes == 3
    with pytest.raises(ValueError, match=r"labels\.npy are other labels than the metadata's: image 0 has 2, and 1"):
        read_labels(source, {"labels": [1, 0, 2, 2]}, None, file)
    with pytest.raises(ValueError, match=r"labels\.npy: image 0 has label 2; labels are 0 to 1"):
        read_labels(source, {"label_counts": [1, 1]}, None, file)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"labels\.npy is damaged"):
        read_labels(source, {}, None, file)


@pytest.fixture
def fresh():
    """The self-test is run once for a device."""
    self_test.cache_clear()
    yield
    self_test.cache_clear()


def test_the_self_test_hits_its_known_answers(fresh):
    missed = self_test("cpu")
    assert set(missed) == {"fid", "fid_of_itself", "kid_of_itself", "precision", "recall", "inception_score"}
    assert max(missed.values()) < 1e-12


def wrong_distance(real):
    return lambda *moments: real(*moments) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("frechet_distance", wrong_distance, "fid misses its known answer"),
        ("kernel_distance", lambda real: lambda *x, **how: real(*x, **how)._replace(mean=0.0), "kid_of_itself misses"),
        ("precision_recall", lambda _: lambda *x, **how: (1.0, 0.99), "recall misses its known answer 1 by 0.01"),
        ("inception_score", lambda _: lambda logits: 11.9, "inception_score misses its known answer 12"),
    ],
)
def test_no_figure_is_taken_where_the_self_test_fails(fresh, monkeypatch, name, wrong, message):
    monkeypatch.setattr(tests_of_itself, name, wrong(getattr(tests_of_itself, name)))
    real = Reference("r", MemoryImages(images(1)))
    with pytest.raises(ValueError, match=f"the self-test failed on cpu, so no figure is taken there: .*{message}"):
        evaluate_samples(MemoryImages(images(0)), real, means, metadata=FACTS)


def test_features_that_depend_on_the_batch_are_refused():
    net = torch.nn.BatchNorm1d(12).double()  # in training mode

    def wrong(batch):
        return {"features": net(torch.cat([means(batch)["features"]] * 2)).detach()[: len(batch)]}

    with pytest.raises(ValueError, match=r"features of an image differ by .* with the batch it is in"):
        check_extractor(wrong, images(0, 4))
    check_extractor(means, images(0, 4))
