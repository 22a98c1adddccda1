"""Both models with kernels in them: the recorded outputs and gradients, on a CPU and (marked `gpu`) on a device."""

import pytest
import torch

import kernels
from kernels.backends.device import cuda_reasons
from lightningdit.config import ModelConfig
from lightningdit.model import LightningDiT
from tests.golden import G, J, close, close_grads
from vavae.config import AutoencoderConfig
from vavae.model import AutoencoderKL

#: Relative to the largest recorded value: outputs, gradients. The float32 limits are those of the reference.
LIMITS = {torch.float32: (2e-5, 2e-5), torch.float16: (5e-3, 3e-2), torch.bfloat16: (4e-2, 2e-1)}


def ops_on(backend: str, device: str, dtype: torch.dtype) -> kernels.Ops:
    """The ops on `backend`, where they have it, else the reference; skips, with reasons, if that cannot run."""
    called = {name: op for name, op in kernels.OPS.items() if not op.graph_pass and not op.mutates}
    having = {name: backend for name, op in called.items() if backend in op.backends}
    reasons = cuda_reasons() if device == "cuda" else []
    for name in having:
        reasons = reasons or kernels.OPS[name].reasons(backend)
        if not reasons and dtype not in kernels.OPS[name].backend(backend).dtypes:
            reasons = [f"{name}: {backend} does not serve {dtype} here"]
        if not reasons and device == "cpu" and not kernels.OPS[name].backend(backend).emulated:
            reasons = [f"{name}: {backend} is not emulated on the CPU here"]
    if reasons or not having:
        pytest.skip("; ".join(reasons) or f"no op has a {backend} backend")
    return kernels.select("reference", **having, stacked_linear="library")


def backends_and_devices(*dtypes: torch.dtype) -> pytest.MarkDecorator:
    """Every backend with kernels, on a CPU and on a device."""
    found = [
        pytest.param(backend, dtype, device, id=f"{backend}-{str(dtype).removeprefix('torch.')}-{device}", marks=marks)
        for backend in ("triton", "cuda")
        for device, marks in (("cpu", ()), ("cuda", pytest.mark.gpu))
        for dtype in dtypes
    ]
    return pytest.mark.parametrize(("backend", "dtype", "device"), found)


@pytest.fixture(autouse=True)
def ieee_convolutions(monkeypatch):
    """As a run has them: cuDNN's own choice for float32 is TF32, which keeps ten bits of each factor."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@backends_and_devices(*LIMITS)
@pytest.mark.parametrize("variant", ["a", "b", "d"])
def test_lightningdit(variant, backend, dtype, device):
    """Variants: a with RMSNorm, SwiGLU and RoPE; b also with QK norm and without shift; d as DiT."""
    ops, g = ops_on(backend, device, dtype), G(f"01_dit_{variant}")
    model = LightningDiT(ModelConfig(**J("01_dit")["variants"][variant]), ops)
    model.load_state_dict(g.group("param/"))
    model = model.to(device, dtype).eval()
    x = g["in/x"].to(device).requires_grad_()
    out = model(x, g["in/t"].to(device), g["in/y"].to(device))
    output, gradient = LIMITS[dtype]
    close("output", out, g["out/eval"], relmax=output)
    (out * g["in/loss_weight"].to(device)).sum().backward()
    close("input gradient", x.grad, g["grad_in/x"], relmax=gradient)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    close_grads(variant, gradients, g.group("grad/"), relmax=gradient, zero_floor=1e-5 if dtype.itemsize > 2 else 1e-2)


@backends_and_devices(torch.float32)  # the recorded weights are those of a network that trains in it
def test_tokenizer(backend, dtype, device):
    ops, g = ops_on(backend, device, dtype), G("04_vae_tiny")
    model = AutoencoderKL(AutoencoderConfig(**J("04_vae_tiny")["tiny_config"]), ops)
    model.load_state_dict(g.group("param/"))
    model = model.to(device)
    inputs = {name: g[f"in/{name}"].to(device) for name in ("x", "z", "w_mean", "w_logvar", "w_dec")}
    # In channels last the interpreter takes a tenth of the time; cases of the op, and this on a device, have the other.
    layout = torch.channels_last if device == "cpu" else torch.contiguous_format
    x, z = (inputs[name].contiguous(memory_format=layout) for name in ("x", "z"))
    posterior, decoded = model.encode(x), model.decode(z)
    close("mean", posterior.mean, g["out/mean"], atol=2e-5, rtol=1e-6)
    close("decode", decoded, g["out/decode_z"], atol=2e-5, rtol=1e-6)
    loss = (posterior.mean * inputs["w_mean"]).sum() + (posterior.logvar * inputs["w_logvar"]).sum()
    (loss + (decoded * inputs["w_dec"]).sum()).backward()
    # The bias in front of a norm has no gradient but rounding, which another order of sums changes.
    gradients = {name: p.grad for name, p in model.named_parameters()}
    close_grads("tokenizer", gradients, g.group("grad/"), zero_floor=2e-2)


@backends_and_devices(*LIMITS)
@pytest.mark.parametrize("margins", [(0.0, 0.0), (0.25, 0.5)])
def test_vf_loss(margins, backend, dtype, device):
    """Value and gradients of the weighted terms; in 16 bits the inputs alone move the gradient by 1e-2."""
    ops, g = ops_on(backend, device, dtype), G("05_vae_losses")
    z, f = (g[f"vf/{name}"].to(device, dtype).requires_grad_() for name in ("z", "aux"))
    distmat, cos = ops.vf_loss(z, f, *margins)
    (0.7 * distmat + 1.3 * cos).backward()
    place = f"vf/distmat{margins[0]}_cos{margins[1]}/vf_loss_w0.7_1.3"
    value, gradient = (1e-5, 1e-5) if dtype == torch.float32 else (1e-2, 1e-1)
    close("value", 0.7 * distmat + 1.3 * cos, g[f"{place}/value"], atol=0, rtol=value)
    close("dz", z.grad, g[f"{place}/grad_z"], relmax=gradient)
