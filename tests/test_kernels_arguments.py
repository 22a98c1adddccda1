"""Bad arguments are refused by name, in every op, before any backend sees them; costs agree with the arithmetic."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import kernels
from kernels.registry import FLOATS
from kernels.testing.cases import nbytes
from kernels.testing.tolerance import copied

OPS = kernels.select("reference")


def arguments(name: str, **changes) -> dict:
    """Good arguments of an op, of odd sizes, with changes."""
    case = next(case for case in kernels.OPS[name].cases if case.id in ("odd", "first_step"))
    return case.inputs(torch.float32) | changes


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


STACKED = "stacked_linear"
ADALN, GATED, GRADIENTS = "adaln_rms_norm", "gated_residual_adaln_rms_norm", "weight_gradients"
LINEAR, GRAD = "linear_swiglu", "swiglu_linear_grad"
MODULATED = [
    ({"x": zeros(3, 37)}, "shape of x is (3, 37)", "[B, N, D]"),
    ({"x": zeros(3, 0, 37)}, "shape of x is (3, 0, 37)", "no dimension 0"),
    ({"weight": zeros(36)}, "shape of weight is (36,)", "(37,) (D)"),
    ({"scale": zeros(3, 1, 37)}, "shape of scale is (3, 1, 37)", "(3, 37) (B, D)"),
    ({"shift": zeros(2, 37)}, "shape of shift is (2, 37)", "(3, 37) (B, D)"),
    ({"weight": zeros(37, dtype=torch.int64)}, "dtype of weight is torch.int64", "torch.bfloat16"),
    ({"shift": zeros(3, 37, dtype=torch.bool)}, "dtype of shift is torch.bool", "torch.float16"),
    ({"scale": zeros(3, 37, device="meta")}, "device of scale is meta", "cpu"),
    ({"eps": 0.0}, "eps is 0.0", "positive"),
    ({"eps": float("nan")}, "eps is nan", "positive"),
]
BAD = [
    *((ADALN, *row) for row in MODULATED),
    (ADALN, {"x": zeros(3, 5, 37, dtype=torch.int32)}, "dtype of x is torch.int32", "torch.float32"),
    (ADALN, {"out_dtype": torch.int8}, "out_dtype is torch.int8", "torch.bfloat16"),
    *((GATED, *row) for row in MODULATED if "x" not in row[0]),
    (GATED, {"branch": zeros(3, 5, 36)}, "shape of branch is (3, 5, 36)", "(3, 5, 37)"),
    (GATED, {"gate": zeros(3, 5, 37)}, "shape of gate is (3, 5, 37)", "(3, 37)"),
    (GATED, {"x": zeros(3, 5, 37, dtype=torch.bfloat16)}, "dtype of x is torch.bfloat16", "torch.float32"),
    (GATED, {"branch": zeros(3, 5, 37, dtype=torch.int32)}, "dtype of branch is torch.int32", "torch.float32"),
    (GATED, {"branch_bias": zeros(3, 37)}, "shape of branch_bias is (3, 37)", "(37,) (D)"),
    (GATED, {"branch_bias": zeros(37, dtype=torch.int32)}, "dtype of branch_bias is torch.int32", "torch.bfloat16"),
    (GATED, {"branch_bias": zeros(37, device="meta")}, "device of branch_bias is meta", "cpu"),
    ("swiglu", {"gate_up": zeros(2, 5)}, "shape of gate_up is (2, 5)", "2H"),
    ("swiglu", {"gate_up": zeros(0, 4)}, "shape of gate_up is (0, 4)", "no dimension 0"),
    ("swiglu", {"gate_up": zeros()}, "shape of gate_up is ()", "2H"),
    ("swiglu", {"gate_up": zeros(4, dtype=torch.int32)}, "dtype of gate_up is torch.int32", "torch.float32"),
    ("swiglu", {"bias": zeros(37)}, "shape of bias is (37,)", "(74,) (2H)"),
    ("swiglu", {"bias": zeros(1, 74)}, "shape of bias is (1, 74)", "(74,) (2H)"),
    ("swiglu", {"bias": zeros(74, dtype=torch.int32)}, "dtype of bias is torch.int32", "torch.float32"),
    ("swiglu", {"bias": zeros(74, device="meta")}, "device of bias is meta", "cpu"),
    ("rope_attention", {"qkv": zeros(2, 5, 2, 3, 10)}, "shape of qkv is (2, 5, 2, 3, 10)", "[B, N, 3, heads, d]"),
    ("rope_attention", {"qkv": zeros(2, 5, 9, 10)}, "shape of qkv is (2, 5, 9, 10)", "[B, N, 3, heads, d]"),
    ("rope_attention", {"qkv": zeros(2, 5, 3, 3, 7)}, "d, the last dimension of qkv, is 7", "even"),
    ("rope_attention", {"cos": None}, "cos is None", "sin is one"),
    ("rope_attention", {"k_weight": None}, "k_weight is None", "q_weight is one"),
    ("rope_attention", {"cos": zeros(4, 10)}, "shape of cos is (4, 10)", "(5, 10) (N, d)"),
    ("rope_attention", {"sin": zeros(5, 5)}, "shape of sin is (5, 5)", "(5, 10) (N, d)"),
    ("rope_attention", {"sin": zeros(5, 10, dtype=torch.float16)}, "dtype of sin is torch.float16", "torch.float32"),
    ("rope_attention", {"q_weight": zeros(3, 10)}, "shape of q_weight is (3, 10)", "(10,) (d)"),
    ("rope_attention", {"bias": zeros(30)}, "shape of bias is (30,)", "(90,) (3·heads·d)"),
    ("rope_attention", {"bias": zeros(90).int()}, "dtype of bias is torch.int32", "torch.float32"),
    ("rope_attention", {"cos": zeros(5, 10, device="meta")}, "device of cos is meta", "cpu"),
    ("rope_attention", {"eps": -1e-6}, "eps is -1e-06", "positive"),
    ("vf_loss", {"z": zeros(3, 7, 15)}, "shape of z is (3, 7, 15)", "[B, C, h, w]"),
    ("vf_loss", {"f": zeros(3, 8, 3, 5)}, "shape of f is (3, 8, 3, 5)", "(3, 7, 3, 5)"),
    ("vf_loss", {"f": zeros(3, 7, 3, 5, dtype=torch.uint8)}, "dtype of f is torch.uint8", "torch.float32"),
    ("vf_loss", {"distmat_margin": -0.1}, "distmat_margin is -0.1", "not negative"),
    ("vf_loss", {"cos_margin": float("nan")}, "cos_margin is nan", "not negative"),
    ("group_norm_silu", {"groups": 4}, "groups is 4", "a divisor of C = 15"),
    ("group_norm_silu", {"groups": 0}, "groups is 0", "a divisor of C = 15"),
    ("group_norm_silu", {"x": zeros(15, 3, 5)}, "shape of x is (15, 3, 5)", "[B, C, H, W]"),
    ("group_norm_silu", {"bias": zeros(1)}, "shape of bias is (1,)", "(15,) (C)"),
    ("group_norm_silu", {"eps": 0}, "eps is 0", "positive"),
    ("adamw_ema_", {"param": zeros(37, dtype=torch.bfloat16)}, "dtype of param is torch.bfloat16", "torch.float32"),
    ("adamw_ema_", {"param": zeros(1, 37)}, "shape of param is (1, 37)", "[n]"),
    ("adamw_ema_", {"grad": zeros(37, dtype=torch.float16)}, "dtype of grad is torch.float16", "torch.bfloat16"),
    ("adamw_ema_", {"grad": zeros(1)}, "shape of grad is (1,)", "(37,) (n)"),
    ("adamw_ema_", {"ema": zeros(36)}, "shape of ema is (36,)", "(37,) (n)"),
    ("adamw_ema_", {"exp_avg": zeros(37, dtype=torch.float64)}, "dtype of exp_avg is torch.float64", "torch.float32"),
    ("adamw_ema_", {"bf16_param": zeros(37)}, "dtype of bf16_param is torch.float32", "torch.bfloat16"),
    ("adamw_ema_", {"step": 3}, "step is 3", "a tensor of one element"),
    ("adamw_ema_", {"lr": zeros(2)}, "lr is tensor([0., 0.])", "a tensor of one element"),
    ("adamw_ema_", {"skip": zeros(device="meta")}, "device of skip is meta", "cpu"),
    ("adamw_ema_", {"betas": (0.9, 1.0)}, "betas is (0.9, 1.0)", "[0, 1)"),
    ("adamw_ema_", {"betas": (0.9,)}, "betas is (0.9,)", "two numbers"),
    ("adamw_ema_", {"eps": -1.0}, "eps is -1.0", "not negative"),
    ("adamw_ema_", {"weight_decay": -0.1}, "weight_decay is -0.1", "not negative"),
    (LINEAR, {"x": zeros(7)}, "shape of x is (7,)", "[..., D]"),
    (LINEAR, {"x": zeros(3, 0, 7)}, "shape of x is (3, 0, 7)", "no dimension 0"),
    (LINEAR, {"x": zeros(3, 5, 7, dtype=torch.int32)}, "dtype of x is torch.int32", "torch.float32"),
    (LINEAR, {"weight": zeros(22, 6)}, "shape of weight is (22, 6)", "(2H, 7)"),
    (LINEAR, {"weight": zeros(21, 7)}, "shape of weight is (21, 7)", "2H"),
    (LINEAR, {"weight": zeros(22, 7).half()}, "dtype of weight is torch.float16", "torch.float32"),
    (LINEAR, {"weight": zeros(22, 7, device="meta")}, "device of weight is meta", "cpu"),
    (LINEAR, {"bias": zeros(11)}, "shape of bias is (11,)", "(22,) (2H)"),
    (GRAD, {"d_output": zeros(7)}, "shape of d_output is (7,)", "[..., D]"),
    (GRAD, {"d_output": zeros(3, 5, 7).long()}, "dtype of d_output is torch.int64", "torch.float32"),
    (GRAD, {"weight": zeros(6, 11)}, "shape of weight is (6, 11)", "(7, H)"),
    (GRAD, {"weight": zeros(7, 11).double()}, "dtype of weight is torch.float64", "torch.float32"),
    (GRAD, {"gate_up": zeros(3, 4, 22)}, "shape of gate_up is (3, 4, 22)", "(3, 5, 22) (..., 2H)"),
    (GRAD, {"gate_up": zeros(3, 5, 22).half()}, "dtype of gate_up is torch.float16", "torch.float32"),
    (GRAD, {"bias": zeros(1, 22)}, "shape of bias is (1, 22)", "(22,) (2H)"),
    (GRAD, {"bias": zeros(22, device="meta")}, "device of bias is meta", "cpu"),
    (GRADIENTS, {"inputs": [zeros(37, 7)]}, "d_outputs and inputs is 2 and 1 tensors", "as many of one"),
    (GRADIENTS, {"d_outputs": [], "inputs": []}, "d_outputs and inputs is 0 and 0 tensors", "at least one"),
    (GRADIENTS, {"d_outputs": [zeros(37, 5), zeros(3)]}, "shape of d_outputs[1] is (3,)", "[..., width]"),
    (GRADIENTS, {"d_outputs": [zeros(37, 5), zeros(37, 0)]}, "shape of d_outputs[1] is (37, 0)", "no dimension 0"),
    (GRADIENTS, {"d_outputs": [zeros(37, 5), zeros(36, 3)]}, "shape of d_outputs[1] is (36, 3)", "37 tokens"),
    (GRADIENTS, {"inputs": [zeros(37, 7), zeros(2, 37, 9)]}, "shape of inputs[1] is (2, 37, 9)", "37 tokens"),
    (GRADIENTS, {"inputs": [zeros(37, 7), zeros(37, 9).half()]}, "dtype of inputs[1] is torch.float16", "float32"),
    (GRADIENTS, {"inputs": [zeros(37, 7), zeros(37, 9, device="meta")]}, "device of inputs[1] is meta", "cpu"),
    (STACKED, {"x": zeros(7)}, "shape of x is (7,)", "[B, D]"),
    (STACKED, {"x": zeros(5, 7).int()}, "dtype of x is torch.int32", "torch.float32"),
    (STACKED, {"biases": [zeros(11)]}, "weights and biases is 3 and 1 tensors", "as many of one"),
    (STACKED, {"weights": [zeros(11, 7), zeros(11, 6), zeros(11, 7)]}, "shape of weights[1] is (11, 6)", "(11, 7)"),
    (STACKED, {"weights": [zeros(0, 7)] * 3}, "shape of weights[0] is (0, 7)", "no dimension 0"),
    (STACKED, {"biases": [zeros(11), zeros(11), zeros(1)]}, "shape of biases[2] is (1,)", "(11,) (K)"),
    (STACKED, {"biases": [zeros(11).half()] * 3}, "dtype of biases[0] is torch.float16", "torch.float32"),
    (STACKED, {"weights": [zeros(11, 7, device="meta")] * 3}, "device of weights[0] is meta", "cpu"),
    ("adamw_ema_", {"ema_decay": 1.5}, "ema_decay is 1.5", "[0, 1]"),
]


@pytest.mark.parametrize(("name", "changes", "got", "allowed"), BAD)
def test_a_bad_argument_is_named_with_its_value_and_what_is_allowed(name, changes, got, allowed):
    inputs = arguments(name)
    getattr(OPS, name)(**copied(inputs))
    with pytest.raises(ValueError) as error:
        getattr(OPS, name)(**inputs | changes)
    message = str(error.value)
    assert message.startswith(f"{name}: {got}; allowed: ") and allowed in message, message


@pytest.mark.parametrize("name", kernels.OPS)
def test_dtypes_of_an_op_are_those_its_check_lets_through(name):
    op, taken = kernels.OPS[name], set()
    case = next(case for case in op.cases if case.id in ("odd", "first_step"))
    for dtype in FLOATS | {torch.int32}:
        try:
            op.check(**case.inputs(dtype) if dtype in FLOATS else case.inputs(torch.float32) | integers(case))
            taken.add(dtype)
        except ValueError:
            pass
    assert taken == op.dtypes


def integers(case) -> dict:
    """The case's first argument as integers."""
    name, value = next(iter(case.inputs(torch.float32).items()))
    return {name: tree_map(torch.Tensor.int, value)}


