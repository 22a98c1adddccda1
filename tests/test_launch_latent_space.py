"""How evenly latents fill their space: which vectors are drawn, and the program that measures them."""

import json

import numpy as np
import pytest
import torch

from launch import evaluate
from launch.latent_space import evaluate_latents, latent_vectors
from launch.metrics import latent_uniformity
from lightningdit.data import LatentDataset
from lightningdit.latents import LatentsWriter, finish
from tests import toy
from tests.golden import G
from tests.golden.golden import ROOT

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


def test_figures_are_means_over_the_draws(numbered):
    latents = LatentDataset(numbered)
    got = evaluate_latents(latents, vectors=60, repeats=2, seed=5)
    alone = [evaluate_latents(latents, vectors=60, repeats=1, seed=seed)["metrics"] for seed in (5, 6)]
    assert alone[0] != alone[1] and got["metrics"] != alone[0]
    assert set(got["metrics"]) == set(got["spread"]) == {"density_cv", "gini", "normalized_entropy"}
    assert got["spread"]["gini"] > 0
    # Two numbers' mean and deviation give them back: one of them is the first draw's.
    mean, half = (got[key]["density_cv"] / (1 if key == "metrics" else 2**0.5) for key in ("metrics", "spread"))
    assert min(abs(mean + sign * half - alone[0]["density_cv"]) for sign in (1, -1)) < 1e-9
    assert (got["vectors"], got["images"], got["shape"], got["repeats"]) == (60, 600, list(SHAPE), 2)
    assert got["tokenizer"] == {"name": "numbers"} and "not comparable" in got["notes"][0]


def test_every_image_is_used_where_there_are_fewer_than_asked_by_default(numbered, monkeypatch):
    monkeypatch.setattr("launch.latent_space.latent_uniformity", lambda drawn: latent_uniformity(drawn[:40]))
    latents = LatentDataset(numbered)
    assert evaluate_latents(latents)["vectors"] == 600
    for vectors in (601, 0):
        with pytest.raises(ValueError, match=f"{vectors} vectors of 600 latents"):
            evaluate_latents(latents, vectors=vectors)
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        evaluate_latents(latents, repeats=0)


def test_program_on_latents(tmp_path, capsys):
    directory = toy.write_latents(tmp_path / "latents", count=40)
    config = toy.write_run(tmp_path / "run.yaml", toy.LIGHTNINGDIT, data={"data_path": "x", "latent_flip": False})
    asked = ["--latents", str(directory), "--vectors", "36", "--seed", "2", "--output", str(tmp_path / "r.json")]
    assert evaluate.main([str(config), *asked]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    want = evaluate_latents(LatentDataset(directory, latent_flip=False), vectors=36, seed=2)
    assert report == want and report["mirrored"] is False
    assert f"normalized_entropy {want['metrics']['normalized_entropy']:.4f}" in capsys.readouterr().out
    assert evaluate.main([*asked, "--set", "tokenizer=ours"]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["mirrored"] is True and report["tokenizer"] == "ours" and report["metrics"] != want["metrics"]
    assert np.isfinite(list(report["metrics"].values())).all()
