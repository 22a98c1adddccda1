"""The network against the recorded published model, and the invariants a training engine relies on."""

import hashlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from lightningdit.config import MODEL_NAMES, ModelConfig, named_config
from lightningdit.embeddings import LabelTable, position_embedding, rope_tables, timestep_embedding
from lightningdit.model import LightningDiT, ModulatedRMSNorm, SwiGLUMLP, unpatchify
from tests.dit_models import RECORDED, VARIANTS, build, inputs, random_model
from tests.golden import G, J, close, close_grads

#: Of the times' frequencies, float32 numbers below 1 in every precision: exp differs by that between kinds of CPUs.
ULP = 2.0**-23


@pytest.fixture(scope="module")
def ops():
    return kernels.select("reference")


@pytest.mark.parametrize("variant", RECORDED)
def test_output_and_gradients(variant, ops):
    g, model = G(f"01_dit_{variant}"), build(variant, ops)
    x = g["in/x"].requires_grad_()
    out = model(x, g["in/t"], g["in/y"])
    close("output", out, g["out/eval"], atol=5e-6)
    (out * g["in/loss_weight"]).sum().backward()
    close("input gradient", x.grad, g["grad_in/x"], relmax=2e-5)
    close_grads(variant, {k: p.grad for k, p in model.named_parameters()}, g.group("grad/"))
    assert model.pos_embed.grad is None


@pytest.mark.parametrize("variant", RECORDED)
def test_float64(variant, ops):
    g, model = G(f"01_dit_{variant}"), build(variant, ops, torch.float64)
    x = g["in/x"].double().requires_grad_()
    out = model(x, g["in/t"].double(), g["in/y"])
    assert out.dtype == torch.float64
    close("output", out, g["out/eval_f64"], atol=ULP)
    loss = (out * g["in/loss_weight"]).sum()
    close("loss", loss, g["out/loss_f64"], rtol=ULP, atol=0)
    loss.backward()
    close("input gradient", x.grad, g["grad_in/x_f64"], relmax=ULP)
    if variant == "a":
        close_grads("a", {k: p.grad for k, p in model.named_parameters()}, g.group("grad64/"), relmax=ULP)


@pytest.mark.parametrize("variant", RECORDED)
def test_every_submodule(variant, ops):
    """Recorded outputs include the branch that is still pending when a block returns here, and the branch's bias."""
    g, model, seen, biases = G(f"01_dit_{variant}"), build(variant, ops), {}, {}

    def keep(name):
        return lambda module, args, out: seen.__setitem__(name, out)

    for name in ("x_embedder", "t_embedder", "y_embedder"):
        getattr(model, name).register_forward_hook(keep(name))
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(keep(f"block{i}"))
        block.attn.register_forward_hook(keep(f"block{i}.attn"))
        block.mlp.register_forward_hook(keep(f"block{i}.mlp"))
        biases |= {f"block{i}.attn": block.attn.proj.bias, f"block{i}.mlp": block.mlp.last.bias}
    model.final_layer.register_forward_hook(keep("final_layer"))
    model(g["in/x"], g["in/t"], g["in/y"])
    for name, want in g.group("inter/").items():
        got = seen[name]
        if isinstance(got, tuple):
            x, (branch, bias, gate) = got
            got = x + gate[:, None] * (branch + bias)
        close(name, got + biases.get(name, 0), want, atol=1e-5)


@pytest.mark.parametrize("variant", RECORDED)
def test_dropped_labels_become_the_null_label(variant, ops):
    g, model = G(f"01_dit_{variant}"), build(variant, ops)
    y = torch.where(g["in/train_drop_mask"], model.config.null_label, g["in/y"])
    close("train mode", model.train()(g["in/x"], g["in/t"], y), g["out/train_dropped"], atol=5e-6)


@pytest.mark.parametrize("case", J("01_dit")["cfg_cases"])
@pytest.mark.parametrize("variant", RECORDED)
def test_guided_forward(variant, case, ops):
    g, model = G(f"01_dit_{variant}"), build(variant, ops)
    t, scale, interval, start = J("01_dit")["cfg_cases"][case]
    out = model.forward_with_cfg(g["in/x"], torch.full((4,), t), g["in/y_cfg"], scale, interval, start, cfg_channels=3)
    close(case, out, g[f"out/cfg_{case}"], atol=2e-5)
    if case == "plain":
        model, x = model.double(), g["in/x"].double()
        out = model.forward_with_cfg(x, torch.full((4,), t).double(), g["in/y_cfg"], scale, cfg_channels=3)
        close("float64", out, g["out/cfg_plain_f64"], atol=ULP)


