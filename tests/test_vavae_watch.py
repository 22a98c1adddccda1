"""Figures that tell how a tokenizer's training goes, against float64, scikit-image and lpips."""

import lpips
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch._subclasses.fake_tensor import FakeTensorMode

from launch.evaluation import pixel_figures
from launch.evaluation.reconstructions import perceptual_distance
from tests import test_vavae_task
from tests.golden import close
from tests.host_reads import HostReads
from tests.test_vavae_task import batch_of, make
from vavae.images import to_uint8
from vavae.loss import Perceptual, lpips_network
from vavae.watch import collapse_warnings, latent_activity, reconstruction_figures, similarity_to_centre

files = test_vavae_task.files  # a fixture


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """A file of random VGG-16 weights in torchvision's layout, of He's variance so that no layer fades."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg.pth"
    tensors = {}
    for key, value in lpips_network("cpu").net.state_dict().items():
        std = (2 / value[0].numel()) ** 0.5 if value.ndim == 4 else 0.1
        tensors[f"features.{key.split('.', 1)[1]}"] = std * torch.randn(value.shape)
    torch.save(tensors, path)
    return path


def images(seed: int, count: int = 3, size: int = 20) -> torch.Tensor:
    """Smooth 8-bit [count, 3, size, size]."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (255 * F.interpolate(coarse, size=size, mode="bilinear")).to(torch.uint8)


# Activity of latents


def posterior_means(stds, offset: float = 30.0) -> torch.Tensor:
    """[6, len(stds), 5, 7] float64 whose channels have exactly these standard deviations, far from zero."""
    x = torch.randn(6, len(stds), 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x -= x.mean((0, 2, 3), keepdim=True)
    x /= x.square().mean((0, 2, 3), keepdim=True).sqrt()
    return offset + x * torch.tensor(stds, dtype=torch.float64).view(1, -1, 1, 1)


@pytest.mark.parametrize(
    ("stds", "dead"),
    [
        ((2.0, 0.5, 0.11, 4.0), 0),  # a variance of 0.0121: active
        ((2.0, 0.09, 0.11, 4.0), 1),  # 0.0081
        ((2.0, 0.0, 0.05, 1e-4), 3),
        ((0.0, 0.0, 0.0, 0.0), 4),
    ],
)
def test_dead_channels_are_those_that_do_not_move(stds, dead):
    for dtype in (torch.float64, torch.float32):
        got = latent_activity(posterior_means(stds).to(dtype).requires_grad_())
        assert {name: value.item() for name, value in got.items()} == pytest.approx(
            {"latent_std": sum(stds) / 4, "latent_std_min": min(stds), "dead_channels": dead / 4}, rel=1e-4, abs=1e-5
        )
        assert not any(value.requires_grad or value.ndim for value in got.values())


def test_activity_is_measured_without_a_host_read_by_operators_on_the_device_alone():
    mean = posterior_means((1.0, 0.0))
    with HostReads() as reads:
        latent_activity(mean)
        assert not reads.seen
        mean.sum().item()
    assert len(reads.seen) == 1
    with FakeTensorMode():  # on a GPU that is not there
        got = latent_activity(torch.empty(2, 3, 4, 4, device="cuda"))
        assert {value.device.type for value in got.values()} == {"cuda"}


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_counts_neither_as_dead_nor_as_alive(wrong):
    mean = posterior_means((1.0, 1.0))
    mean[2, 1, 0, 0] = wrong
    assert not any(value.isfinite() for value in latent_activity(mean).values())


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (None, None),
        (0.0, None),
        (0.2, None),  # one of four, in most steps alone
        (0.25, {"dead channels": "1 of 4 channels of the latents are dead: variance"}),
        (0.6, {"dead channels": "2.4 of 4 channels"}),
        (0.95, {"dead channels": "3.8 of 4 channels"}),
        (1.0, {"collapse": "all 4 channels of the latents are dead: the posterior has collapsed"}),
    ],
)
def test_channels_that_were_dead_all_the_time_are_warned_of(share, said):
    found = collapse_warnings({"loss": 1.0, "dead_channels": share}, 4)
    assert found.keys() == (said or {}).keys()
    assert all(found[cause].startswith(text) for cause, text in (said or {}).items())
    assert collapse_warnings({"loss": 1.0}, 4) == {}  # of another model, or from before
    assert collapse_warnings({"dead_channels": float(torch.tensor(1 / 12))}, 12)  # rounded to float32 below a twelfth


# Figures of reconstructions


