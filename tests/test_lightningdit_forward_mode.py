"""The network on tensors with tangents: its derivative along latents and times, of every backend, compiled or not.

On a device too, by `pytest.mark.gpu`, which cases of backends have.
"""

import pytest
import torch

import kernels
from kernels.compile.modes import compile_module
from kernels.forward_mode import Dual
from lightningdit.config import ModelConfig
from lightningdit.duals import add, chunk, differentiated, linear, linear_map, subtract, value_of
from lightningdit.model import LightningDiT
from tests.dit_models import VARIANTS, inputs, random_model
from tests.test_models_on_kernels import backends_and_devices, ops_on

#: Letters of recorded configs → what they have; c and e have the other forms of norms and feed-forward layers.
FORMS = ("a", "b", "c", "d", "e", "g")


def config_of(variant: str, **changes) -> ModelConfig:
    return ModelConfig(**VARIANTS[variant] | {"time_pairs": True} | changes)


def arguments(config: ModelConfig, dtype: torch.dtype = torch.float64, device="cpu"):
    """x and t with their tangents, labels, second times."""
    x, t, y = inputs(config)
    generator = torch.Generator().manual_seed(2)
    x_t, t_t, r = torch.randn(x.shape, generator=generator), torch.randn(3, generator=generator), torch.rand(3)
    x, t, x_t, t_t, r = (value.to(device, dtype) for value in (x, t, x_t, t_t, r))
    return Dual(x, x_t), Dual(t, t_t), y.to(device), r


