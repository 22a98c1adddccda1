"""Figures of features against torch-fidelity, SciPy, mpmath and brute force, on the same features."""

from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch
from scipy import linalg
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

from launch.evaluation.frechet import frechet_distance
from launch.evaluation.inception_score import inception_score
from launch.evaluation.kid import kernel_distance
from launch.evaluation.moments import FeatureStatistics, MomentsOfParts
from launch.evaluation.precision_recall import precision_recall


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return FeatureStatistics.of(features).moments


@pytest.fixture(scope="module")
def features() -> tuple[torch.Tensor, torch.Tensor]:
    """Of 300 generated and 240 real images, 12 each: correlated, off centre, of very different sizes."""
    scale = torch.logspace(-3, 1, 12, dtype=torch.float64)
    fake = normal(0, 300, 12) @ normal(1, 12, 12) * scale + 5
    real = normal(2, 240, 12) @ normal(3, 12, 12) * scale + 5.5
    return fake, real


def test_frechet_distance_is_that_of_torch_fidelity_and_of_scipy(features):
    fake, real = features
    theirs = [metric_fid.fid_features_to_statistics(x) for x in (fake, real)]
    want = metric_fid.fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    got = frechet_distance(*moments(fake), *moments(real))
    assert got == pytest.approx(want, rel=1e-6)
    (a, s), (b, t) = ((x.numpy().mean(0), np.cov(x.numpy().T)) for x in (fake, real))
    root = linalg.sqrtm(s @ t).real
    assert got == pytest.approx(float(((a - b) ** 2).sum() + np.trace(s + t - 2 * root)), rel=1e-6)


def test_frechet_distance_of_ill_conditioned_covariances_is_that_of_sixty_digits():
    """Spectra from 1 down to 1e-14: mpmath takes the roots that float64 could lose."""
    rotation, other = (torch.linalg.qr(normal(seed, 6, 6))[0] for seed in (4, 5))
    spectrum = torch.logspace(0, -14, 6, dtype=torch.float64)
    sigma1 = rotation @ torch.diag(spectrum) @ rotation.T
    sigma2 = other @ torch.diag(spectrum.flip(0) * 2) @ other.T
    sigma1, sigma2 = (sigma1 + sigma1.T) / 2, (sigma2 + sigma2.T) / 2
    with mpmath.workdps(60):
        a, b = (mpmath.matrix(s.tolist()) for s in (sigma1, sigma2))
        values, vectors = mpmath.eigsy(a)
        root = vectors * mpmath.diag([mpmath.sqrt(max(v, 0)) for v in values]) * vectors.T
        inner = mpmath.eigsy(root * b * root, eigvals_only=True)
        cross = sum(mpmath.sqrt(max(v, 0)) for v in inner)
        want = float(sum(a[i, i] + b[i, i] for i in range(6)) - 2 * cross)
    assert frechet_distance(torch.zeros(6), sigma1, torch.zeros(6), sigma2) == pytest.approx(want, rel=1e-6)


def test_inception_score_is_that_of_torch_fidelity():
    logits = normal(6, 120, 9) * 3
    want = metric_isc.isc_features_to_metric(logits, splits=4, shuffle=False)["inception_score_mean"]
    assert inception_score(logits, split_size=30) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("size", [50, 1000])
def test_kernel_distance_is_that_of_torch_fidelity_on_the_same_subsets(features, size):
    fake, real = features
    taken = min(size, len(fake), len(real))
    theirs = metric_kid.kid_features_to_metric(fake, real, kid_subset_size=taken, kid_subsets=20, verbose=False)
    got = kernel_distance(fake, real, size=size, subsets=20)
    assert got.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    assert got.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-6)


def test_kernel_distance_by_its_definition():
    """The mean over pairs of the cubic kernel, of an image with itself left out."""
    x, y = normal(7, 5, 3), normal(8, 5, 3) + 1

    def mean(a, b, same):
        pairs = [(i, j) for i in range(5) for j in range(5) if not (same and i == j)]
        return np.mean([(float(a[i] @ b[j]) / 3 + 1) ** 3 for i, j in pairs])

    want = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert kernel_distance(x, y) == pytest.approx((want, 0.0), rel=1e-9)
    assert kernel_distance(x, normal(9, 40, 3), subsets=3, seed=1) != kernel_distance(x, normal(9, 40, 3), subsets=3)


@pytest.mark.parametrize(
    ("fake", "real", "message"),
    [
        (normal(0, 1, 3), normal(1, 4, 3), "at least 2 samples, fake has 1"),
        (normal(0, 4, 3), normal(1, 4, 2), "two widths cannot be compared: 3 and 2"),
        (normal(0, 4, 3), normal(1, 4, 3) / 0, "real: 12 of 12 values are not finite"),
    ],
)
def test_kernel_distance_refuses(fake, real, message):
    with pytest.raises(ValueError, match=message):
        kernel_distance(fake, real)


def brute_force(centres: np.ndarray, points: np.ndarray, k: int) -> float:
    """Of the points, those no farther from some centre than its k-th nearest other centre, pair by pair."""
    radii = [np.sort(np.sqrt(((centres - c) ** 2).sum(1)))[k] for c in centres]
    inside = [(np.sqrt(((centres - p) ** 2).sum(1)) <= radii).any() for p in points]
    return float(np.mean(inside))


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_torch_fidelity_and_of_brute_force(features, k):
    fake, real = features
    fake = fake * 0.8 + 1
    theirs = metric_prc.prc_features_to_metric(fake, real, prc_neighborhood=k, verbose=False)
    for block in (2048, 17):
        got = precision_recall(real, fake, k, block)
        assert got == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)
        assert got == (brute_force(real.numpy(), fake.numpy(), k), brute_force(fake.numpy(), real.numpy(), k))
    assert 0 < got[0] < 1 and 0 < got[1] < 1 and got[0] != got[1]


def test_equal_images_lie_in_balls_of_radius_0():
    """Far from zero, where a distance that comes of products of matrices is only nearly 0."""
    real = normal(10, 6, 50).repeat_interleave(5, 0) + 1e4
    assert precision_recall(real, real[::5].clone(), block=7) == (1.0, 1.0)
    assert precision_recall(real, real[::5] + 1e-6, block=7) == (0.0, 1.0)


def test_moments_of_parts_have_the_same_bits_whoever_adds_them():
    """Eleven parts by one, two and three processes; the order within each is its own."""
    parts = [normal(seed, 3 + seed % 4, 5) + 100 for seed in range(11)]
    found = []
    for bounds in ((0, 11), (0, 5, 11), (0, 3, 6, 11)):
        main = MomentsOfParts()
        for first, last in pairwise(bounds):
            own = MomentsOfParts()
            for number in reversed(range(first, last)):
                own.add(number, FeatureStatistics.of(parts[number]))
            assert len(own.nodes) <= 4
            for (level, number), node in own.nodes.items():
                main.add(number, node, level)
        found.append(main.whole())
    rows = torch.cat(parts)
    assert [whole.count for whole in found] == 3 * [len(rows)]
    torch.testing.assert_close(found[0].covariance, torch.from_numpy(np.cov(rows.numpy().T)), rtol=1e-11, atol=0)
    torch.testing.assert_close(found[0].mean, rows.mean(0), rtol=1e-14, atol=0)
    assert all(torch.equal(whole.covariance, found[0].covariance) for whole in found)
    assert all(torch.equal(whole.mean, found[0].mean) for whole in found)
