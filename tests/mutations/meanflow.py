"""Mistakes in forward modes, in the network's tangents, and in objectives and samples by average velocities."""

from tests.mutations import Mistake

FORMULAS = "test_lightningdit_meanflow.py::test_losses_and_gradients_are_those_of_the_formulas"
EXACT = "test_lightningdit_meanflow.py::test_an_exact_average_velocity_leaves_what_flow_matching_leaves"
DERIVATIVE = "test_lightningdit_forward_mode.py::test_it_is_the_derivative_by_torch_and_by_finite_differences"
GRADIENTS = "test_lightningdit_forward_mode.py::test_gradients_flow_through_values_alone"
DUALS = "test_kernels_forward_mode.py::test_an_op_takes_dual_tensors"
STEPS = "test_lightningdit_sampler.py::test_average_velocities_go_to_the_end_in_as_many_evaluations_as_steps"
COUNTED = "test_lightningdit_meanflow.py::test_the_network_is_evaluated_no_more_than_is_needed"

MISTAKES = {
    # Objectives.
    "derivative_subtracted": Mistake(
        "lightningdit/meanflow.py", "(wanted + unsqueeze_like(", "(wanted - unsqueeze_like(", EXACT,
    ),
    "target_not_detached": Mistake(
        "lightningdit/meanflow.py", "* u.tangent).detach())", "* u.tangent))", FORMULAS + " " + COUNTED,
    ),
    "tangent_of_the_pair_in_improved_meanflow": Mistake(
        "lightningdit/meanflow.py", 'if self.section.objective == "improved_meanflow":\n                tangent',
        'if self.section.objective == "meanflow":\n                tangent', FORMULAS,
    ),
    "time_without_a_tangent": Mistake(
        "lightningdit/meanflow.py", "Dual(times, torch.ones_like(times))", "Dual(times, torch.zeros_like(times))",
        EXACT,
    ),
    "weight_with_a_gradient": Mistake(
        "lightningdit/meanflow.py", "(total.detach() + section.adaptive_floor)", "(total + section.adaptive_floor)",
        FORMULAS,
    ),
    "samples_out_of_order": Mistake(
        "lightningdit/meanflow.py", "torch.cat(errors)[order]", "torch.cat(errors)", FORMULAS,
    ),
    "dropped_labels_guided": Mistake(
        "lightningdit/meanflow.py", "applies = applies & ~drop", "applies = applies", FORMULAS,
    ),
    "guided_outside_of_the_interval": Mistake(
        "lightningdit/meanflow.py", "applies = (t >= section.guidance_start) & (t <= end)", "applies = t <= end",
        FORMULAS,
    ),
    "scale_of_the_mix_forgotten": Mistake(
        "lightningdit/meanflow.py", "inner = w * (1 - kappa)", "inner = w", FORMULAS,
    ),
    "times_not_in_order": Mistake(
        "lightningdit/meanflow.py", "return torch.minimum(first, second), torch.maximum(first, second)",
        "return first, second", "test_lightningdit_task.py::test_draws_of_average_velocities",
    ),
    "micro_batches_without_pairs": Mistake(
        "lightningdit/meanflow.py", "pairs = max(1, min(pairs, count - 1))", "pass",
        "test_lightningdit_meanflow.py::test_samples_with_two_times_are_a_fixed_number_of_a_micro_batch_spread_evenly",
    ),
    # The network and its tangents.
    "interval_the_other_way": Mistake(
        "lightningdit/model.py", "interval = subtract(value_of(t) if r is None else r.to(dtype), t)",
        "interval = subtract(value_of(t), t)",
        "test_lightningdit_forward_mode.py::test_the_interval_is_what_the_second_time_tells",
    ),
    "second_time_not_from_zero": Mistake(
        "lightningdit/model.py", "            nn.init.zeros_(last.weight)\n", "",
        "test_lightningdit_forward_mode.py::test_the_second_time_changes_nothing_at_first",
    ),
    "tangent_of_the_interval_lost": Mistake(
        "lightningdit/duals.py", "Dual(x - y.value, -y.tangent)", "Dual(x - y.value, y.tangent)", DERIVATIVE,
    ),
    "bias_in_the_tangent": Mistake(
        "lightningdit/duals.py", "F.linear(x.tangent, weight.detach())", "F.linear(x.tangent, weight.detach(), bias)",
        DERIVATIVE,
    ),
    "weights_see_tangents": Mistake(
        "lightningdit/duals.py", "F.linear(x.tangent, weight.detach())", "F.linear(x.tangent, weight)",
        "test_lightningdit_forward_mode.py::test_functions_of_values_and_tangents",
    ),
    # Ops.
    "tangents_of_weights_ignored": Mistake(
        "kernels/forward_mode.py", "if tangents[name] is not None and name not in taken:", "if False:",
        "test_kernels_forward_mode.py::test_a_tangent_of_a_weight_is_refused",
    ),
    "results_not_paired": Mistake(
        "kernels/forward_mode.py", "map(pair, results[::2], results[1::2])",
        "map(pair, results[: len(results) // 2], results[len(results) // 2 :])",
        "test_kernels_forward_mode.py::test_an_op_takes_dual_tensors",
    ),
    "center_not_taken_from_the_sum": Mistake(
        "kernels/rope_attention_jvp/triton_forward.py", "row_dot * rescale + block_dot - center * block_sum",
        "row_dot * rescale + block_dot", "test_kernels_ops.py::test_forward",
    ),
    "mean_of_the_norm_unscaled": Mistake(
        "kernels/adaln_rms_norm_jvp/triton_kernels.py", "mean = dot * r / D", "mean = dot / D",
        "test_kernels_ops.py::test_forward",
    ),
    "slope_of_silu": Mistake(
        "kernels/swiglu_jvp/triton_impl.py", "slope = sigmoid * (1 + gate * (1 - sigmoid))",
        "slope = sigmoid * (1 + gate)", "test_kernels_ops.py::test_forward",
    ),
    # Samples.
    "step_beyond_the_end": Mistake(
        "lightningdit/sampler.py", "r=(t + self.length)", "r=(t + 2 * self.length)", STEPS,
    ),
    "one_step_too_few": Mistake(
        "lightningdit/sampler.py", "config.mean_steps + 1", "config.mean_steps + 2", STEPS,
    ),
    "flow_sampled_by_average_velocities": Mistake(
        "launch/trained.py", '.get("objective") == "flow":', '.get("objective") == "none":',
        "test_launch_meanflow.py::test_a_network_that_was_not_trained_for_it_is_refused",
    ),
}  # fmt: skip
