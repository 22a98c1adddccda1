"""Mistakes in the ops: their references, Triton kernels (few, as the interpreter is slow), how backends are chosen."""

from tests.mutations import Mistake

ATTENTION = "test_kernels_truth.py::test_attention_is_torch_attention_of_complex_rotations"
ADALN = "test_kernels_truth.py::test_adaln_is_torch_rms_norm_then_modulation"
STEPS = "test_kernels_adamw.py::test_fifty_steps_are_those_of_torch"
RECORDED_VF = "test_kernels_truth.py::test_vf_terms_and_gradients_are_the_recorded_ones"
SWIGLU = "test_kernels_truth.py::test_swiglu_is_silu_of_the_first_half_times_the_second"

MISTAKES = {
    "scale_without_one": Mistake(
        "kernels/adaln_rms_norm/reference.py", "(1 + scale.to(acc_dtype)[:, None])",
        "scale.to(acc_dtype)[:, None]", ADALN,
    ),
    "norm_without_eps": Mistake(
        "kernels/adaln_rms_norm/reference.py", ".mean(dim=-1, keepdim=True) + eps)", ".mean(dim=-1, keepdim=True))",
        ADALN,
    ),
    "statistics_in_half_precision": Mistake(
        "kernels/adaln_rms_norm/reference.py", "rms_normalize(x.to(acc_dtype), eps)", "rms_normalize(x, eps)",
        "test_kernels_truth.py::test_statistics_are_float32_in_half_precision",
    ),
    "bias_behind_the_gate": Mistake(
        "kernels/gated_residual_adaln_rms_norm/reference.py", "gate.to(acc_dtype)[:, None] * added)",
        "gate.to(acc_dtype)[:, None] * branch.to(acc_dtype) + added - branch.to(acc_dtype))",
        "test_kernels_truth.py::test_a_bias_of_the_branch_is_added_to_every_token_before_the_gate",
    ),
    "halves_of_swiglu_exchanged": Mistake(
        "kernels/swiglu/reference.py", "F.silu(gate) * up", "gate * F.silu(up)", SWIGLU,
    ),
    "rotation_the_other_way": Mistake(
        "kernels/rope_attention/reference.py", "torch.stack((-odd, even)", "torch.stack((odd, -even)", ATTENTION,
    ),
    "rotation_of_queries_alone": Mistake(
        "kernels/rope_attention/reference.py",
        "q, k = (apply_rope(t, cos.to(acc_dtype), sin.to(acc_dtype)) for t in (q, k))",
        "q = apply_rope(q, cos.to(acc_dtype), sin.to(acc_dtype))", ATTENTION,
    ),
    "scores_not_scaled": Mistake(
        "kernels/rope_attention/reference.py", "(q * q.shape[-1] ** -0.5) @", "q @",
        "test_kernels_truth.py::test_attention_without_tables_or_weights_is_torch_attention",
    ),
    "eps_of_group_norm": Mistake(
        "kernels/group_norm_silu/reference.py", "weight.to(acc_dtype), bias.to(acc_dtype), eps)",
        "weight.to(acc_dtype), bias.to(acc_dtype))", "test_kernels_truth.py::test_group_norm_by_its_formula_in_numpy",
    ),
    "margin_of_the_cosine_on_the_other_side": Mistake(
        "kernels/vf_loss/reference.py", "(1 - cos_margin - cosine)", "(1 + cos_margin - cosine)", RECORDED_VF,
    ),
    "margin_of_the_matrix_left_out": Mistake(
        "kernels/vf_loss/reference.py", "(difference.abs() - distmat_margin)", "difference.abs()", RECORDED_VF,
    ),
    "floor_of_norms": Mistake(
        "kernels/vf_loss/reference.py", "unit(vectors, 1e-12)", "unit(vectors, 1e-8)",
        "test_kernels_truth.py::test_vf_norm_floors",
    ),
    "bias_correction_of_another_step": Mistake(
        "kernels/adamw_ema_/reference.py", "beta ** step.double()", "beta ** (step.double() + 1)", STEPS,
    ),
    "bias_correction_in_float32": Mistake(
        "kernels/adamw_ema_/reference.py", "beta ** step.double()", "beta ** step.float()",
        "test_kernels_adamw.py::test_first_step_bias_correction_has_all_its_digits",
    ),
    "average_of_the_weights_before": Mistake(
        "kernels/adamw_ema_/reference.py", "(1 - ema_decay) * p\n", "(1 - ema_decay) * param\n", STEPS,
    ),
    "decay_without_the_rate": Mistake(
        "kernels/adamw_ema_/reference.py", "(1 - lr.double() * weight_decay).to(acc_dtype)",
        "(1 - weight_decay)", STEPS,
    ),
    "slope_of_the_activation": Mistake(
        "kernels/swiglu_linear_grad/reference.py", "(1 + gate * (1 - sigmoid))", "(1 + gate * sigmoid)",
        "test_kernels_truth.py::test_swiglu_linear_grad_is_the_gradient_autograd_gives",
    ),
    "triton_tiles_counted_once": Mistake(
        "kernels/vf_loss/triton_kernels.py", "tile_i < tile_j, 2.0, 1.0)", "tile_i < tile_j, 1.0, 1.0)",
        "test_kernels_ops.py::test_forward[vf_loss-triton-tiles-float32-cpu]",
    ),
    "triton_slope_of_swiglu": Mistake(
        "kernels/swiglu/triton_impl.py", "(sigmoid * (1 + gate * (1 - sigmoid)))", "(sigmoid * (1 + gate * sigmoid))",
        "test_models_on_kernels.py::test_lightningdit[a-triton-float32-cpu]",
    ),
    "auto_in_the_wrong_order": Mistake(
        "kernels/registry.py", "        for name in self.order:\n", "        for name in reversed(self.order):\n",
        "test_kernels_registry.py::test_auto_takes_the_first_that_can_serve_and_says_why",
    ),
    "auto_takes_emulators": Mistake(
        "kernels/registry.py", "if not reasons and self.backend(name).emulated:", "if reasons and not self.backends:",
        "test_kernels_registry.py::test_auto_never_picks_an_emulator",
    ),
    "limits_of_a_backend_not_asked": Mistake(
        "kernels/registry.py", "            if not reasons:\n                return run(",
        "            if True:\n                return run(",
        "test_kernels_registry.py::test_a_call_that_a_backend_cannot_serve_raises_its_reasons_after_the_check",
    ),
    "the_reference_for_calls_that_kernels_cannot_serve": Mistake(
        "kernels/registry.py", 'if limited and name != "reference"]', "if limited]",
        "test_kernels_registry.py::"
        "test_auto_gives_calls_that_its_choice_cannot_serve_to_other_kernels_and_never_to_the_reference",
    ),
    "rule_of_twenty_times": Mistake(
        "kernels/testing/tolerance.py", "limit = 2 * eager_error", "limit = 20 * eager_error",
        "test_kernels_tolerance.py::test_twice_the_error_of_the_reference_is_the_limit",
    ),
    "rule_passes_nan": Mistake(
        "kernels/testing/tolerance.py", "    if error <= limit:  #", "    if not error > limit:  #",
        "test_kernels_tolerance.py::test_results_that_are_not_numbers_are_wrong",
    ),
}  # fmt: skip