def production(name: str, case_id: str) -> tuple[kernels.Op, dict]:
    """The op, and a production case's arguments in bfloat16 with no memory behind them."""
    op = kernels.OPS[name]
    case = next(case for case in op.cases if case.id == case_id)
    assert case.production
    return op, case.inputs(torch.bfloat16, "meta")


@pytest.mark.parametrize(
    ("name", "case_id", "unit", "forward", "backward"),
    [  # elements moved for each token, in units of the width or of the hidden width: two of them read, one written, …
        (ADALN, "XL", 1152, 2, 3),
        (GATED, "XL", 1152, 4, 6),
        ("swiglu", "XL", 3072, 3, 5),
        ("rope_attention", "XL", 1152, 4, 8),
    ],
)
def test_bytes_for_a_token(name, case_id, unit, forward, backward):
    op, inputs = production(name, case_id)
    cost, tokens = op.cost(**inputs), 128 * 256
    # The parts that do not grow with the tokens, such as the modulation, add less than 5 %.
    assert cost.forward_bytes / (tokens * unit * 2) == pytest.approx(forward, rel=0.05, abs=0)
    assert cost.backward_bytes / (tokens * unit * 2) == pytest.approx(backward, rel=0.05, abs=0)
    assert cost.forward_bytes >= tokens * unit * 2 * forward


