"""Measures against recorded values, other libraries, and slow formulas written out."""

import math

import numpy as np
import pytest
import torch

from launch.evaluation.frechet import frechet_distance
from launch.evaluation.inception_score import inception_score
from launch.evaluation.moments import FeatureStatistics
from launch.evaluation.pixel_figures import psnr, ssim
from launch.evaluation.precision_recall import precision_recall
from launch.evaluation.uniformity import gaussian_kde, latent_uniformity, uniformity
from tests.golden import G, J

CASES = J("07_fid")["cases"]


def images(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(features) -> tuple[torch.Tensor, torch.Tensor]:
    statistics = FeatureStatistics().update(features)
    return statistics.mean, statistics.covariance


@pytest.mark.parametrize("case", CASES)
def test_frechet_distance_recorded(case):
    g = G("07_fid")
    distance = frechet_distance(*moments(g[f"{case}/act1"]), *moments(g[f"{case}/act2"]))
    tolerance = 1e-4 if "rank_deficient" in case else 1e-8
    assert distance == pytest.approx(CASES[case]["fid"], abs=tolerance)
    assert distance == pytest.approx(CASES[case]["fid_eigh"], abs=tolerance)


def test_frechet_distance_of_commuting_gaussians():
    # Diagonal covariances have the closed form |Δmu|² + Σ (√a - √b)²; a rotation changes nothing.
    mean, a, b = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([1.0, 4.0, 0.0]), torch.tensor([9.0, 1.0, 1e-30])
    rotation, _ = torch.linalg.qr(normal(1, 3, 3))
    mean = mean.double() @ rotation.T
    sigma_a, sigma_b = (rotation @ torch.diag(v.double()) @ rotation.T for v in (a, b))
    distance = frechet_distance(mean, sigma_a, torch.zeros(3), sigma_b)
    assert distance == pytest.approx(25 + (1 - 3) ** 2 + (2 - 1) ** 2, abs=1e-6)


def test_frechet_distance_is_symmetric_and_never_negative():
    a, b = moments(normal(0, 40, 6)), moments(normal(1, 50, 6) * 2 + 1)
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-12)
    assert 0 <= frechet_distance(*a, *a) < 1e-12


def test_frechet_distance_agrees_with_torch_fidelity():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a, b = normal(3, 300, 12), normal(4, 200, 12) @ normal(5, 12, 12)
    stats = fid_features_to_statistics(a), fid_features_to_statistics(b)
    want = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(*moments(a), *moments(b)) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        (0, lambda x: x.index_fill(0, torch.tensor(2), math.nan), "mu1: 1 of 5 values are not finite"),
        (3, lambda x: x * math.inf, "sigma2: 25 of 25 values are not finite"),
        (1, lambda x: x[:3], "sigma1 has shape"),
        (0, lambda x: x[:0], r"mu1 has shape \(0,\), expected some values"),
        (2, lambda x: x + 1e300, r"mu2 holds 1e\+300"),
        (1, lambda x: x * -1e200, r"sigma1 holds .*e\+200"),
        (2, lambda x: x[:4], "mu2 has shape"),
        (1, lambda x: x + torch.triu(torch.ones(5, 5), 1), "sigma1 is not symmetric"),
        (1, lambda x: -x, "sigma1 has a negative eigenvalue"),
        (3, lambda x: x - 3 * torch.eye(5), "sigma2 has a negative eigenvalue"),
    ],
)
def test_frechet_distance_refuses(which, change, message):
    arguments = [*moments(normal(0, 30, 5)), *moments(normal(1, 30, 5))]
    arguments[which] = change(arguments[which])
    with pytest.raises(ValueError, match=message):
        frechet_distance(*arguments)


