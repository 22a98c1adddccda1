"""Mistakes in sweeps, in the figures that rank them, and in comparing results."""

from tests.mutations import Mistake

AXES = "test_launch_sweep_axes.py"
SWEEP = "test_launch_sweep.py"
JUDGE = "test_launch_judge.py"
RESULTS = "test_launch_compare_results.py"

MISTAKES = {
    "sweep_values_of_text_alone": Mistake(
        "launch/sweeping/axes.py", 'parse_value(f"[{text}]", where) if "," in text else [text]', 'text.split(",")',
        f"{AXES}::test_a_list_of_values_is_an_axis",
    ),
    "sweep_guidance_without_effect_counts": Mistake(
        "launch/sweeping/axes.py", "if self.sample.cfg_scale == 1:", "if self.sample.cfg_scale == 0:",
        f"{AXES}::test_settings_without_guidance_are_told_to_be_equal_by_what_has_an_effect",
    ),
    "sweep_seed_has_no_effect": Mistake(
        "launch/sweeping/axes.py", 'key.startswith(("cfg_", "guide_"))', 'key.startswith(("cfg_", "guide_", "seed"))',
        f"{AXES}::test_settings_without_guidance_are_told_to_be_equal_by_what_has_an_effect",
    ),
    "sweep_all_to_the_first_process": Mistake(
        "launch/sweeping/share.py", "least = work.index(min(work))", "least = 0",
        f"{AXES}::test_work_is_shared_evenly_and_each_setting_once",
    ),
    "sweep_takes_settings_of_other_weights": Mistake(
        "launch/sweeping/finished.py", 'there != now and not (prefix', 'there != now and (prefix',
        f"{SWEEP}::test_another_sweep_s_directory_is_refused_by_the_difference",
    ),
    "sweep_makes_everything_again": Mistake(
        "launch/sweeping/finished.py", "    if not path_exists(path):\n        return None\n    try:",
        "    if path_exists(path):\n        return None\n    try:",
        f"{SWEEP}::test_what_is_there_is_not_made_again_and_what_is_not_whole_is",
    ),
    "sweep_ranks_the_worst_first": Mistake(
        "launch/sweeping/report.py", "sign = 1 if figure.lower_is_better else -1", "sign = -1",
        f"{SWEEP}::test_the_best_comes_first_and_is_a_run_file_of_sample",
    ),
    "sweep_failed_settings_come_first": Mistake(
        "launch/sweeping/report.py", "(row.value is None, sign", "(row.value is not None, sign",
        f"{SWEEP}::test_a_setting_without_finite_samples_is_told_and_comes_last",
    ),
    "sweep_precisions_round_one_network": Mistake(
        "launch/sweeping/networks.py", "copy.deepcopy(self._float32[which])", "self._float32[which]",
        f"{SWEEP}::test_precisions_are_each_rounded_from_the_same_weights",
    ),
    "sweep_best_forgets_the_command_line": Mistake(
        "launch/sweep.py", "as_document(single, best.values), remarks", "as_document([], best.values), remarks",
        f"{AXES}::test_the_best_setting_s_file_reads_as_the_command_line_did",
    ),
    "judge_takes_any_reference_it_kept": Mistake(
        "launch/evaluation/judge.py", 'repr((self.facts["reference"], self.facts["features"][kind]))', "kind",
        f"{JUDGE}::test_of_another_reference_network_or_size_nothing_is_taken",
    ),
    "judge_believes_what_it_kept": Mistake(
        "launch/evaluation/known_features.py", "!= facts.file.model_dump():", "== {}:",
        f"{JUDGE}::test_what_was_kept_and_is_not_whole_is_measured_again",
    ),
    "judge_confuses_precision_and_recall": Mistake(
        "launch/evaluation/figures.py", '"precision"), NEAREST_K)[0]', '"precision"), NEAREST_K)[1]',
        f"{JUDGE}::test_every_figure_is_what_it_says",
    ),
    "results_of_another_number_are_comparable": Mistake(
        "launch/comparison/results.py", '"N": ("samples", "images"),', '"N": ("num", "images"),',
        f"{RESULTS}::test_figures_that_are_not_comparable_are_warned_of",
    ),
    "results_without_a_hash_are_warned_of": Mistake(
        "launch/comparison/results.py", "any(value != stated[0] for value in stated)", "len(stated) < len(values)",
        f"{RESULTS}::test_what_only_one_states_or_no_figure_depends_on_is_no_warning",
    ),
}  # fmt: skip
