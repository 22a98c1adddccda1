"""The autoencoder against the recorded one, its posterior against torch's distributions, its published layout."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import kernels
from tests.golden import G, J, close, close_grads
from vavae.config import AutoencoderConfig
from vavae.model import AutoencoderKL, Downsample, Posterior, upsample_nearest_2x

OPS = kernels.select("reference")
TINY = AutoencoderConfig(**J("04_vae_tiny")["tiny_config"])
PRECISIONS = {
    torch.float32: ("", {"atol": 2e-5, "rtol": 1e-6}),
    torch.float64: ("_f64", {"atol": 1e-11, "rtol": 1e-12}),
}


@pytest.fixture(scope="module")
def golden() -> G:
    return G("04_vae_tiny")


def tiny(golden: G, dtype: torch.dtype) -> AutoencoderKL:
    model = AutoencoderKL(TINY, OPS)
    model.load_state_dict(golden.group("param/"))
    return model.to(dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_encoder_and_posterior_match_the_recorded(golden, dtype):
    suffix, limits = PRECISIONS[dtype]
    model = tiny(golden, dtype)
    x, z = golden["in/x"].to(dtype), golden["in/z"].to(dtype)
    close("moments", model.moments(x), golden["out/moments" + suffix], **limits)
    posterior = model.encode(x)
    for name in ("mean", "logvar", "std", "var"):
        close(name, getattr(posterior, name), golden[f"out/{name}{suffix}"], **limits)
    other = Posterior(golden["in/w_mean"].to(dtype), (0.3 * golden["in/w_logvar"]).to(dtype))
    values = {
        "mode": posterior.mode(),
        "kl": posterior.kl(),
        "kl_vs_other": posterior.kl(other),
        "nll_of_z": posterior.nll(z),
    }
    for name, value in values.items():
        close(name, value, golden[f"out/{name}{suffix}"], **limits)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_decoder_matches_the_recorded(golden, dtype):
    suffix, limits = PRECISIONS[dtype]
    model = tiny(golden, dtype)
    close("decode", model.decode(golden["in/z"].to(dtype)), golden["out/decode_z" + suffix], **limits)
    reconstruction, _ = model(golden["in/x"].to(dtype))
    close("decode of the mode", reconstruction, golden["out/decode_mode" + suffix], **limits)


def test_sample_is_mean_plus_noise_times_std(golden):
    posterior = tiny(golden, torch.float32).encode(golden["in/x"])
    close("sample", posterior.sample(noise=golden["in/sample_eps"]), golden["out/sample"], atol=2e-5)
    draws = [posterior.sample(torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_gradients_match_the_recorded(golden):
    model = tiny(golden, torch.float32)
    posterior = model.encode(golden["in/x"])
    decoded = model.decode(golden["in/z"])
    loss = (posterior.mean * golden["in/w_mean"]).sum() + (posterior.logvar * golden["in/w_logvar"]).sum()
    loss = loss + (decoded * golden["in/w_dec"]).sum()
    close("loss", loss, golden["out/loss"], atol=1e-3, rtol=1e-5)
    loss.backward()
    close_grads("tiny", {k: p.grad for k, p in model.named_parameters()}, golden.group("grad/"), relmax=3e-5)


def test_channels_last_computes_the_same(golden):
    model = tiny(golden, torch.float32).to(memory_format=torch.channels_last)
    x, z = (golden[k].contiguous(memory_format=torch.channels_last) for k in ("in/x", "in/z"))
    moments, decoded = model.moments(x), model.decode(z)
    close("moments", moments, golden["out/moments"], atol=2e-5)
    close("decode", decoded, golden["out/decode_z"], atol=2e-5)
    assert decoded.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (1, 3, 1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_upsampling_is_interpolation_by_nearest_neighbours(layout, shape):
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    got, want = upsample_nearest_2x(x), torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
    assert torch.equal(got, want) and 0 not in got.stride()
    assert got.is_contiguous(memory_format=layout) or shape[-1] == 1
    upstream = torch.randn_like(want)
    gradients = [torch.autograd.grad(result, x, upstream)[0] for result in (got, want)]
    close("gradient", *gradients, atol=1e-14)


def test_downsample_pads_below_and_on_the_right_also_at_odd_sizes(golden):
    down = Downsample(32)
    down.load_state_dict(golden.group("downsample/param/"))
    close("downsample", down(golden["downsample/x"]), golden["downsample/out"], atol=2e-5)


def test_log_variance_is_clamped(golden):
    posterior = Posterior.from_moments(golden["clamp/params"])
    for name in ("logvar", "std", "var"):
        close(name, getattr(posterior, name), golden[f"clamp/{name}"], atol=0, rtol=1e-6)


def test_posterior_agrees_with_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    p, q = (Posterior(*torch.randn(2, 3, 4, 5, 6, generator=generator, dtype=torch.float64)) for _ in range(2))
    sample = torch.randn(3, 4, 5, 6, generator=generator, dtype=torch.float64)
    normal, other = Normal(p.mean, p.std), Normal(q.mean, q.std)
    standard = Normal(torch.zeros_like(p.mean), torch.ones_like(p.mean))
    close("kl", p.kl(), kl_divergence(normal, standard).sum((1, 2, 3)), atol=1e-10)
    close("kl to another", p.kl(q), kl_divergence(normal, other).sum((1, 2, 3)), atol=1e-10)
    close("nll", p.nll(sample), -normal.log_prob(sample).sum((1, 2, 3)), atol=1e-10)


def test_posterior_of_bfloat16_moments_is_float32():
    posterior = Posterior.from_moments(torch.randn(1, 4, 2, 2).bfloat16())
    assert {t.dtype for t in (posterior.mean, posterior.logvar, posterior.kl())} == {torch.float32}


def test_bfloat16_weights_take_float32_images(golden):
    model = tiny(golden, torch.bfloat16)
    reconstruction, posterior = model(golden["in/x"])
    assert reconstruction.dtype == torch.bfloat16 and posterior.mean.dtype == torch.float32
    close("bfloat16", posterior.mean, golden["out/mean"], atol=0.1)


@pytest.mark.parametrize("size, recorded", [("f16d32", "vavae_f16d32"), ("mar-f16d16", "marvae_f16d16")])
def test_published_layout(size, recorded):
    want = J("04_vae_real_f16d32")[recorded]
    with torch.device("meta"):
        model = AutoencoderKL(AutoencoderConfig(size=size), OPS)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == want["state_dict"]
    assert len(model.state_dict()) == want["n_keys"]
    assert sum(p.numel() for p in model.parameters()) == want["total_params"]


@pytest.mark.parametrize("size", ["f16d16", "f16d64"])
def test_other_sizes_differ_in_the_latents_alone(size):
    want = J("04_vae_real_f16d32")["vavae_f16d32"]["state_dict"]
    with torch.device("meta"):
        model = AutoencoderKL(AutoencoderConfig(size=size), OPS)
    differ = {k for k, v in model.state_dict().items() if list(v.shape) != want[k]}
    ends = ("encoder.conv_out", "quant_conv", "post_quant_conv", "decoder.conv_in")
    assert {k.rsplit(".", 1)[0] for k in differ} == set(ends)
    assert set(model.state_dict()) == set(want)


def test_wrong_inputs_are_named(golden):
    model = tiny(golden, torch.float32)
    with pytest.raises(ValueError, match=r"multiples of 2, got \[1, 3, 15, 16\]"):
        model.encode(torch.zeros(1, 3, 15, 16))
    with pytest.raises(ValueError, match=r"images \[B, 3, H, W\].*got \[1, 1, 16, 16\]"):
        model.encode(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match=r"latents \[B, 4, h, w\], got \[1, 8, 8, 8\]"):
        model.decode(torch.zeros(1, 8, 8, 8))
