"""The uniformity of latents: the vectors drawn, and the program that measures it."""

import hashlib
import json

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.manifold import TSNE

from launch import evaluate
from launch.evaluation import latent_space
from launch.evaluation.latent_space import evaluate_latents, latent_vectors
from launch.evaluation.uniformity import latent_uniformity
from lightningdit.data import LatentDataset
from lightningdit.latents_writer import LatentsWriter, finish
from tests import toy
from tests.golden import G
from tests.golden.golden import ROOT

FIGURES = ("density_cv", "gini", "normalized_entropy")
SHAPE = (3, 4, 5)  # channels, height, width of the numbered latents


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Latents whose rounded values name them: the image, the position, and whether it is the mirrored one."""
    directory, count = tmp_path_factory.mktemp("numbered"), 600
    image = torch.arange(count).view(-1, 1, 1).expand(count, 4, 5)
    position = torch.arange(20).view(1, 4, 5).expand(count, 4, 5)
    plain = torch.stack([image, position, 0.25 * ((image + position) % 2)], 1)
    writer = LatentsWriter(directory, shard_size=250)
    writer.add(plain, plain + torch.tensor([0, 0, 1]).view(3, 1, 1), torch.zeros(count, dtype=torch.int64))
    writer.close()
    finish(directory, tokenizer={"name": "numbers"})
    return directory


def named(directory, count, seed, **options):
    """The image, position and mirroring that each drawn vector comes from."""
    latents = LatentDataset(directory, latent_norm=False, **options)
    return latent_vectors(latents, count, seed).round().long().unbind(1)


def test_vectors_are_of_other_images_at_any_position_and_half_mirrored(numbered):
    image, position, mirrored = named(numbered, 600, 0)
    assert len(image.unique()) == 600 and not torch.equal(image, image.sort().values)
    assert torch.bincount(position, minlength=20).min() >= 10  # 30 expected
    assert not torch.equal(position[:256], position[256:512])
    assert 240 < mirrored.sum() < 360
    # Image, position and mirroring are drawn apart from each other.
    table = torch.corrcoef(torch.stack([image, position, mirrored]).double())
    assert (table - torch.eye(3)).abs().max() < 0.15
    assert named(numbered, 600, 0, latent_flip=False)[2].sum() == 0


def test_vectors_are_of_the_seed_alone(numbered):
    first, again, other = (torch.stack(named(numbered, 300, seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and (first[0] != other[0]).float().mean() > 0.9


def test_vectors_are_normalised():
    """The published set: every vector is one of its own latents, normalised as recorded."""
    vectors, recorded = latent_vectors(LatentDataset(ROOT / "06_latents_dir"), 12, 3), G("06_dataset_expected")
    both = torch.cat([recorded[f"norm/{name}/x"] for name in ("orig", "flip")])
    columns = both.permute(0, 2, 3, 1).reshape(-1, 4)
    assert vectors.shape == (12, 4) and (vectors[:, None] == columns).all(2).any(1).all()


@pytest.fixture
def drawn(monkeypatch) -> list[np.ndarray]:
    """The vectors that figures are taken of, draw by draw."""
    found = []

    def recorded(vectors):
        found.append(vectors.numpy())
        return latent_uniformity(vectors)

    monkeypatch.setattr(latent_space, "latent_uniformity", recorded)
    return found


def evenness(vectors: np.ndarray) -> list[float]:
    """The published figures of vectors [N, C], by scikit-learn, SciPy and their definitions."""
    plane = TSNE(n_components=2, perplexity=30, random_state=42).fit_transform(vectors).T.astype(np.float64)
    density = stats.gaussian_kde(plane)(plane)
    share = density / density.sum()
    gini = np.abs(density[:, None] - density).mean() / (2 * density.mean())
    return [density.std() / density.mean(), gini, -(share * np.log(share + 1e-10)).sum() / np.log(len(density))]


def figures(report: dict, key: str = "metrics") -> list[float]:
    assert set(report[key]) == set(FIGURES)
    return [report[key][name] for name in FIGURES]


def test_figures_are_means_over_the_draws(numbered, drawn):
    got = evaluate_latents(LatentDataset(numbered), vectors=60, repeats=2, seed=5)
    alone = np.array([evenness(vectors) for vectors in drawn])
    assert alone.shape == (2, 3) and (np.abs(alone[0] - alone[1]) > 1e-6).all()
    assert figures(got) == pytest.approx(alone.mean(0), rel=1e-6)
    assert figures(got, "spread") == pytest.approx(alone.std(0, ddof=1), rel=1e-4)
    assert (got["vectors"], got["images"], got["shape"], got["repeats"]) == (60, 600, list(SHAPE), 2)
    assert got["tokenizer"] == {"name": "numbers"} and "not comparable" in got["notes"][0]


def test_every_image_is_used_where_there_are_fewer_than_asked_by_default(numbered, monkeypatch):
    monkeypatch.setattr("launch.evaluation.latent_space.latent_uniformity", lambda drawn: latent_uniformity(drawn[:40]))
    latents = LatentDataset(numbered)
    assert evaluate_latents(latents)["vectors"] == 600
    for vectors in (601, 0):
        with pytest.raises(ValueError, match=f"{vectors} vectors of {numbered}, which holds 600 latents"):
            evaluate_latents(latents, vectors=vectors)
    with pytest.raises(ValueError, match=f"{numbered}: t-SNE with perplexity 30.0 needs more vectors than that, got 9"):
        monkeypatch.undo()
        evaluate_latents(latents, vectors=9)
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        evaluate_latents(latents, repeats=0)


@pytest.fixture
def narrow(tmp_path) -> tuple:
    """(a directory of 40 latents of one position, their vectors and the mirrored ones', normalised by hand)."""
    vectors = np.random.default_rng(3).normal(2.0, 5.0, (2, 40, 4)).astype(np.float32)
    plain, mirrored = (torch.from_numpy(part)[:, :, None, None] for part in vectors)
    writer = LatentsWriter(tmp_path / "latents", shard_size=16)
    writer.add(plain, mirrored, torch.arange(40) % 3)
    writer.close()
    finish(tmp_path / "latents")
    return tmp_path / "latents", (vectors - vectors[0].mean(0)) / vectors[0].std(0, ddof=1)


def rows(vectors: np.ndarray) -> set:
    return {tuple(row) for row in vectors.round(4).tolist()}


def test_program_on_latents(tmp_path, narrow, drawn, capsys):
    directory, (plain, mirrored) = narrow
    config = toy.write_run(tmp_path / "run.yaml", toy.LIGHTNINGDIT, data={"data_path": "x", "latent_flip": False})
    asked = ["--latents", str(directory), "--vectors", "36", "--seed", "2", "--output", str(tmp_path / "r.json")]
    assert evaluate.main([str(config), *asked]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert figures(report) == pytest.approx(evenness(drawn[0]), rel=1e-6)
    assert len(drawn[0]) == report["vectors"] == 36 and rows(drawn[0]) < rows(plain) and report["mirrored"] is False
    assert report["vectors_sha256"] == hashlib.sha256(drawn[0].tobytes()).hexdigest()
    assert f"normalized_entropy {evenness(drawn[0])[2]:.4f}" in capsys.readouterr().out
    assert evaluate.main([*asked, "--set", "tokenizer=ours"]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["mirrored"] is True and report["tokenizer"] == "ours"
    assert figures(report) == pytest.approx(evenness(drawn[1]), rel=1e-6)
    for key in set(report) - {"tokenizer"}:
        with pytest.raises(ValueError, match=f"{key} is what evaluate itself finds out"):
            evaluate.main([*asked, "--set", f"{key}=1"])
    assert rows(drawn[1]) < rows(plain) | rows(mirrored) and 9 < len(rows(drawn[1]) & rows(mirrored)) < 27