def test_guided_forward_of_all_channels(ops):
    g, model = G("01_dit_a"), build("a", ops)
    x, y, t = g["in/x"], g["in/y_cfg"], torch.full((4,), 0.4)
    cond, uncond = model(torch.cat([x[:2], x[:2]]), t, y).chunk(2)
    out = model.forward_with_cfg(x, t, y, 4.0)
    close("all channels", out, torch.cat([uncond + 4 * (cond - uncond)] * 2), atol=1e-5)


def test_bfloat16_stays_near_float32(ops):
    g, model = G("01_dit_a"), build("a", ops, torch.bfloat16)
    out = model(g["in/x"], g["in/t"], g["in/y"])
    assert out.dtype == torch.float32
    close("bfloat16", out, g["out/eval"], atol=1e-1)
    close("recorded autocast run", out, g["out/eval_autocast_bf16"].float(), atol=1e-1)


def test_rope_tables():
    g = G("01_dit_modules")
    for head_dim, grid in ((24, 4), (64, 16), (72, 16)):
        cos, sin = rope_tables(head_dim, grid)
        close("cos", cos, g[f"rope/hd{head_dim}_n{grid}/freqs_cos"], atol=1e-7)
        close("sin", sin, g[f"rope/hd{head_dim}_n{grid}/freqs_sin"], atol=1e-7)
    cos = rope_tables(72, 16)[0]
    recorded = J("01_dit_modules")["rope_72_16"]["sha256_cos_f32"]
    assert hashlib.sha256(cos.numpy().tobytes()).hexdigest().startswith(recorded)


def test_position_embedding():
    g, report = G("01_dit_modules"), J("01_dit_modules")["pos_embed_1152_16"]
    table = position_embedding(1152, 16)
    assert hashlib.sha256(table[0].numpy().tobytes()).hexdigest().startswith(report["sha256_f32"])
    close("full", position_embedding(48, 4)[0], g["pos_embed/d48_g4/full"], atol=1e-7)
    for width, grid in ((1152, 16), (1152, 8), (768, 16)):
        rows = [0, 1, grid - 1, grid, grid + 3, grid * grid - 1]
        close("rows", position_embedding(width, grid)[0, rows], g[f"pos_embed/d{width}_g{grid}/rows"], atol=1e-7)


def test_timestep_embedding():
    g = G("01_dit_modules")
    for width, recorded in ((256, g["temb/dim256"]), (7, g["temb/dim7_odd"])):
        for t, got, want in zip(g["temb/t"], timestep_embedding(g["temb/t"], width), recorded, strict=True):
            close(f"{width} at {t}", got, want, atol=1e-6 + ULP * float(t))


def test_feed_forward_layer(ops):
    g = G("01_dit_modules")
    mlp = SwiGLUMLP(ModelConfig(**VARIANTS["a"]), ops)
    mlp.load_state_dict(g.group("swiglu/param/"))
    close("SwiGLU", mlp(g["swiglu/x"]) + mlp.last.bias, g["swiglu/out"], atol=5e-6)


def test_norm(ops):
    """A modulation of zero leaves the recorded RMSNorm; its first row is of scale 1e-4, where eps decides."""
    g = G("01_dit_modules")
    norm, zero = ModulatedRMSNorm(48, ops), torch.zeros(3, 48)
    norm.weight.data = g["rmsnorm/weight"]
    close("float32", norm(g["rmsnorm/x"], zero, zero)[1], g["rmsnorm/out"], atol=5e-6)
    got = norm(g["rmsnorm/x"].bfloat16(), zero, zero)[1]  # the published norm rounds to bfloat16 before its weight
    close("bfloat16 in", got, g["rmsnorm/out_bf16in"], rtol=2**-8, atol=1e-6)


