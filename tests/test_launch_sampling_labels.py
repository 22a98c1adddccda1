"""Which class each sample is of: the protocols, labels that are given, and what of them is refused."""

import json

import numpy as np
import pytest
import yaml
from scipy.stats import chisquare

from launch import sample
from launch.sampling.labels import check_labels, given_labels, protocol_labels
from lightningdit.config import SampleConfig
from tests.tiny_weights import a_run, document, write_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"))


def test_by_index_and_in_equal_shares():
    assert protocol_labels("index", 7, 3, 5).tolist() == [0, 1, 2, 0, 1, 2, 0]
    balanced = protocol_labels("balanced", 1007, 10, 5)
    assert all(sorted(run) == list(range(10)) for run in balanced[:1000].reshape(100, 10).tolist())
    assert len({tuple(run) for run in balanced[:1000].reshape(100, 10).tolist()}) == 100, "in orders of their own"
    assert np.bincount(balanced).max() - np.bincount(balanced).min() == 1
    assert np.array_equal(balanced[:23], protocol_labels("balanced", 23, 10, 5)), "a beginning is one of fewer samples"
    shuffled = protocol_labels("shuffled", 1007, 10, 5)
    assert np.array_equal(np.sort(shuffled), np.sort(protocol_labels("index", 1007, 10, 5)))
    runs = [np.bincount(run, minlength=10) for run in shuffled[:1000].reshape(100, 10)]
    assert np.mean([run.max() for run in runs]) > 2, "over all samples, not within runs"


def test_random_labels_are_uniform_and_of_seed_and_index_alone():
    labels = protocol_labels("random", 50_000, 1000, 0)
    assert chisquare(np.bincount(labels, minlength=1000)).pvalue > 1e-3
    pairs = np.bincount(labels[:-1] // 100 * 10 + labels[1:] // 100, minlength=100)  # of neighbours
    assert chisquare(pairs).pvalue > 1e-3
    assert np.array_equal(labels[:77], protocol_labels("random", 77, 1000, 0))
    assert np.bincount(labels, minlength=1000).std() > 5, "not in equal shares"


@pytest.mark.parametrize("protocol", ["balanced", "shuffled", "random"])
def test_another_seed_gives_other_labels(protocol):
    one, two = (protocol_labels(protocol, 500, 10, seed) for seed in (0, 1))
    assert (one != two).mean() > 0.8 and np.array_equal(one, protocol_labels(protocol, 500, 10, 0))


def test_labels_that_are_given(tmp_path):
    text, array = tmp_path / "labels.txt", tmp_path / "labels.npy"
    text.write_text("2, 0\n1\n")
    np.save(array, np.array([2, 0, 1], np.int32))
    assert given_labels("2,0,1") == given_labels(f"@{text}") == given_labels(f"@{array}") == [2, 0, 1]
    assert check_labels([2, 0, 1], 3).dtype == np.int64


def test_labels_that_are_refused(tmp_path):
    bad = tmp_path / "bad"

    def error(text: str) -> str:
        with pytest.raises(ValueError) as caught:
            check_labels(given_labels(text), 3)
        return str(caught.value)

    assert "--labels '1,x': give whole numbers" in error("1,x")
    assert "labels [3, -1]: classes are 0 to 2" in error("0,3,-1")
    assert f"{bad} does not exist" in error(f"@{bad}")
    assert f"labels [{10**22}]: classes are 0 to 2" in error(str(10**22))
    np.save(tmp_path / "large.npy", np.array([1, 2**64 - 1], np.uint64))
    assert f"labels [{2**64 - 1}]: classes are 0 to 2" in error(f"@{tmp_path / 'large'}.npy")
    with pytest.raises(ValueError, match=f"labels .{2**64 - 1}.: classes"):
        check_labels(np.array([1, 2**64 - 1], np.uint64), 3)
    bad.write_text("1 2.5")
    assert f"{bad}: give whole numbers" in error(f"@{bad}")
    bad.write_text("\n")
    assert "labels none" in error(f"@{bad}")
    bad.write_bytes(b"\xff\xfe\x00")
    assert f"{bad} is no text" in error(f"@{bad}")
    for name, array in {"floats": np.zeros(3), "table": np.zeros((3, 3), int)}.items():
        np.save(tmp_path / f"{name}.npy", array)
        assert f"{name}.npy holds {array.dtype}" in error(f"@{tmp_path / name}.npy")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "table.npy").read_bytes()[:-9])
    assert "cut.npy is damaged" in error(f"@{tmp_path / 'cut'}.npy")
    assert "2,000 more" in error(",".join(["7"] * 2008))


def test_results_state_labels_and_counts(weights, tmp_path):
    npz = sample.generate(a_run(weights, labels="random", fid_num=13, num_sampling_steps=2), tmp_path / "a")
    facts = json.loads((tmp_path / "a" / "samples.json").read_text())
    with np.load(npz) as content:
        assert content["arr_1"].tolist() == protocol_labels("random", 13, 3, 0).tolist()
        assert facts["label_counts"] == np.bincount(content["arr_1"], minlength=3).tolist()
    assert facts["labels"] == "random: uniform by (seed, index)" and SampleConfig().labels == "index"
    with pytest.raises(ValueError, match="other labels"):
        sample.generate(a_run(weights, labels="balanced", fid_num=13, num_sampling_steps=2), tmp_path / "a")


def test_a_grid_of_classes_and_numbers_that_do_not_match(weights, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(document(weights, num_sampling_steps=2)))
    grid = [str(config), "--output", str(tmp_path / "grid"), "--format", "png"]
    assert sample.main([*grid, "--classes", "2,0", "--columns", "3"]) == 0
    assert np.load(tmp_path / "grid" / "labels.npy").tolist() == [2, 2, 2, 0, 0, 0]
    for more, why in (
        (["--columns", "3"], "--columns 3: is of --classes"),
        (["--classes", "1", "--columns", "0"], "--columns 0: at least 1"),
        (["sample.fid_num=5", "--labels", "1,2"], "2 labels for sample.fid_num 5 samples"),
        (["sample={fid_num: 3}", "--labels", "1,2"], "2 labels for sample.fid_num 3 samples"),
        (["sample.labels=random", "--labels", "1,2"], "sample.labels=random beside labels that are given"),
        (["sample={labels: index}", "--classes", "1"], "sample.labels=index beside labels that are given"),
        (["--labels", "1", "--by-class", "--format", "npz"], "--by-class is of images in files"),
    ):
        with pytest.raises(ValueError, match=why):
            sample.main([str(config), "--output", str(tmp_path / "none"), *more])
    assert not (tmp_path / "none").exists()
