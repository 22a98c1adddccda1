"""The references against truths of other origin: torch's own operators, recorded vectors, complex numbers, formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

import kernels
from kernels.testing.checks import as_float64, outputs, reference
from tests.golden import G, close

OPS = kernels.select("reference")
MODULES = G("01_dit_modules")
LOSSES = G("05_vae_losses")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, mean: float = 0.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) + mean


def modulation(samples: int, width: int) -> list[torch.Tensor]:
    return [normal(samples, width, seed=seed) for seed in (11, 12, 13)]


# All ops


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "op", [op for op in kernels.OPS.values() if op.expectations.rounded_once], ids=lambda op: op.name
)
def test_low_precision_is_float32_arithmetic_rounded_once(op, dtype):
    """Bit for bit, and in the dtypes that the docstring promises."""
    function = reference(op)
    for case in op.cases:
        if case.production or dtype not in op.dtypes & case.dtypes:
            continue
        inputs = case.inputs(dtype)
        if inputs.get("x") is not None and "branch" in inputs and inputs["x"].dtype == dtype:
            continue  # two roundings, one after the other: tested below
        inputs_fp32 = tree_map(float32, inputs)
        got, want = outputs(op, function, inputs), outputs(op, function, inputs_fp32)
        for name in got:
            assert got[name].dtype == result_dtype(op, inputs, name, dtype)
            assert torch.equal(got[name], want[name].to(got[name].dtype)), f"{case.id}: {name}"


def float32(value):
    is_floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.float() if is_floating else torch.float32 if isinstance(value, torch.dtype) else value


def result_dtype(op: kernels.Op, inputs: dict, name: str, dtype: torch.dtype) -> torch.dtype:
    """That of an argument changed in place, of the residual stream, as asked for, or that of the main input."""
    if op.expectations.float32_results:
        return torch.float32
    if name in inputs:
        return inputs[name].dtype
    if "branch" in inputs and name in (("result 0", "result 1") if op.forward_mode_of else ("result 0",)):
        return inputs["x"].dtype
    return inputs.get("out_dtype") or dtype


# adaln_rms_norm, gated_residual_adaln_rms_norm


def test_adaln_is_torch_rms_norm_then_modulation():
    x, weight, (_, shift, scale) = normal(3, 5, 12), normal(12, seed=1), modulation(3, 12)
    x[:, ::2] *= 1e-3
    want = F.rms_norm(x, (12,), weight, 1e-6)
    close("no shift", OPS.adaln_rms_norm(x, weight, None, scale, 1e-6), want * (1 + scale[:, None]), atol=1e-13)
    want = torch.stack([want[i] * (1 + scale[i]) + shift[i] for i in range(3)])
    close("shift", OPS.adaln_rms_norm(x, weight, shift, scale, 1e-6), want, atol=1e-13)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_adaln_without_modulation_is_the_recorded_norm(x_dtype):
    x, weight = MODULES["rmsnorm/x"].to(x_dtype), MODULES["rmsnorm/weight"]
    want = MODULES["rmsnorm/out" if x_dtype == torch.float32 else "rmsnorm/out_bf16in"]
    # The recorded bfloat16 run rounds the normed values to bfloat16 before it multiplies by the gain.
    tolerance = {"relmax": 1e-6} if x_dtype == torch.float32 else {"rtol": 2**-8}
    got = OPS.adaln_rms_norm(x, weight, None, torch.zeros(3, 48), 1e-6, out_dtype=torch.float32)
    assert got.dtype == torch.float32
    close("rms norm", got, want, **{"atol": 0.0, **tolerance})


def test_adaln_all_in_bfloat16_is_the_recorded_norm_but_for_its_extra_roundings():
    """The recorded run rounds the normed values and their product with the gain; the op rounds once."""
    x, weight = (MODULES[f"rmsnorm/{name}"].bfloat16() for name in ("x", "weight"))
    got = OPS.adaln_rms_norm(x, weight, None, torch.zeros(3, 48), 1e-6)
    assert got.dtype == torch.bfloat16
    close("rms norm", got, MODULES["rmsnorm/out_allbf16"], atol=0.0, rtol=2**-7)


def test_statistics_are_float32_in_half_precision():
    x = torch.full((1, 1, 4096), 300.0, dtype=torch.float16)  # the squares overflow float16
    x[..., 0] = 0
    y = OPS.adaln_rms_norm(x, torch.ones(4096), None, torch.zeros(1, 4096), 1e-6)
    close("mean of squares", y[..., 1], torch.full((1, 1), math.sqrt(4096 / 4095)), atol=1e-3)


def test_gated_residual_is_the_sum_then_the_norm():
    x, branch, weight, (gate, shift, scale) = normal(2, 3, 10), normal(2, 3, 10, seed=2), normal(10), modulation(2, 10)
    x_new, y = OPS.gated_residual_adaln_rms_norm(x, branch, gate, weight, shift, scale, 1e-6)
    want = torch.stack([torch.addcmul(x[i], gate[i].expand(3, 10), branch[i]) for i in range(2)])
    close("x'", x_new, want, atol=1e-14)
    close("y", y, F.rms_norm(want, (10,), weight, 1e-6) * (1 + scale[:, None]) + shift[:, None], atol=1e-13)


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_gated_residual_keeps_the_dtype_of_the_stream(stream):
    x, branch = normal(2, 3, 10, dtype=torch.float32).to(stream), normal(2, 3, 10, seed=2).bfloat16()
    gate, shift, scale = (part.bfloat16() for part in modulation(2, 10))
    x_new, y = OPS.gated_residual_adaln_rms_norm(x, branch, gate, torch.ones(10), shift, scale, 1e-6)
    assert (x_new.dtype, y.dtype) == (stream, torch.bfloat16)
    apart = OPS.adaln_rms_norm(x_new, torch.ones(10), shift, scale, 1e-6, out_dtype=torch.bfloat16)
    assert torch.equal(y, apart), "the norm sees x' as it is returned"


def test_a_bias_of_the_branch_is_added_to_every_token_before_the_gate():
    x, branch, bias, (gate, shift, scale) = normal(2, 3, 10), normal(2, 3, 10, seed=2), normal(10), modulation(2, 10)
    bias.requires_grad_()
    got = OPS.gated_residual_adaln_rms_norm(x, branch, gate, normal(10), shift, scale, 1e-6, branch_bias=bias)
    biased = torch.stack([row + bias.detach() for row in branch.flatten(0, 1)]).view_as(branch).requires_grad_()
    want = OPS.gated_residual_adaln_rms_norm(x, biased, gate, normal(10), shift, scale, 1e-6)
    weights = normal(2, 3, 10, seed=3), normal(2, 3, 10, seed=4)
    for results in (got, want):
        sum((result * weight).sum() for result, weight in zip(results, weights, strict=True)).backward()
    for name, result, truth in zip(("x'", "y"), got, want, strict=True):
        close(name, result, truth, atol=0)
    close("gradient", bias.grad, biased.grad.sum(dim=(0, 1)), atol=1e-12)


# swiglu


def test_swiglu_is_silu_of_the_first_half_times_the_second():
    packed = normal(2, 3, 14)
    want = F.silu(packed[..., :7]) * packed[..., 7:]
    close("swiglu", OPS.swiglu(packed), want, atol=1e-15)


def test_swiglu_between_its_projections_is_the_recorded_layer():
    p = MODULES.group("swiglu/param/")
    hidden = OPS.swiglu(F.linear(MODULES["swiglu/x"], p["w12.weight"], p["w12.bias"]))
    close("swiglu layer", F.linear(hidden, p["w3.weight"], p["w3.bias"]), MODULES["swiglu/out"], atol=5e-6)


def test_swiglu_with_a_bias_is_swiglu_of_the_sum_and_its_gradient_the_sum_over_rows():
    packed, bias = normal(2, 3, 14).requires_grad_(), normal(14, seed=1).requires_grad_()
    close("bias", OPS.swiglu(packed, bias=bias), OPS.swiglu(packed + bias), atol=1e-15)
    OPS.swiglu(packed, bias=bias).square().sum().backward()
    close("gradient", bias.grad, packed.grad.sum(dim=(0, 1)), atol=1e-13)
    rounded = OPS.swiglu(packed.bfloat16(), bias=bias)  # the sum is not rounded to bfloat16 in between
    assert torch.equal(rounded, OPS.swiglu(packed.bfloat16().float() + bias.float()).bfloat16())


def test_swiglu_of_large_numbers():
    got = OPS.swiglu(torch.tensor([-1000.0, 1000.0, 2.0, 3.0]))
    assert torch.equal(got, torch.tensor([0.0, 3000.0])) or torch.equal(got, torch.tensor([-0.0, 3000.0]))


# rope_attention


def split(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(qkv.select(2, i).transpose(1, 2) for i in range(3))  # [B, heads, N, d]


def merged(out: torch.Tensor) -> torch.Tensor:
    return out.transpose(1, 2).flatten(2)


def rotated(u: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Pairs of neighbours as complex numbers, times e^(i·angle), `angle` `[N, d / 2]`."""
    numbers = torch.view_as_complex(u.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(numbers * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


@pytest.mark.parametrize("width", [2, 10, 64, 72])
@pytest.mark.parametrize("norm", [False, True])
def test_attention_is_torch_attention_of_complex_rotations(width, norm):
    qkv, angle = normal(2, 6, 3, 3, width), normal(6, width // 2, seed=1)
    qkv[:, ::2, :2] *= 1e-3 if norm else 1  # rows that the eps decides
    weights = [normal(width, seed=seed, mean=1.0) for seed in (2, 3)] if norm else [None, None]
    q, k, v = split(qkv)
    if norm:
        q, k = (F.rms_norm(u, (width,), weight, 1e-6) for u, weight in zip((q, k), weights, strict=True))
    want = merged(F.scaled_dot_product_attention(rotated(q, angle), rotated(k, angle), v))
    cos, sin = (table.repeat_interleave(2, dim=1) for table in (angle.cos(), angle.sin()))
    close("attention", OPS.rope_attention(qkv, cos, sin, *weights), want, atol=1e-13)


def test_attention_without_tables_or_weights_is_torch_attention():
    qkv = normal(2, 5, 3, 2, 7)
    want = merged(F.scaled_dot_product_attention(*split(qkv)))
    close("attention", OPS.rope_attention(qkv, None, None), want, atol=1e-13)
    peaked = torch.cat((qkv[:, :, :2] * 40, qkv[:, :, 2:]), dim=2)  # exp of these scores overflows
    want = merged(F.scaled_dot_product_attention(*split(peaked)))
    close("peaked attention", OPS.rope_attention(peaked, None, None), want, atol=1e-12)


def test_attention_adds_its_bias_before_anything_else():
    qkv, bias, angle = normal(2, 5, 3, 3, 8).requires_grad_(), normal(72, seed=1).requires_grad_(), normal(5, 4, seed=2)
    weights = [normal(8, seed=seed, mean=1.0) for seed in (3, 4)]
    tables = [table.repeat_interleave(2, dim=1) for table in (angle.cos(), angle.sin())]
    got = OPS.rope_attention(qkv, *tables, *weights, bias=bias)
    packed = (qkv.detach().flatten(2) + bias.detach()).view(qkv.shape).requires_grad_()  # as the projection would
    want = OPS.rope_attention(packed, *tables, *weights)
    close("attention", got, want, atol=1e-13)
    for out in (got, want):
        (out * normal(*out.shape, seed=5)).sum().backward()
    close("gradient of qkv", qkv.grad, packed.grad, atol=1e-13)
    close("gradient of the bias", bias.grad, packed.grad.sum(dim=(0, 1)).flatten(), atol=1e-13)


def test_recorded_rotation_gives_the_recorded_attention():
    q, rotated = (MODULES[key].transpose(1, 2) for key in ("rope/q", "rope/q_rot"))  # [B, N, heads, d]
    k, v = normal(*q.shape, seed=1, dtype=torch.float32), normal(*q.shape, seed=2, dtype=torch.float32)
    cos, sin = MODULES["rope/hd24_n4/freqs_cos"], MODULES["rope/hd24_n4/freqs_sin"]
    # The score of a rotated query with a key unit vector in the first plane reads the rotation off one coordinate at a
    # time; with the keys rotated back beforehand only the query is rotated.
    back = k.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * torch.tensor([1.0, -1.0]).repeat(12)
    keys_before = k * cos[:, None] + back * sin[:, None]
    want = F.scaled_dot_product_attention(*(u.transpose(1, 2) for u in (rotated, k, v)))
    close("attention", OPS.rope_attention(torch.stack((q, keys_before, v), dim=2), cos, sin), merged(want), atol=5e-6)


def test_attention_depends_on_relative_positions_alone():
    qkv, rate = normal(1, 7, 3, 2, 8), normal(4, seed=1)
    results = []
    for start in (0.0, 5.0):
        angle = ((torch.arange(7) + start)[:, None] * rate).repeat_interleave(2, dim=1)
        results.append(OPS.rope_attention(qkv, angle.cos(), angle.sin()))
    close("shifted positions", results[0], results[1], atol=1e-12)


# vf_loss


@pytest.mark.parametrize("margins", [(0.0, 0.0), (0.25, 0.5)])
@pytest.mark.parametrize(("dtype", "suffix", "relative"), [(torch.float32, "", 1e-5), (torch.float64, "_f64", 1e-10)])
@pytest.mark.parametrize(
    ("record", "weights"),
    [("vf_loss_1", (1, 0)), ("vf_loss_2", (0, 1)), ("vf_loss", (1, 1)), ("vf_loss_w0.7_1.3", (0.7, 1.3))],
)
def test_vf_terms_and_gradients_are_the_recorded_ones(margins, dtype, suffix, relative, record, weights):
    z, f = (LOSSES[f"vf/{name}"].clone().to(dtype).requires_grad_() for name in ("z", "aux"))
    key = f"vf/distmat{margins[0]}_cos{margins[1]}/{record}"
    distmat, cos = OPS.vf_loss(z, f, *margins)
    assert distmat.dtype == cos.dtype == dtype
    total = weights[0] * distmat + weights[1] * cos
    total.backward()
    close("value", total, LOSSES[f"{key}/value{suffix}"], atol=0, rtol=relative)
    close("dz", z.grad, LOSSES[f"{key}/grad_z{suffix}"], relmax=relative)
    if f"{key}/grad_aux{suffix}" in LOSSES:
        close("df", f.grad, LOSSES[f"{key}/grad_aux{suffix}"], relmax=relative)


def test_vf_loss_by_loops_over_vectors():
    z, f, (m2, m1) = normal(2, 4, 1, 3), normal(2, 4, 1, 3, seed=1), (0.1, 0.2)

    def cosine(a, b):
        a, b = a.tolist(), b.tolist()
        return sum(p * q for p, q in zip(a, b, strict=True)) / math.dist(a, [0] * 4) / math.dist(b, [0] * 4)

    pairs, points = [], []
    for n in range(2):
        us, vs = ([t[n, :, 0, i] for i in range(3)] for t in (z, f))
        pairs += [max(0, abs(cosine(us[i], us[j]) - cosine(vs[i], vs[j])) - m2) for i in range(3) for j in range(3)]
        points += [max(0, 1 - m1 - cosine(u, v)) for u, v in zip(us, vs, strict=True)]
    distmat, cos = OPS.vf_loss(z, f, m2, m1)
    assert float(distmat) == pytest.approx(sum(pairs) / 18, abs=1e-14)
    assert float(cos) == pytest.approx(sum(points) / 6, abs=1e-14)


def test_vf_cases_keep_away_from_kinks():
    """Where a relu or an absolute value has a kink the gradient jumps, and two right results differ."""
    for case in kernels.OPS["vf_loss"].cases:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            if case.production or dtype not in case.dtypes:
                continue
            inputs = as_float64(case.inputs(dtype))
            z, f = (F.normalize(inputs[name].flatten(2), dim=1) for name in ("z", "f"))
            difference = (z.mT @ z - f.mT @ f).abs()
            apart = ~torch.eye(difference.shape[-1], dtype=torch.bool)  # a vector's cosine with itself has no slope
            # The kink of the absolute value, at 0, lies where the relu has no slope, unless the margin is 0 too.
            assert ((difference - inputs["distmat_margin"]).abs() > 1e-6)[:, apart].all(), case.id
            assert (((z * f).sum(dim=1) - 1 + inputs["cos_margin"]).abs() > 1e-6).all(), case.id


def test_vf_norm_floors():
    """A norm of 1e-10 is above the floor of the first term, and is scaled by 1e8 in the second."""
    z, f = normal(1, 5, 1, 2), normal(1, 5, 1, 2, seed=1)
    full, tiny = OPS.vf_loss(z, f, 0.0, 0.0), OPS.vf_loss(z / z.norm(dim=1, keepdim=True) * 1e-10, f, 0.0, 0.0)
    close("distmat", tiny[0], full[0], atol=1e-12)
    cosine = F.cosine_similarity(z, f, dim=1)
    close("cos", tiny[1], (1 - cosine / 100).mean(), atol=1e-12)
    zero = OPS.vf_loss(torch.zeros_like(z), f, 0.0, 0.0)
    close("zero vectors", zero[1], torch.tensor(1.0), atol=0)


def test_vf_loss_of_low_precision_latents_is_float32():
    z, f = normal(2, 6, 2, 2, dtype=torch.float32), normal(2, 6, 2, 2, seed=1, dtype=torch.float32)
    got = OPS.vf_loss(z.bfloat16(), f, 0.1, 0.2)
    want = OPS.vf_loss(z.bfloat16().float(), f, 0.1, 0.2)
    assert got[0].dtype == got[1].dtype == torch.float32
    assert torch.equal(torch.stack(got), torch.stack(want))


# group_norm_silu


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 4e-6)])
def test_group_norm_by_its_formula_in_numpy(last, dtype, tolerance):
    """Also with a mean far larger than the deviation, where E[x²] − E[x]² would lose every digit."""
    x, weight, bias = normal(2, 6, 3, 4, dtype=dtype), normal(6, seed=1, dtype=dtype), normal(6, seed=2, dtype=dtype)
    x[:, 3:] += 30.0
    groups = x.double().numpy().reshape(2, 3, -1)
    normed = (groups - groups.mean(-1, keepdims=True)) / (groups.var(-1, keepdims=True) + 1e-6) ** 0.5
    h = torch.from_numpy(normed).reshape(x.shape) * weight.double().view(6, 1, 1) + bias.double().view(6, 1, 1)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    got = OPS.group_norm_silu(x, weight, bias, 3, 1e-6)
    close("group norm, silu", got, h / (1 + torch.exp(-h)), atol=tolerance)
    assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def test_group_norm_gradients_keep_channels_last():
    x = normal(2, 6, 3, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    OPS.group_norm_silu(x, normal(6), normal(6, seed=1), 2, 1e-6).square().sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


# linear_swiglu, swiglu_linear_grad


def test_linear_swiglu_is_the_two_one_after_the_other():
    x, weight, bias = normal(2, 5, 7), normal(18, 7, seed=1), normal(18, seed=2)
    for vector in (bias, None):
        gate_up, activated = OPS.linear_swiglu(x, weight, bias=vector)
        close("product", gate_up, x @ weight.T, atol=1e-13)
        gate, up = (gate_up if vector is None else gate_up + vector).split(9, dim=-1)
        close("activated", activated, gate * torch.special.expit(gate) * up, atol=1e-13)


def test_swiglu_linear_grad_is_the_gradient_autograd_gives():
    weight, d_output = normal(7, 9), normal(2, 5, 7, seed=1)
    gate_up, bias = normal(2, 5, 18, seed=2).requires_grad_(), normal(18, seed=3).requires_grad_()
    F.linear(OPS.swiglu(gate_up, bias=bias), weight).backward(d_output)
    d_gate_up, d_bias = OPS.swiglu_linear_grad(d_output, weight, gate_up.detach(), bias=bias.detach())
    close("gate_up", d_gate_up, gate_up.grad, atol=1e-13)
    close("bias", d_bias, bias.grad, atol=1e-13)
    gate_up.grad = None
    F.linear(OPS.swiglu(gate_up), weight).backward(d_output)
    found, nothing = OPS.swiglu_linear_grad(d_output, weight, gate_up.detach())
    close("without a bias", found, gate_up.grad, atol=1e-13)
    assert nothing is None


# weight_gradients


def test_weight_gradients_are_those_autograd_gives_linear_layers():
    for case in kernels.OPS["weight_gradients"].cases:
        if case.production:
            continue
        inputs = case.inputs(torch.float64)
        pairs = list(zip(inputs["d_outputs"], inputs["inputs"], strict=True))
        weights = [normal(d.shape[-1], x.shape[-1]).requires_grad_() for d, x in pairs]
        total = sum((F.linear(x, weight) * d).sum() for weight, (d, x) in zip(weights, pairs, strict=True))
        want = torch.autograd.grad(total, weights)
        for number, (a, b) in enumerate(zip(OPS.weight_gradients(**inputs), want, strict=True)):
            close(f"{case.id} {number}", a, b, atol=1e-11)
