"""Mistakes in what sampling computes and leaves out: intervals, schedules, weaker networks, presets, captured steps."""

from tests.mutations import Mistake

GUIDANCE, GRAPHS, FILES = (
    f"test_{name}.py::" for name in ("lightningdit_guidance", "lightningdit_step_graphs", "launch_guidance")
)

MISTAKES = {
    "guidance_beyond_its_end": Mistake(
        "lightningdit/guidance.py", "return self.start <= t <= self.end", "return self.start <= t",
        f"{GUIDANCE}test_both_ends_of_the_interval_are_guided_and_nothing_beyond",
    ),
    "an_interval_up_to_one_ends_there": Mistake(
        "lightningdit/guidance.py", "return math.inf if self.interval_end >= 1 else", "return",
        f"{GUIDANCE}test_an_interval_up_to_one_has_no_end",
    ),
    "a_scale_of_one_is_evaluated": Mistake(
        "lightningdit/guidance.py", "return None if scale == 1 else scale", "return scale",
        f"{GUIDANCE}test_schedules_bring_the_scale_from_one_to_its_value",
    ),
    "a_schedule_from_zero": Mistake(
        "lightningdit/guidance.py", "else 1 + (self.scale - 1) * SHARES", "else self.scale * SHARES",
        f"{GUIDANCE}test_schedules_bring_the_scale_from_one_to_its_value",
    ),
    "a_cosine_of_the_whole_turn": Mistake(
        "lightningdit/guidance.py", "(1 - math.cos(math.pi * t)) / 2", "(1 - math.cos(2 * math.pi * t)) / 2",
        f"{GUIDANCE}test_schedules_bring_the_scale_from_one_to_its_value",
    ),
    "the_weaker_network_in_the_first_place": Mistake(
        "lightningdit/guidance.py", "for network in (self.model, self.guide))",
        "for network in (self.guide, self.model))",
        f"{GUIDANCE}test_a_weaker_network_guides_in_the_place_of_the_null_label",
    ),
    "dopri5_stops_at_the_start_alone": Mistake(
        "lightningdit/guidance.py", "else {guidance.start, guidance.end}", "else {guidance.start}",
        f"{GUIDANCE}test_no_adaptive_step_crosses_an_end_of_the_interval",
    ),
    "second_evaluations_cost_nothing": Mistake(
        "lightningdit/cost.py", " + guided_nfe * flops_per_image(guide or config)[0]", "",
        f"{GUIDANCE}test_a_skipped_interval_changes_nothing_but_rounding",
    ),
    "captured_with_the_first_steps_numbers": Mistake(
        "lightningdit/step_graphs.py", "        static.numbers.copy_(numbers)\n", "", f"{GRAPHS}test_the_loops_bits",
    ),
    "warm_up_moves_the_state": Mistake(
        "lightningdit/step_graphs.py", "            static.x.copy_(before)\n", "", f"{GRAPHS}test_the_loops_bits",
    ),
    "guided_and_unguided_steps_share_a_graph": Mistake(
        "lightningdit/step_graphs.py", "        if kind not in self._replays:", "        if not self._replays:",
        f"{GRAPHS}test_the_loops_bits",
    ),
    "captured_with_the_first_batchs_labels": Mistake(
        "lightningdit/step_graphs.py", "        self._static.y.copy_(y)\n", "", f"{GRAPHS}test_the_loops_bits",
    ),
    "results_in_the_graphs_memory": Mistake(
        "lightningdit/step_graphs.py", "return x if self._capture is None else x.clone()", "return x",
        f"{GRAPHS}test_results_of_a_batch_outlive_the_next",
    ),
    "presets_over_what_is_set": Mistake(
        "lightningdit/config.py", "SAMPLE_PRESETS[preset] | values", "values | SAMPLE_PRESETS[preset]",
        f"{FILES}test_a_preset_gives_values_to_keys_that_are_not_set",
    ),
    "a_later_checkpoint_guides": Mistake(
        "launch/guides.py", "if each.step < (found.step or 0)]", "if each.step]",
        f"{FILES}test_a_guide_that_cannot_guide_is_refused",
    ),
    "a_guide_of_other_latents": Mistake(
        "launch/guides.py", "    if not _alike(guide.latents, found.latents):\n", "    if False:\n",
        f"{FILES}test_a_guide_that_cannot_guide_is_refused",
    ),
    "the_sampled_network_guides_itself": Mistake(
        "launch/guides.py", "    if _is_sampled_one(network, found):\n", "    if False:\n",
        f"{FILES}test_a_guide_that_cannot_guide_is_refused",
    ),
    "another_prediction_than_the_weights": Mistake(
        "launch/trained.py", 'keys = ("path_type", "prediction")', 'keys = ("path_type",)',
        "test_launch_sampling_transport.py::test_another_transport_than_the_weights_were_trained_by_is_refused",
    ),
    "settings_do_not_travel": Mistake(
        "lightningdit/weights.py", '            **({} if export.sample is None else {"sample": export.sample}),\n', "",
        f"{FILES}test_an_export_says_what_its_network_was_tuned_with",
    ),
}  # fmt: skip
