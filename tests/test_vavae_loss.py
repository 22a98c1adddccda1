"""Every term of the tokenizer's loss against the recorded ones, and what adaptive weights may and may not touch."""

import warnings

import lpips
import pytest
import torch
from torch import nn
from torchvision.models import VGG16_Weights

import kernels
from common.tensors import WeightsError
from tests.golden import G, J, close, close_grads, formula_weight
from vavae.config import LossConfig
from vavae.discriminator import NLayerDiscriminator, adopt_weight, frozen, hinge_loss, vanilla_loss
from vavae.gradients import adaptive_weight
from vavae.loss import (
    MAX_GAN_WEIGHT,
    MAX_VF_WEIGHT,
    AutoencoderOutput,
    Perceptual,
    discriminator_loss,
    generator_loss,
    reconstruction_nll,
    vf_term,
)
from vavae.model import Posterior

OPS = kernels.select("reference")
DTYPES = {torch.float32: ("", 1e-5), torch.float64: ("_f64", 1e-10)}


@pytest.fixture(scope="module")
def golden() -> G:
    return G("05_vae_losses")


# VF loss


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("margins", [(0.0, 0.0), (0.25, 0.5)])
@pytest.mark.parametrize(
    "weights, name",
    [((1, 0), "vf_loss_1"), ((0, 1), "vf_loss_2"), ((1, 1), "vf_loss"), ((0.7, 1.3), "vf_loss_w0.7_1.3")],
)
def test_vf_loss_matches_the_recorded(golden, dtype, margins, weights, name):
    suffix, rel = DTYPES[dtype]
    names = ("distmat_margin", "cos_margin", "distmat_weight", "cos_weight")
    config = LossConfig(**dict(zip(names, (*margins, *weights), strict=True)))
    z, f = (golden[k].to(dtype, copy=True).requires_grad_() for k in ("vf/z", "vf/aux"))
    value, logs = vf_term(config, OPS, z, f)
    value.backward()
    place = f"vf/distmat{margins[0]}_cos{margins[1]}/{name}"
    close("value", value, golden[f"{place}/value{suffix}"], atol=0, rtol=rel)
    close("grad z", z.grad, golden[f"{place}/grad_z{suffix}"], relmax=rel)
    if name == "vf_loss":
        close("grad f", f.grad, golden[f"{place}/grad_aux{suffix}"], relmax=rel)
    assert not logs["vf_distmat"].requires_grad and not logs["vf_cos"].requires_grad


# Adaptive weights


@pytest.mark.parametrize("dtype", DTYPES)
def test_adaptive_weights_match_the_recorded(golden, dtype):
    """A linear layer with three losses: L1 to a target, a tanh critic, and a cosine with margin."""
    suffix, rel = DTYPES[dtype]
    layer, x, target, v = (golden[f"adapt/{k}"].to(dtype, copy=True) for k in ("W", "x", "target", "v"))
    y = x @ layer.requires_grad_().T
    nll = (y - target).abs().sum() / len(y)
    gan = -(y.tanh() @ v).mean()
    vf = (1 - 0.5 - torch.cosine_similarity(y, target)).relu().mean()
    for name, value in {"nll": nll, "g": gan, "vf": vf}.items():
        close(name, value, golden[f"adapt/{name}{suffix}"], atol=0, rtol=rel)

    def weight(reference: torch.Tensor, term: torch.Tensor, limit: float) -> torch.Tensor:
        return adaptive_weight(*(torch.autograd.grad(x, layer, retain_graph=True)[0] for x in (reference, term)), limit)

    weights = {
        "vf_weight_w0.1": 0.1 * weight(nll, vf, MAX_VF_WEIGHT),
        "vf_weight_vf*1e-12": 0.1 * weight(nll, vf * 1e-12, MAX_VF_WEIGHT),
        "vf_weight_clamp": 0.1 * weight(nll * 1e12, vf, MAX_VF_WEIGHT),
        "d_weight_dw0.5": 0.5 * weight(nll, gan, MAX_GAN_WEIGHT),
        "d_weight_clamp_g*1e-12": 0.5 * weight(nll, gan * 1e-12, MAX_GAN_WEIGHT),
    }
    for name, value in weights.items():
        close(name, value, golden[f"adapt/{name}{suffix}"], atol=0, rtol=rel)
        assert not value.requires_grad
    assert layer.grad is None


# Adversarial terms