def test_unpatchify():
    g = G("01_dit_modules")
    assert torch.equal(unpatchify(g["unpatchify/tokens_p2_c4"], 2), g["unpatchify/img_p2_c4"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_label_table_and_its_gradient(dtype):
    """Those of `F.embedding`; in bfloat16 the sums are float32 rounded once."""
    torch.manual_seed(0)
    table = LabelTable(11, 8).to(dtype)
    y = torch.tensor([10, 3, 10, 10, 0, 3, 10])  # the null label comes again and again
    out, upstream = table(y), torch.randn(7, 8).to(dtype)
    assert torch.equal(out, F.embedding(y, table.weight))
    (got,) = torch.autograd.grad(out, table.weight, upstream)
    exact = torch.zeros(11, 8, dtype=torch.float64).index_add_(0, y, upstream.double())
    assert got.dtype == dtype and torch.allclose(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-12)
    assert not got[[1, 2, 4, 5, 6, 7, 8, 9]].any()


def test_the_label_gradient_is_a_product(ops):
    """No scattered addition, whose order a GPU does not keep, in what the backward pass runs."""
    model = random_model(ModelConfig(**VARIANTS["a"]), ops)
    out = model(*inputs(model.config))

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(func._schema.name)
            return func(*args, **kwargs or {})

    names = set()
    with Seen():
        out.square().mean().backward()
    assert model.y_embedder.embedding_table.weight.grad.any()
    assert not {name for name in names if "embedding" in name or "index_put" in name or "scatter" in name}


def test_patches_are_a_strided_convolution(ops):
    config = ModelConfig(**VARIANTS["e"])
    model, (x, _, _) = random_model(config, ops).double(), inputs(config)
    proj, x = model.x_embedder.proj, x.double()
    want = F.conv2d(x, proj.weight, proj.bias, stride=2).flatten(2).transpose(1, 2)
    close("patches", model.x_embedder(x), want, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_keys(variant, ops):
    report, state = J("01_dit")["report"][variant], build(variant, ops).state_dict()
    assert sorted(state) == sorted(report["state_keys"])
    parameters = {k: v for k, v in state.items() if not k.startswith("feat_rope")}
    assert sum(v.numel() for v in parameters.values()) == report["n_params"]


@pytest.mark.parametrize("name", J("01_dit_real_configs"))
def test_published_sizes(name, ops):
    """Key by key the published layout, for every flag combination recorded."""
    for flags, want in J("01_dit_real_configs")[name].items():
        fields = {key: want[key] for key in ("input_size", "in_channels", "num_classes")}
        with torch.device("meta"):
            model = LightningDiT(named_config(name, **fields, **want["flags"]), ops)
        state = {k: list(v.shape) for k, v in model.state_dict().items()}
        assert len(state) == want["n_keys"], flags
        assert sum(p.numel() for p in model.parameters()) == want["total_params"], flags
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == want["trainable_params"], flags
        assert sum(b.numel() for b in model.buffers()) == want["buffers_numel"], flags
        if "state_dict" in want:  # the whole list for the paper's flags, one block of it for the others
            if len(want["state_dict"]) < want["n_keys"]:
                state = {k: v for k, v in state.items() if not k.startswith("blocks.") or k.startswith("blocks.0.")}
            assert state == want["state_dict"], flags


def test_xl_has_the_published_parameters(ops):
    paper = dict(use_swiglu=True, use_rope=True, use_rmsnorm=True)
    with torch.device("meta"):
        model = LightningDiT(named_config("LightningDiT-XL/1", input_size=16, in_channels=32, **paper), ops)
    assert sum(p.numel() for p in model.parameters()) == 675_256_736
    assert len(model.state_dict()) == 351
    assert "LightningDiT-L/1" in MODEL_NAMES


@pytest.mark.parametrize("case", J("01_dit_init_stats"))
def test_initialisation(case, ops):
    """Exact zeros and ones exactly; mean and spread of the drawn tensors within five standard errors."""
    recorded = J("01_dit_init_stats")[case]
    torch.manual_seed(0)
    parameters = dict(LightningDiT(ModelConfig(**recorded["config"]), ops).named_parameters())
    assert sorted(parameters) == sorted(recorded["params"])
    for name, want in recorded["params"].items():
        p = parameters[name].detach().double()
        assert parameters[name].requires_grad == want["requires_grad"], name
        assert list(p.shape) == want["shape"], name
        if want["std"] == 0:
            assert (p == want["mean"]).all(), name
            continue
        error = want["std"] / p.numel() ** 0.5
        drawn = 0.0 if name == "pos_embed" else 5 * 2**0.5 * error
        assert abs(float(p.mean()) - want["mean"]) <= drawn + 1e-7, name
        assert abs(float(p.std()) - want["std"]) <= drawn + 1e-6, name
        if "mlp" not in name and "embedding_table" not in name:  # uniform draws have an edge
            assert float(p.abs().max()) == pytest.approx(want["absmax"], rel=0.01), name


def test_starts_as_zero(ops):
    config = ModelConfig(**VARIANTS["a"])
    assert not LightningDiT(config, ops)(*inputs(config)).any()


def test_without_shift_is_a_zero_shift(ops):
    config = ModelConfig(**VARIANTS["c"])
    model = random_model(config, ops)
    full = LightningDiT(config.model_copy(update={"wo_shift": False}), ops)
    state, D = model.state_dict(), config.hidden_size
    for key, value in state.items():
        if key.startswith("blocks") and "adaLN" in key:
            scale_a, gate_a, scale_m, gate_m = value.split(D)
            zero = torch.zeros_like(scale_a)
            state[key] = torch.cat([zero, scale_a, gate_a, zero, scale_m, gate_m])
    full.load_state_dict(state)
    close("wo_shift", model(*inputs(config)), full(*inputs(config)), atol=1e-6)


@pytest.mark.parametrize("patch", [1, 2])
def test_learned_sigma_is_dropped(patch, ops):
    """Output channels lie innermost, so each patch position keeps the first half of its own channels."""
    config = ModelConfig(**VARIANTS["f"] | dict(patch_size=patch))
    model = random_model(config, ops)
    half = LightningDiT(config.model_copy(update={"learn_sigma": False}), ops)
    state = model.state_dict()
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state[key].unflatten(0, (patch * patch, 2, config.in_channels))
        state[key] = rows[:, 0].flatten(0, 1)
    half.load_state_dict(state)
    close("learn_sigma", model(*inputs(config)), half(*inputs(config)), atol=1e-6)


def test_layer_norm_of_queries_and_keys(ops):
    """Against torch's own LayerNorm applied to q and k of a single block (variant g: QK LayerNorm, RoPE)."""
    config = ModelConfig(**VARIANTS["g"])
    attn = random_model(config, ops).blocks[0].attn.double()
    cos, sin = rope_tables(config.head_dim, config.grid_size)
    x = torch.randn(2, config.num_tokens, config.hidden_size, dtype=torch.float64)
    q, k, v = attn.qkv(x).unflatten(-1, (3, config.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q = F.layer_norm(q, (config.head_dim,), attn.q_norm.weight, attn.q_norm.bias, 1e-5)
    k = F.layer_norm(k, (config.head_dim,), attn.k_norm.weight, attn.k_norm.bias, 1e-5)

    def rotate(z):
        pairs = torch.view_as_complex(z.unflatten(-1, (-1, 2)).contiguous())
        angle = torch.complex(cos[:, ::2].double(), sin[:, ::2].double())
        return torch.view_as_real(pairs * angle).flatten(-2)

    want = ((rotate(q) @ rotate(k).transpose(-1, -2)) / config.head_dim**0.5).softmax(-1) @ v
    want = F.linear(want.transpose(1, 2).flatten(2), attn.proj.weight)
    close("QK LayerNorm", attn(x, cos.double(), sin.double()), want, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_stay_float32(dtype, ops):
    model = build("a", ops)
    before = model.pos_embed.clone(), model.feat_rope.freqs_cos.clone()
    model.to(dtype)
    assert model.blocks[0].attn.qkv.weight.dtype == dtype
    assert torch.equal(model.pos_embed, before[0]) and torch.equal(model.feat_rope.freqs_cos, before[1])
    assert isinstance(model.pos_embed, torch.nn.Parameter) and not model.pos_embed.requires_grad
    assert model.double().pos_embed.dtype == torch.float64


def test_near_times_differ_in_bfloat16(ops):
    """Two times that bfloat16 cannot tell apart still reach the blocks as two, in float32."""
    model, seen = build("a", ops, torch.bfloat16), []
    model.t_embedder.register_forward_hook(lambda module, args, out: seen.extend(out))
    t = torch.tensor([0.5, 0.5005])
    assert t.bfloat16()[0] == t.bfloat16()[1]
    x, _, y = inputs(model.config, batch=2)
    model(x, t, y)
    assert seen[0].dtype == torch.float32 and not torch.equal(*seen)


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
def test_residual_stream_dtype(residual, ops):
    config = ModelConfig(**VARIANTS["a"])
    model = LightningDiT(config, ops, residual).bfloat16()
    seen = []
    model.blocks[0].register_forward_hook(lambda m, a, out: seen.extend((out[0], *out[1])))
    model(*inputs(config))
    assert [z.dtype for z in seen] == [residual, *[torch.bfloat16] * 3]
    assert LightningDiT(config, ops, torch.bfloat16)(*inputs(config)).dtype == torch.float32


def test_forward_draws_nothing(ops):
    model, config = build("a", ops).train(), ModelConfig(**VARIANTS["a"])
    before = torch.get_rng_state()
    model(*inputs(config))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("variant", ["a", "b", "d"])
def test_compiles_to_one_graph(variant, ops):
    model = build(variant, ops).train()
    args = inputs(model.config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want, got = model(*args), compiled(*args)
    close("compiled", got, want.detach(), atol=1e-5)
    want.square().sum().backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    got.square().sum().backward()
    close_grads("compiled", {k: p.grad for k, p in model.named_parameters()}, grads)


def test_wrong_shapes_are_named(ops):
    model = build("a", ops)
    x, t, y = inputs(model.config)
    with pytest.raises(ValueError, match=r"x is \(3, 4, 4, 5\).*\[B, 4, 4, 4\]"):
        model(F.pad(x, (0, 1)), t, y)
    with pytest.raises(ValueError, match=r"t is \(2,\)"):
        model(x, t[:2], y)
    with pytest.raises(ValueError, match=r"y is \(3, 1\)"):
        model(x, t, y[:, None])
    with pytest.raises(ValueError, match="even batch"):
        model.forward_with_cfg(x, t, y, 4.0)
    with pytest.raises(ValueError, match="cfg_interval_start"):
        model.forward_with_cfg(x[:2], t[:2], y[:2], 4.0, cfg_interval=True)
