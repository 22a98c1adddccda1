"""Figures by name against NumPy and SciPy, and the judge that measures the reference once."""

import numpy as np
import pytest
import torch

from common.files import sha256
from launch.digits_demo import dataset
from launch.evaluation import judge
from launch.evaluation.figures import FIGURES, choose_figures
from launch.evaluation.judge import JudgeSource
from tests.measured import distance, images, means, quarters, save_folder, share_inside

MADE, REAL = images(1, 40, high=240), images(2, 30)


def extract(batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """Features that are small enough to take by hand, under the names of Inception's."""
    found = means(batch)["features"]
    return {"features": found, "spatial": found[:, :5] ** 2, "logits": found[:, 5:] * 3, "dinov2": found[:, :6] + 1}


class Counted:
    """Stands in for the networks; counts the images that go through it."""

    def __init__(self):
        self.images = 0

    def __call__(self, batch):
        self.images += len(batch)
        return extract(batch)


@pytest.fixture
def network(monkeypatch):
    counted = Counted()
    monkeypatch.setattr(JudgeSource, "_extractor", lambda self, kind, device: counted)
    return counted


@pytest.fixture
def files(tmp_path):
    save_folder(tmp_path / "real", REAL)
    (tmp_path / "weights").write_bytes(b"weights")
    return tmp_path


def source(files, *names, reference="real", **more) -> JudgeSource:
    where = {} if reference is None else {"reference": files / reference}
    kinds = {FIGURES[name].features for name in names}
    where |= {"inception_weights": files / "weights"} if "inception" in kinds else {}
    where |= {"dinov2_weights": files / "weights"} if "dinov2" in kinds else {}
    return JudgeSource(choose_figures(names), **where, **more)


def kernel_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD under (x·y / D + 1)³, of all pairs of different images."""
    k, n, m = (lambda a, b: (a @ b.T / x.shape[1] + 1) ** 3), len(x), len(y)
    same = [(k(a, a).sum() - np.trace(k(a, a))) / (len(a) * (len(a) - 1)) for a in (x, y)]
    return sum(same) - 2 * k(x, y).sum() / (n * m)


def score_by_hand(logits: np.ndarray) -> float:
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return float(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))


def test_every_figure_is_what_it_says(files, network):
    a, b = quarters(MADE), quarters(REAL)
    wanted = {
        "fid": distance(a, b),
        "sfid": distance(a[:, :5] ** 2, b[:, :5] ** 2),
        "inception_score": score_by_hand(a[:, 5:] * 3),
        "precision": share_inside(b, a),
        "recall": share_inside(a, b),
        "fdd": distance(a[:, :6], b[:, :6]),
    }
    found = source(files, *wanted).open().measure(MADE, torch.zeros(40))
    assert found == pytest.approx(wanted, rel=1e-5) and list(found) == list(wanted)
    assert 0 < found["precision"] < 1 and 0 < found["recall"] < 1 and found["precision"] != found["recall"]
    assert set(found) | {"recognised", "kid"} == set(FIGURES)


def test_the_kernel_distance_is_the_unbiased_one_and_no_order_matters(files, network):
    """Of as many samples as reference images every subset is all of them."""
    found = source(files, "kid").open().measure(MADE[:30], torch.zeros(30))["kid"]
    assert found == pytest.approx(kernel_by_hand(quarters(MADE[:30]), quarters(REAL)), rel=1e-6)
    assert source(files, "kid").open().measure(MADE[:30].flip(0), torch.zeros(30))["kid"] == pytest.approx(found)
    many, few = (source(files, "kid").open().measure(MADE[:n], torch.zeros(n))["kid"] for n in (40, 20))
    assert many == pytest.approx(found, rel=0.5) and few != many


def test_digits_that_are_recognised_are_counted():
    digits = dataset.source()["heldout"]
    known = JudgeSource(choose_figures(["recognised"]), image_size=32).open()
    images, labels = digits.images[::5], digits.labels[::5].clone()
    right = known.measure(images, labels)["recognised"]
    labels[:50] = (labels[:50] + 1) % 10
    assert right > 0.95 and known.measure(images, labels)["recognised"] == pytest.approx(0.5, abs=0.05)


def test_the_reference_is_measured_once(files, network):
    judged = [source(files, "fid", "precision").open(cache=files / "kept") for _ in range(2)]
    assert network.images == len(REAL)
    first, second = (each.measure(MADE, torch.zeros(40)) for each in judged)
    assert first == second == source(files, "fid", "precision").open().measure(MADE, torch.zeros(40))
    facts = source(files, "fid").kept_facts(files / "kept")
    digest = judge.pixels_hash(REAL)
    assert facts == {"path": str(files / "real"), "images": 30, "sha256": digest}


def test_of_another_reference_network_or_size_nothing_is_taken(files, network):
    save_folder(files / "other", images(5, 30))
    source(files, "fid").open(cache=files / "kept")
    (files / "weights").write_bytes(b"other weights")
    source(files, "fid").open(cache=files / "kept")
    source(files, "fid", reference="other").open(cache=files / "kept")
    source(files, "fid", "fdd").open(cache=files / "kept")
    assert network.images == 4 * 30  # of the last one fid's is there
    (files / "real" / "000.png").write_bytes((files / "real" / "001.png").read_bytes())
    source(files, "fid").open(cache=files / "kept")
    assert network.images == 5 * 30


@pytest.mark.parametrize("damage", ["cut", "flipped", "edited", "absent"])
def test_what_was_kept_and_is_not_whole_is_measured_again(files, network, caplog, damage):
    wanted = source(files, "fid").open(cache=files / "kept").measure(MADE, torch.zeros(40))
    (kept,), (facts,) = (files / "kept").glob("*.safetensors"), (files / "kept").glob("*.json")
    content = kept.read_bytes()
    if damage == "edited":
        facts.write_text(facts.read_text().replace('"count": 30', '"count": 31'))
    elif damage == "absent":
        kept.unlink()
    else:
        kept.write_bytes(content[:-8] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    before = network.images
    assert source(files, "fid").open(cache=files / "kept").measure(MADE, torch.zeros(40)) == wanted
    assert network.images == before + 30 + 40 and "the reference is measured again" in caplog.text
    assert kept.read_bytes() == content


def test_statistics_are_a_reference_of_distances_alone(files, network):
    x = quarters(REAL)
    np.savez(files / "known.npz", mu=x.mean(0), sigma=np.cov(x.T))
    found = source(files, "fid", reference="known.npz").open(cache=files / "kept").measure(MADE, torch.zeros(40))
    assert found["fid"] == pytest.approx(distance(quarters(MADE), x)) and not (files / "kept").exists()
    digest = sha256(files / "known.npz")
    assert source(files, "fid", reference="known.npz").kept_facts(files / "kept")["sha256"] == digest
    for name, words in (
        ("recall", "single images, and .*known.npz gives statistics alone"),
        ("sfid", "sfid: .*known.npz has no spatial features"),
    ):
        with pytest.raises(ValueError, match=words):
            source(files, name, reference="known.npz").open().measure(MADE, torch.zeros(40))


def test_images_of_another_size_are_refused(files, network):
    np.savez(files / "known.npz", REAL.numpy())
    with pytest.raises(ValueError, match="holds images of 16×16; an image size of 8"):
        source(files, "fid", reference="known.npz", image_size=8).open()
    opened = source(files, "fid", image_size=8).open()
    with pytest.raises(ValueError, match="the samples are of 16×16, to be judged as images of 8×8"):
        opened.measure(MADE, torch.zeros(40))


def test_what_a_figure_needs_is_asked_for(tmp_path):
    fid, digits, score = (choose_figures([name]) for name in ("fid", "recognised", "inception_score"))
    for given, words in (
        ((fid, tmp_path), "fid: name Inception's weights .*--download"),
        ((choose_figures(["fdd"]), tmp_path), "fdd: name DINOv2's weights"),
        ((fid, None, None, tmp_path), "fid: no reference"),
        ((fid, tmp_path / "x", None, tmp_path), "--reference .*/x does not exist"),
        ((digits, tmp_path), r"--reference .*: no figure reads it \(recognised\)"),
        ((digits, None, None, tmp_path), "--inception-weights .*: no figure reads it"),
        ((score, None, None, None, False, tmp_path), "inception_score: of Inception alone, not of --foundation"),
        ((fid, tmp_path, None, tmp_path, False, tmp_path), "--inception-weights and --foundation: one network"),
        ((digits, None, 256), "recognised: of digits of 32×32, not of images of 256×256"),
    ):
        with pytest.raises(ValueError, match=words):
            JudgeSource(*given)
    assert JudgeSource(score, inception_weights=tmp_path).reference is None
    assert JudgeSource(fid, download=True, reference=tmp_path).kinds == ("inception",)


def test_names_and_directions():
    lower = {name for name, figure in FIGURES.items() if figure.lower_is_better}
    assert lower == {"fid", "sfid", "kid", "fdd"} and FIGURES["fid"].direction == "lower is better"
    assert all(figure.name == name for name, figure in FIGURES.items())
    with pytest.raises(ValueError, match=r"no figure 'presicion' \(did you mean 'precision'"):
        choose_figures(["presicion"])
    assert [figure.name for figure in choose_figures(["kid", "fid"])] == ["kid", "fid"]