def test_attention_products_of_the_largest_model():
    """3.6 % of the 237.25 GFLOP of an image, in 28 layers; five products backward for two forward."""
    op, inputs = production("rope_attention", "XL")
    cost = op.cost(**inputs)
    assert cost.forward_flops == 128 * 4 * 256**2 * 1152
    assert 28 * cost.forward_flops / 128 / 237.25e9 == pytest.approx(0.036, abs=5e-4)
    assert cost.backward_flops == 2.5 * cost.forward_flops


@pytest.mark.parametrize(
    ("case_id", "grad", "bytes_each"),
    [("XL_eighth", torch.float32, 38), ("XL_eighth", torch.bfloat16, 36), ("XL_eighth_no_copy", torch.float32, 36)],
)
def test_optimizer_bytes_for_a_parameter(case_id, grad, bytes_each):
    op = kernels.OPS["adamw_ema_"]
    case = next(case for case in op.cases if case.id == case_id)
    inputs = case.inputs(grad, "meta")
    assert op.cost(**inputs).forward_bytes == bytes_each * inputs["param"].numel()


def test_weight_gradients_of_the_largest_model():
    """As many products as forward, where they are these parts of the 237.25 GFLOP of an image: qkv, proj, w12, w3."""
    op, inputs = production("weight_gradients", "XL")
    cost = op.cost(**inputs)
    assert 28 * cost.forward_flops / 128 / 237.25e9 == pytest.approx(0.241 + 0.080 + 0.428 + 0.214, abs=1e-3)
    channels = 3456 + 1152 + 6144 + 1152 + 1152 + 1152 + 1152 + 3072
    weights = 1152 * (3456 + 1152 + 6144 + 3072)
    assert cost.forward_bytes == 2 * (128 * 256 * channels + weights)