def by_torch(model: LightningDiT, x: Dual, t: Dual, y: torch.Tensor, r: torch.Tensor | None) -> Dual:
    return Dual(*torch.func.jvp(lambda x, t: model(x, t, y, r), (x.value, t.value), (x.tangent, t.tangent)))


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest, relative to the largest value."""
    return float((got.detach().double() - want.detach().double()).abs().max() / want.detach().double().abs().max())


@pytest.mark.parametrize("variant", FORMS)
def test_it_is_the_derivative_by_torch_and_by_finite_differences(variant):
    config = config_of(variant)
    model = random_model(config, kernels.select("reference")).double().eval()
    x, t, y, r = arguments(config)
    model.requires_grad_(False)
    got, want = model(x, t, y, r), by_torch(model, x, t, y, r)
    assert error(got.value, model(x.value, t.value, y, r)) < 1e-13 and error(got.value, want.value) < 1e-13
    assert error(got.tangent, want.tangent) < 1e-12
    step = 1e-5
    ahead, behind = (model(x.value + s * x.tangent, t.value + s * t.tangent, y, r) for s in (step, -step))
    assert error(got.tangent, (ahead - behind) / (2 * step)) < 1e-7


@pytest.mark.parametrize("part", ["x", "t"])
def test_a_tangent_of_one_of_the_two_is_enough(part):
    config = config_of("a")
    model = random_model(config, kernels.select("reference")).double().eval()
    x, t, y, r = arguments(config)
    zero = {"x": t, "t": x}[part]
    zero = Dual(zero.value, torch.zeros_like(zero.value))
    got = model(x, t.value, y, r) if part == "x" else model(x.value, t, y, r)
    want = model(x, zero, y, r) if part == "x" else model(zero, t, y, r)
    assert torch.equal(got.value, want.value) and error(got.tangent, want.tangent) < 1e-13


@backends_and_devices(torch.float32, torch.float16, torch.bfloat16)
@pytest.mark.parametrize("variant", ["a", "b"])
def test_every_backend(variant, backend, dtype, device):
    """Against float64, as the network with `Dual`s and as any function by `torch.func.jvp`.

    The tangent is held to three times what the network's own results are: it goes through twice as many operations.
    """
    ops = ops_on(backend, device, dtype)
    if backend == "cuda":  # which has no forward modes
        ops = kernels.select("reference", **{name: backend for name in ("swiglu", "rope_attention")})
    config = config_of(variant)
    reference = random_model(config, kernels.select("reference")).double().eval()
    model = random_model(config, ops).to(device, dtype).eval()
    x, t, y, r = arguments(config)
    want = by_torch(reference, x, t, y, r)
    on_device = (
        [Dual(*(part.float().to(device) for part in dual)) for dual in (x, t)],
        y.to(device),
        r.float().to(device),
    )
    if backend == "cuda":
        with pytest.raises(kernels.BackendUnavailable, match="_jvp: backend 'cuda' cannot serve: this op has no cuda"):
            by_torch(random_model(config, kernels.select("cuda", stacked_linear="library")), x, t, y, r)
        return
    limit = {torch.float32: 3e-5, torch.float16: 3e-2, torch.bfloat16: 2e-1}[dtype]
    (x, t), y, r = on_device
    for got in (model(x, t, y, r), by_torch(model, x, t, y, r)):
        assert got.value.dtype == got.tangent.dtype == torch.float32
        assert error(got.value.cpu(), want.value) < limit and error(got.tangent.cpu(), want.tangent) < 3 * limit


@pytest.mark.parametrize("backend", ["reference", "auto", "triton"])
def test_gradients_flow_through_values_alone(backend):
    """They are those of a pass without tangents, to rounding of float32, and a tangent asks for none."""
    named = {"adaln_rms_norm": backend} if backend == "triton" else {}
    ops = kernels.select("auto" if backend == "auto" else "reference", **named)
    if backend == "triton":
        if kernels.OPS["swiglu"].reasons("triton"):
            pytest.skip("; ".join(kernels.OPS["swiglu"].reasons("triton")))
        forward_modes = [op for op in kernels.OPS.values() if op.forward_mode_of and "triton" in op.backends]
        names = [name for op in forward_modes for name in (op.name, op.forward_mode_of)]
        ops = kernels.select("reference", **dict.fromkeys(names, "triton"), stacked_linear="library")
    config = config_of("a")
    x, t, y, r = arguments(config, torch.float32)
    found = []
    for with_tangents in (False, True):
        model = random_model(config, ops).train()
        out = model(x, t, y, r) if with_tangents else model(x.value, t.value, y, r)
        if with_tangents:
            assert not out.tangent.requires_grad
        value_of(out).square().sum().backward()
        found.append([value_of(out).detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(error(a, b) < 2e-5 for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("use_checkpoint", [True, "pointwise", 2])
@pytest.mark.parametrize("params_gathered", [True, False])
def test_checkpointed_and_partitioned_networks_give_the_same(use_checkpoint, params_gathered):
    x, t, y, r = arguments(config_of("a"), torch.float32)
    found = []
    for kind in (False, use_checkpoint):
        torch.manual_seed(0)
        ops = kernels.select("reference")
        model = LightningDiT(config_of("a", use_checkpoint=kind), ops, params_gathered=params_gathered).train()
        model.load_state_dict(random_model(config_of("a"), ops).state_dict())
        out = model(x, t, y, r)
        out.value.square().sum().backward()
        found.append([*out, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("mode", ["aot_eager", "regional"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_it_compiles_as_one_graph_or_by_regions(mode, backend):
    torch._dynamo.reset()
    config = config_of("a")
    x, t, y, r = arguments(config, torch.float32)
    found = []
    for kind in ("none", mode):
        model = random_model(config, kernels.select(backend)).train()
        compile_module(model, kind)
        out = model(x, t, y, r)
        out.value.square().sum().backward()
        found.append([*out, *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*found, strict=True):
        assert error(a, b) < 2e-5


def test_the_second_time_changes_nothing_at_first():
    """A network of the same seed without one has the same weights and results, so it can be continued from."""
    results = []
    for time_pairs in (False, True):
        torch.manual_seed(3)
        model = LightningDiT(config_of("a", time_pairs=time_pairs), kernels.select("reference")).eval()
        with torch.no_grad():
            model.final_layer.linear.weight.copy_(
                torch.linspace(-1, 1, model.final_layer.linear.weight.numel()).view_as(model.final_layer.linear.weight)
            )
        x, t, y, r = arguments(model.config, torch.float32)
        results.append((model(x.value, t.value, y, *([r] if time_pairs else [])), model.state_dict()))
    (plain, weights), (paired, with_second) = results
    assert torch.equal(plain, paired)
    added = {f"r_embedder.mlp.{layer}.{name}" for layer in (0, 2) for name in ("weight", "bias")}
    assert with_second.keys() - weights.keys() == added
    assert all(torch.equal(with_second[name], value) for name, value in weights.items())
    assert not with_second["r_embedder.mlp.2.weight"].any() and with_second["r_embedder.mlp.0.weight"].any()


def test_the_interval_is_what_the_second_time_tells():
    config = config_of("a")
    model = random_model(config, kernels.select("reference")).double().eval()
    x, t, y, r = arguments(config)
    out = model(x.value, t.value, y, r)
    assert torch.equal(model(x.value, t.value, y), model(x.value, t.value, y, t.value)), "none is an interval of 0"
    assert not torch.allclose(out, model(x.value, t.value, y))
    # With the embedding of t silenced, only r - t is left.
    with torch.no_grad():
        for layer in model.t_embedder.linears:
            layer.weight.zero_()
    moved = model(x.value, t.value + 0.125, y, r + 0.125)
    torch.testing.assert_close(moved, model(x.value, t.value, y, r), atol=1e-12, rtol=1e-12)


def test_a_second_time_is_refused_by_a_network_without_one():
    config = config_of("a", time_pairs=False)
    x, t, y, r = arguments(config, torch.float32)
    model = LightningDiT(config, kernels.select("reference"))
    with pytest.raises(ValueError, match="without time_pairs"):
        model(x.value, t.value, y, r)
    with pytest.raises(ValueError, match=r"^r is \(2,\); one per sample is \[3\]"):
        LightningDiT(config_of("a"), kernels.select("reference"))(x.value, t.value, y, r[:2])


def test_functions_of_values_and_tangents():
    """Each against `torch.func.jvp` of what it computes."""
    generator = torch.Generator().manual_seed(0)
    x, x_t, y, y_t = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(4))
    weight, bias = torch.randn(5, 4, generator=generator, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    weight.requires_grad_()
    both = Dual(x, x_t), Dual(y, y_t)
    cases = {
        "linear": (lambda x: torch.nn.functional.linear(x, weight, bias), lambda x: linear(x, weight, bias), both[:1]),
        "linear_map": (lambda x: x.reshape(2, 6), lambda x: linear_map(lambda v: v.reshape(2, 6), x), both[:1]),
        "add": (lambda x, y: x + y, add, both),
        "differentiated": (lambda x, y: x.sin() * y, lambda x, y: differentiated(lambda a, b: a.sin() * b, x, y), both),
        "subtract": (lambda x: y - x, lambda x: subtract(y, x), both[:1]),
    }
    for name, (plain, ours, duals) in cases.items():
        want = torch.func.jvp(plain, tuple(d.value for d in duals), tuple(d.tangent for d in duals))
        got = ours(*duals)
        assert torch.equal(got.value, want[0]) and torch.equal(got.tangent, want[1].detach()), name
        assert not got.tangent.requires_grad and torch.equal(ours(*(d.value for d in duals)), want[0]), name
    row = add(Dual(x, x_t), y[0])
    assert torch.equal(row.tangent, x_t) and torch.equal(add(y[0], Dual(x, x_t)).value, row.value)
    wide = add(torch.zeros(2, 3, 4, dtype=torch.float64), Dual(x, x_t))
    assert torch.equal(wide.tangent, x_t.expand(2, 3, 4)), "a tangent has the shape of its value"
    parts = chunk(Dual(x, x_t), 2, dim=1)
    assert all(torch.equal(p.tangent, t) for p, t in zip(parts, x_t.chunk(2, dim=1), strict=True))
    first, second = differentiated(lambda a, b, c: (a * b, a + b), Dual(x, x_t), y, None)
    assert torch.equal(first.tangent, x_t * y) and torch.equal(second.tangent, x_t)