def test_statistics_do_not_depend_on_batches_and_keep_their_digits_far_from_zero():
    x = (normal(7, 1000, 4) + 1e7).double()
    streamed = FeatureStatistics()
    for rows in (x[:1], x[1:1], x[1:300], x[300:]):
        streamed.update(rows)
    assert streamed.count == 1000
    torch.testing.assert_close(streamed.mean, x.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(streamed.covariance, torch.from_numpy(np.cov((x - 1e7).T)), rtol=1e-8, atol=1e-9)
    assert torch.equal(streamed.covariance, streamed.covariance.T)


def test_statistics_refuse():
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        _ = FeatureStatistics().update(torch.ones(1, 3)).covariance
    with pytest.raises(ValueError, match="at least 2 samples, got 0"):
        _ = FeatureStatistics().mean
    with pytest.raises(ValueError, match="1 of 4 values are not finite"):
        FeatureStatistics().update(torch.tensor([[1.0, 2.0], [3.0, math.nan]]))
    with pytest.raises(ValueError, match="width 3, earlier ones had 2"):
        FeatureStatistics().update(torch.ones(2, 2)).update(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"must be \[N, D\]"):
        FeatureStatistics().update(torch.ones(2, 2, 2))


def test_psnr_recorded():
    g = G("04_vae_image_io")
    value = psnr(g["crop/0/out32"][None], g["crop/1/out32"][None])
    recorded = J("04_vae_image_io")["psnr_example"]["value"]  # its mean was taken in float32
    assert value.item() == pytest.approx(recorded, rel=1e-7)


def test_psnr_is_per_image():
    a = torch.full((3, 4, 4, 3), 100, dtype=torch.uint8)
    b = a.clone()
    b[1] += 1
    b[2] -= 10  # also negative differences, which uint8 arithmetic would wrap
    expected = [math.inf, 20 * math.log10(255), 20 * math.log10(25.5)]
    assert psnr(a, b).tolist() == pytest.approx(expected, rel=1e-12)


def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM of one pair, window by window, with weighted moments about the weighted mean."""
    axis = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weight = np.outer(axis, axis) / np.outer(axis, axis).sum()
    values = []
    for channel in range(3):
        for i in range(a.shape[0] - 10):
            for j in range(a.shape[1] - 10):
                x, y = (v[i : i + 11, j : j + 11, channel].astype(np.float64) for v in (a, b))
                mx, my = (weight * x).sum(), (weight * y).sum()
                vx, vy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
                cov = (weight * (x - mx) * (y - my)).sum()
                top = (2 * mx * my + 6.5025) * (2 * cov + 58.5225)
                values.append(top / ((mx**2 + my**2 + 6.5025) * (vx + vy + 58.5225)))
    return float(np.mean(values))


def test_ssim_against_the_formula_written_out():
    a = images(0, (3, 14, 17, 3))
    noise = images(1, (3, 14, 17, 3)).float()
    b = (0.6 * a.float() + 0.4 * noise).to(torch.uint8)
    b[2] = (a[2] // 20) + 120  # hardly any contrast: the stabilisers matter
    want = [slow_ssim(x.numpy(), y.numpy()) for x, y in zip(a, b, strict=True)]
    assert ssim(a, b).tolist() == pytest.approx(want, rel=1e-10)
    assert ssim(a, a).tolist() == pytest.approx([1.0] * 3, abs=1e-12)


def test_image_measures_refuse():
    a = images(0, (2, 16, 16, 3))
    with pytest.raises(ValueError, match="different shapes"):
        psnr(a, a[:1])
    with pytest.raises(ValueError, match="first images must be uint8"):
        psnr(a.float(), a)
    with pytest.raises(ValueError, match="second images must be uint8"):
        ssim(a, a.permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(a[:, :8], a[:, :8])


def test_precision_recall_against_loops():
    real, fake = normal(0, 40, 2), normal(1, 30, 2) * 0.5 + 0.7
    real_np, fake_np = real.numpy(), fake.numpy()

    def covered(centres, points):
        distance = np.linalg.norm
        radii = [sorted(distance(c - o) for o in np.delete(centres, i, 0))[2] for i, c in enumerate(centres)]
        return np.mean([any(distance(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points])

    want = covered(real_np, fake_np), covered(fake_np, real_np)
    assert want[0] != want[1]
    assert precision_recall(real, fake, block=7) == pytest.approx(want)
    assert precision_recall(real, fake + 1000) == (0.0, 0.0)
    with pytest.raises(ValueError, match="fake has 3"):
        precision_recall(real, fake[:3])


def test_inception_score():
    sure = 100 * torch.eye(10).repeat(5, 1)  # ten classes, each certain, equally often
    assert inception_score(sure) == pytest.approx(10, rel=1e-9)
    assert inception_score(torch.zeros(20, 7)) == pytest.approx(1, rel=1e-12)
    # Two splits of one class each know no diversity: averaging over splits is not the score of the whole.
    split = 100 * torch.eye(2).repeat_interleave(5, 0)
    assert inception_score(split, split_size=5) == pytest.approx(1, rel=1e-9)
    assert inception_score(split) == pytest.approx(2, rel=1e-9)


@pytest.mark.parametrize("name", ["gauss300", "ring200_f32", "clusters240"])
def test_density_and_uniformity_recorded(name):
    g, recorded = G("08_latent_vis"), J("08_latent_vis")["small"][name]
    points = g[f"small/{name}"]
    torch.testing.assert_close(gaussian_kde(points), g[f"small/{name}/density"], rtol=1e-8, atol=0)
    check_uniformity(uniformity(points), recorded)


@pytest.mark.parametrize("cache", ["latents_cache_f16d32", "latents_cache_f16d32_vfdinov2"])
def test_uniformity_of_real_latents_recorded(cache):
    """The published tokenizers' figures: the aligned latent space is the more even one."""
    recorded = J("08_latent_vis")["demo_caches"][cache]["uniformity_metrics"]
    check_uniformity(uniformity(G("08_latent_vis")[f"tsne/{cache}"]), recorded)


def check_uniformity(got, recorded):
    assert got.density_cv == pytest.approx(recorded["density_cv"], rel=1e-8)
    assert got.gini == pytest.approx(recorded["gini_coefficient"], rel=1e-8)
    assert got.normalized_entropy == pytest.approx(recorded["normalized_entropy"], rel=1e-8)


def test_uniformity_refuses():
    line = torch.arange(10.0)[:, None] * torch.tensor([1.0, 1.0])
    with pytest.raises(ValueError, match="lower-dimensional subspace"):
        uniformity(line)
    with pytest.raises(ValueError, match="perplexity"):
        latent_uniformity(torch.ones(20, 4))


def test_latent_uniformity_tells_clumps_from_an_even_spread():
    even = normal(0, 200, 8)
    clumped = torch.where(torch.arange(200)[:, None] < 150, even * 0.01, even)
    a, b = latent_uniformity(even), latent_uniformity(clumped)
    assert a == latent_uniformity(even)
    assert a.density_cv < b.density_cv and a.gini < b.gini and a.normalized_entropy > b.normalized_entropy