def test_swiglu_with_its_product_moves_two_hidden_tensors_less():
    """PERF's 3F forward and 5F backward beside the products' own 2F and F: folded, 3F, and 4F without either's D."""
    tokens, F = 128 * 256, 2 * 3072
    for name, width in (("linear_swiglu", 3), ("swiglu_linear_grad", 4)):
        op, inputs = production(name, "XL")
        rest = nbytes(*(value for key, value in inputs.items() if key in ("x", "d_output", "weight", "bias")))
        assert op.cost(**inputs).forward_bytes == pytest.approx(tokens * width * F + rest, rel=1e-4)
        assert op.cost(**inputs).forward_flops == 2 * tokens * 1152 * 3072 * (2 if name == "linear_swiglu" else 1)


def test_vf_loss_and_group_norm_costs():
    op, inputs = production("vf_loss", "dinov2_large")
    cost = op.cost(**inputs)
    assert cost.forward_flops == 2 * (2 * 32 * 256**2 * 1024), "two matrices of cosines"
    assert cost.forward_bytes == nbytes(inputs["z"], inputs["f"])
    op, inputs = production("group_norm_silu", "f16_32")
    assert op.cost(**inputs).forward_bytes == 2 * nbytes(inputs["x"]) + 2 * 256 * 2


@pytest.mark.parametrize("name", kernels.OPS)
def test_every_case_passes_the_check_and_has_a_cost(name):
    op = kernels.OPS[name]
    for case in op.cases:
        for dtype in op.dtypes & case.dtypes:
            inputs = case.inputs(dtype, "meta")
            op.check(**inputs)
            cost = op.cost(**inputs)
            assert cost.forward_bytes > 0 and (cost.backward_bytes > 0) == bool(op.differentiable)


def test_cases_are_the_same_numbers_each_time():
    for op in kernels.OPS.values():
        case = op.cases[1]
        first, second = case.inputs(torch.float32), case.inputs(torch.float32)
        for a, b in zip(tree_leaves(first), tree_leaves(second), strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