def test_gan_losses_match_the_recorded(golden):
    real, fake = golden["gan/logits_real"], golden["gan/logits_fake"]
    close("hinge", hinge_loss(real, fake), golden["gan/hinge_d"], atol=1e-6)
    close("vanilla", vanilla_loss(real, fake), golden["gan/vanilla_d"], atol=1e-6)
    close("generator", -fake.mean(), golden["gan/g_loss"], atol=1e-6)


def test_adopt_weight_matches_the_recorded():
    recorded = J("05_vae_losses")["adopt_weight"]
    assert {f"w1_step{i}_thr5": adopt_weight(1.0, i, 5) for i in (0, 4, 5, 6)} == recorded


def patch_discriminator(golden: G) -> NLayerDiscriminator:
    model = NLayerDiscriminator(3, ndf=8, n_layers=3)
    model.load_state_dict(golden.group("comp/disc_param/"))
    return model


def test_discriminator_matches_the_recorded(golden):
    model = patch_discriminator(golden)
    close("train", model.train()(golden["patchgan/x"]), golden["patchgan/train_out"], atol=2e-5)
    close("eval", model.eval()(golden["patchgan/x"]), golden["patchgan/eval_out_after_one_train_fwd"], atol=2e-5)


def test_discriminator_has_the_published_layout():
    recorded = J("05_vae_losses")["patchgan_ndf64_n3"]
    model = NLayerDiscriminator()
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == recorded["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == recorded["params"]
    assert [repr(layer) for layer in model.main] == recorded["layers"]
    assert model(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)


def test_discriminator_in_bfloat16_keeps_its_statistics_in_float32(golden):
    exact, model = patch_discriminator(golden).train(), patch_discriminator(golden).train().bfloat16()
    want, got = exact(golden["patchgan/x"]), model(golden["patchgan/x"])
    assert got.dtype == torch.bfloat16
    close("logits", got, want, atol=0.1)
    for key, value in exact.state_dict().items():
        if "running" in key:
            assert model.state_dict()[key].dtype == torch.float32
            close(key, model.state_dict()[key], value, relmax=0.02)
    assert model.double().state_dict()["main.3.running_mean"].dtype == torch.float64


def test_discriminator_starts_at_the_published_scale():
    torch.manual_seed(0)
    model = NLayerDiscriminator()
    for layer in model.main:
        if isinstance(layer, nn.Conv2d):
            deviation = 5 * 0.02 / (2 * layer.weight.numel()) ** 0.5
            assert abs(layer.weight.std().item() - 0.02) < deviation and abs(layer.weight.mean().item()) < 2 * deviation
        if isinstance(layer, nn.BatchNorm2d):
            assert abs(layer.weight.mean().item() - 1) < 0.01 and abs(layer.weight.std().item() - 0.02) < 0.006
            assert not layer.bias.any()


def test_frozen_stops_gradients_at_parameters_only():
    model = NLayerDiscriminator(ndf=8, n_layers=1)
    model.main[0].bias.requires_grad_(False)
    x = torch.randn(1, 3, 16, 16, requires_grad=True)
    with frozen(model):
        out = model(x).sum()
    out.backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [True, False] + [True] * (len(list(model.parameters())) - 2)


# The whole loss


def stub_perceptual(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What the recorded runs used in the place of LPIPS."""
    return 3.0 * (x - y).square().mean(dim=(1, 2, 3), keepdim=True)


COMPOSITES = {
    "sum_step0": ({}, False),
    "sum_step10": ({}, True),
    "sum_vanilla": ({"disc_loss": "vanilla"}, True),
    "sum_logvar0.3": ({"logvar": 0.3}, True),
    "pp_step10": ({"reconstruction": "mean", "kl_weight": 1e-2}, True),
}


def composite(golden: G, fields: dict, gan: bool):
    config = LossConfig(**{"kl_weight": 1e-6, "disc_weight": 0.5, "use_vf": False, **fields})
    discriminator = patch_discriminator(golden).train()
    moments = golden["comp/moments"].clone().requires_grad_()
    gain = torch.ones(3, 1, 1, requires_grad=True)
    reconstruction = golden["comp/rec"] * gain
    output = AutoencoderOutput(
        golden["comp/inputs"], reconstruction, Posterior.from_moments(moments), moments, None, None, gain, gain, ()
    )
    with frozen(discriminator):
        total, logs = generator_loss(config, OPS, output, stub_perceptual, discriminator if gan else None)
        total.backward()
    return config, discriminator, moments, gain, reconstruction.detach(), total, logs


@pytest.mark.parametrize("case", COMPOSITES)
def test_generator_loss_matches_the_recorded(golden, case):
    _, discriminator, moments, gain, _, total, logs = composite(golden, *COMPOSITES[case])
    place = f"comp/{case}"
    close("loss", total, golden[f"{place}/loss"], atol=0, rtol=1e-5)
    close("nll", logs["nll"], golden[f"{place}/log/nll_loss"], atol=0, rtol=1e-5)
    close("kl", logs["kl"], golden[f"{place}/log/kl_loss"], atol=0, rtol=1e-5)
    close("rec", logs["rec"] + logs["perceptual"], golden[f"{place}/log/rec_loss"], atol=0, rtol=1e-5)
    close("gain", gain.grad, golden[f"{place}/grad_last_layer"], relmax=3e-5)
    if f"{place}/grad_moments" in golden:
        close("moments", moments.grad, golden[f"{place}/grad_moments"], relmax=3e-5)
    if COMPOSITES[case][1]:
        close("d_weight", logs["d_weight"], golden[f"{place}/log/d_weight"], atol=0, rtol=1e-5)
        close("g_loss", logs["g_loss"], golden[f"{place}/log/g_loss"], atol=1e-6)
    else:
        assert "d_weight" not in logs and "g_loss" not in logs
    assert all(p.grad is None for p in discriminator.parameters())
    assert not any(value.requires_grad for value in logs.values())


def test_balancing_weights_have_the_published_limits():
    """Where a term hardly depends on the layer at which it is balanced: 1e4 for the GAN's, 1e8 for the VF's."""
    layer = torch.ones(1, requires_grad=True)
    images, latents, features = torch.zeros(2, 3, 16, 16), torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    z = latents + layer
    output = AutoencoderOutput(
        images,
        1e3 * z.sum() + images,
        Posterior(latents, latents),
        z,
        latents + 1e-9 * layer,
        features,
        layer,
        layer,
        (),
    )
    config = LossConfig(disc_weight=0.5, vf_weight=0.1)
    _, logs = generator_loss(config, OPS, output, None, lambda images: 1e-12 * images)
    assert logs["d_weight"].item() == pytest.approx(0.5e4) and logs["vf_weight"].item() == pytest.approx(0.1e8)


@pytest.mark.parametrize("case", [case for case, (_, gan) in COMPOSITES.items() if gan])
def test_discriminator_loss_matches_the_recorded(golden, case):
    config, discriminator, _, _, reconstruction, _, _ = composite(golden, COMPOSITES[case][0], gan=False)
    loss, logs = discriminator_loss(config, discriminator(golden["comp/inputs"]), discriminator(reconstruction))
    loss.backward()
    place = f"comp/{case}"
    close("d_loss", loss, golden[f"{place}/d_loss"], atol=1e-6)
    for name in ("logits_real", "logits_fake"):
        close(name, logs[name], golden[f"{place}/dlog/{name}"], atol=1e-6)
    close("logged", logs["d_loss"], golden[f"{place}/dlog/disc_loss"], atol=1e-6)
    gradients = {k: p.grad for k, p in discriminator.named_parameters()}
    if recorded := golden.group(f"{place}/disc_grad/"):
        close_grads(case, gradients, recorded, relmax=3e-5)
    for key, value in golden.group(f"{place}/disc_buffers_after/").items():
        close(key, discriminator.state_dict()[key], value, atol=1e-6)


def test_weighted_mean_of_each_images_nll_matches_the_recorded(golden):
    """The recorded run weighted the images; our NLL is per image, so the same weighting can be laid on it."""
    config = LossConfig(use_vf=False)
    nll, _ = reconstruction_nll(config, golden["comp/inputs"], golden["comp/rec"], stub_perceptual)
    place = "comp/sum_step10_weights"
    close("nll", nll.mean(), golden[f"{place}/log/nll_loss"], atol=0, rtol=1e-5)
    difference = golden[f"{place}/loss"] - golden["comp/sum_step10/loss"]
    close("weighted", (golden["comp/weights"].flatten() * nll).mean() - nll.mean(), difference, atol=1e-2)


def test_bfloat16_reconstructions_are_compared_in_float32(golden):
    nll, logs = reconstruction_nll(LossConfig(), golden["comp/inputs"], golden["comp/rec"].bfloat16(), None)
    exact = (golden["comp/inputs"].double() - golden["comp/rec"].bfloat16().double()).abs().sum((1, 2, 3))
    assert nll.dtype == logs["rec"].dtype == torch.float32
    close("nll", nll, exact, atol=0, rtol=1e-6)


def test_vf_weight_without_adaptation_is_the_plain_one(golden):
    config = LossConfig(adaptive_vf=False, vf_weight=0.3, kl_weight=0.0)
    layer = torch.ones(3, 1, 1, requires_grad=True)
    posterior = Posterior.from_moments(golden["comp/moments"])
    sides = golden["vf/z"], golden["vf/aux"]
    output = AutoencoderOutput(
        golden["comp/inputs"], golden["comp/rec"] * layer, posterior, posterior.mean, *sides, layer, layer, ()
    )
    total, logs = generator_loss(config, OPS, output, None, None)
    vf, _ = vf_term(config, OPS, *sides)
    close("total", total, logs["nll"] + 0.3 * vf, atol=0, rtol=1e-6)
    assert logs["vf_weight"] == pytest.approx(0.3)


# LPIPS


@pytest.fixture(scope="module")
def formula_lpips(tmp_path_factory) -> Perceptual:
    """LPIPS under the recorded storage-free weights; its backbone comes from a file in torchvision's layout."""
    weights = {w["key"]: formula_weight(w["i"], w["shape"], w["std"], w["mean"]) for w in _formula()}
    path = tmp_path_factory.mktemp("lpips") / "vgg.pth"
    features = {k.split(".", 2)[2]: v for k, v in weights.items() if k.startswith("net.")}
    classifier = {"classifier.0.weight": torch.zeros(1)}
    torch.save({f"features.{k}": v for k, v in features.items()} | classifier, path)
    model = Perceptual.from_weights(str(path))
    for index, head in enumerate(model.net.lins):
        head.load_state_dict({"model.1.weight": weights[f"lin{index}.model.1.weight"].abs()})
    return model


def _formula() -> list[dict]:
    return J("05_vae_losses")["lpips"]["formula_weights"]


def test_lpips_matches_the_recorded(formula_lpips):
    golden = G("05_lpips_formula")
    close("conv", formula_lpips.net.net.slice1[0].weight[:2], golden["probe/net.slice1.0.weight[:2]"], atol=0)
    close("head", formula_lpips.net.lin0.model[1].weight, golden["probe/lin0"], atol=0)
    y = golden["y"].clone().requires_grad_()
    value = formula_lpips(golden["x"], y)
    value.sum().backward()
    close("value", value, golden["value"], relmax=1e-4)
    close("grad", y.grad, golden["grad_y"], relmax=1e-4)
    features = formula_lpips.net.net(formula_lpips.net.scaling_layer(golden["x"]))
    for index, feature in enumerate(features):
        moments = torch.stack([feature.mean(), feature.std()])
        close(f"feature {index}", moments, golden[f"feat{index}_mean_std"], relmax=1e-4)


def test_lpips_is_frozen_and_not_training(formula_lpips):
    assert not any(p.requires_grad for p in formula_lpips.parameters())
    assert not any(module.training for module in formula_lpips.modules())


def test_lpips_heads_are_those_of_the_wheel(formula_lpips, tmp_path, monkeypatch):
    """Same backbone in the package's own loader: our loading changes nothing but where the backbone comes from."""
    path = tmp_path / "vgg.pth"
    own = formula_lpips.net.net.state_dict()
    torch.save({f"features.{k.split('.', 1)[1]}": v for k, v in own.items()}, path)
    for name in ("normal_", "kaiming_normal_", "kaiming_uniform_", "uniform_"):  # 138 M weights, overwritten below
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    theirs.net.load_state_dict(own)
    x, y = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    close("distance", Perceptual.from_weights(str(path))(x, y), theirs(x, y), atol=1e-6)


def test_a_wrong_backbone_is_named(tmp_path):
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "vgg.pth")
    with pytest.raises(WeightsError, match=r"vgg.pth as VGG-16 does not fit: 25 missing: slice1.0.bias"):
        Perceptual.from_weights(str(tmp_path / "vgg.pth"))


def test_a_failed_download_says_what_to_do(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(VGG16_Weights, "get_state_dict", offline)
    with pytest.raises(RuntimeError, match=r"could not download VGG-16.*perceptual_weights.*loss\.perceptual to none"):
        Perceptual.from_weights(None)