def test_figures_are_those_of_evaluation_and_of_other_libraries(vgg):
    a, b = images(0), images(1)
    b[1] = a[1] // 2  # figures are means of figures, not of errors
    got = {
        name: value.item() for name, value in reconstruction_figures(a, b, Perceptual.from_weights(str(vgg))).items()
    }
    pairs = [[x.permute(1, 2, 0).numpy() for x in pair] for pair in zip(a, b, strict=True)]
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    want = {
        "psnr": np.mean([peak_signal_noise_ratio(*pair, data_range=255) for pair in pairs]),
        "ssim": np.mean([structural_similarity(*pair, channel_axis=2, **options) for pair in pairs]),
        "lpips": theirs(vgg)(*(x.double() / 127.5 - 1 for x in (a, b))).mean().item(),
    }
    assert got == pytest.approx(want, rel=1e-5)
    last = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    evaluated = {"psnr": pixel_figures.psnr, "ssim": pixel_figures.ssim, "lpips": perceptual_distance(vgg)}
    assert got == pytest.approx({name: figure(*last).mean().item() for name, figure in evaluated.items()}, rel=1e-6)


def theirs(path) -> lpips.LPIPS:
    """The package's own network in float64, with its own heads, on these weights."""
    net = lpips_network("cpu").double()
    names = {key: f"features.{key.split('.', 1)[1]}" for key in net.net.state_dict()}
    weights = torch.load(path, weights_only=True)
    net.net.load_state_dict({key: weights[name] for key, name in names.items()})
    heads = torch.load(f"{lpips.__path__[0]}/weights/v0.1/vgg.pth", map_location="cpu", weights_only=True)
    net.load_state_dict(heads, strict=False)
    return net.eval()


def test_figures_leave_out_what_there_is_no_network_or_no_room_for():
    assert reconstruction_figures(images(0), images(1), None).keys() == {"psnr", "ssim"}
    assert reconstruction_figures(images(0, size=10), images(1, size=10), None).keys() == {"psnr"}


def test_validation_measures_8_bit_images_of_a_posterior_sample(files, vgg):
    task = make(files, perceptual="lpips", perceptual_weights=str(vgg))
    batch, draws, net = batch_of(task), task.draw(-1, 4, "cpu"), task.networks["autoencoder"]
    logs = task.validate(task.networks, batch, draws)
    with torch.no_grad():
        posterior = net.encode(batch["image"])
        decoded = to_uint8(net.decode(posterior.sample(noise=draws["noise"])))
    want = reconstruction_figures(to_uint8(batch["image"]), decoded, task.perceptual) | latent_activity(posterior.mean)
    assert len(want) == 6 and {name: logs[name].item() for name in want} == pytest.approx(
        {name: value.item() for name, value in want.items()}, rel=1e-5
    )
    assert all(value.ndim == 0 for value in logs.values())


def test_lpips_of_validation_is_in_float32_whatever_trains(files, vgg):
    """In a run in bfloat16 the loss's own is rounded."""
    weights = {"perceptual": "lpips", "perceptual_weights": str(vgg)}
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        task = make(files, frozen_dtype=dtype, **weights)
        logs = task.validate(task.networks, batch_of(task), task.draw(-1, 4, "cpu"))
        found.append([logs[name].item() for name in ("lpips", "perceptual")])
    exact, rounded = found
    assert exact[0] == rounded[0] and abs(rounded[1] / exact[1] - 1) > 1e-5


# Pictures


def test_similarities_are_cosines_to_the_middle():
    x = torch.randn(2, 5, 4, 7, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 28).view(1, 1, 4, 7)
    got = similarity_to_centre(x)
    want = F.cosine_similarity(x.double(), x.double()[:, :, 2:3, 3:4], dim=1)
    close("similarity", got, want, atol=1e-6)
    assert got.shape == (2, 4, 7) and got[:, 2, 3] == pytest.approx(1.0)
    assert similarity_to_centre(x.bfloat16()).dtype == torch.float32


def test_pictures_show_images_reconstructions_and_what_the_vf_loss_compares(files):
    task = make(files)
    batch, draws, net = batch_of(task), task.draw(0, 4, "cpu"), task.networks["autoencoder"]
    assert task.pictures(task.networks, batch, draws).keys() == {"reconstructions"}
    task._picture_similarities = True
    found = task.pictures(task.networks, batch, draws)
    with torch.no_grad():
        z = net.encode(batch["image"]).sample(noise=draws["noise"])
        sides = task.foundation(batch["image"]), net.linear_proj(z)
        decoded = net.decode(z)
    rows = found["reconstructions"]
    assert list(rows) == ["original", "decoded"]
    for row, image in zip(rows.values(), (batch["image"], decoded), strict=True):
        assert torch.equal(row, to_uint8(image).permute(0, 2, 3, 1))
    assert list(found["similarities"]) == ["original", "features", "latents"]
    for side, row in zip(sides, list(found["similarities"].values())[1:], strict=True):
        close("map", row, F.cosine_similarity(side, side[:, :, 4:5, 4:5], dim=1), atol=1e-5)
