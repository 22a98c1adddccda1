"""Mistakes in comparing runs, telling where they stand, and planning them on many GPUs."""

from tests.mutations import Mistake

GARBAGE = "test_launch_status.py::test_whatever_lies_there_is_survived_and_left_as_it_is"

MISTAKES = {
    "rows_made_again_count_twice": Mistake(
        "launch/run_directory/rows.py", "while kept and kept[-1]", "while False and kept[-1]",
        "test_launch_run_directory.py::test_rows_that_were_made_again_count_once",
    ),
    "a_cut_line_is_damage": Mistake(
        "launch/run_directory/rows.py", 'line.endswith(b"\\n")', "True",
        "test_launch_run_directory.py::test_a_last_line_that_was_cut_short_is_no_row_and_no_damage",
    ),
    "hours_that_begin_anew_go_back": Mistake(
        "launch/run_directory/rows.py", "if own >= (total if before is None else before):", "if own >= 0:",
        "test_launch_run_directory.py::test_hours_are_counted_by_the_rows_or_by_the_seconds_of_their_steps",
    ),
    "sizes_of_checkpoints_not_looked_at": Mistake(
        "launch/run_directory/checkpoints.py", "!= entry.bytes", "!= size",
        "test_launch_run_directory.py::test_checkpoints_are_whole_damaged_or_set_aside",
    ),
    "checksums_never_compared": Mistake(
        "launch/run_directory/checkpoints.py", "if verify and sha256(path)", "if not verify and sha256(path)",
        "test_launch_run_directory.py::test_a_flipped_bit_is_found_where_checksums_are_compared",
    ),
    "a_circle_of_links_is_walked_for_ever": Mistake(
        "launch/run_directory/find.py", "[] if identity in seen else ", "[] if len(waiting) > 99 else ",
        "test_launch_run_directory.py::test_runs_are_found_at_any_depth_each_once_and_circles_end",
    ),
    "reading_a_lock_gives_it_up": Mistake(
        "launch/runtime/run_lock.py", "        if directory.resolve() in _held:  # opening",
        "        if False:  # opening",
        "test_launch_run_directory.py::test_its_own_process_does_not_lose_a_lock_by_reading_it",
    ),
    "every_lock_file_is_held": Mistake(
        "launch/runtime/run_lock.py", "answer[0] != fcntl.F_UNLCK", "answer[0] == fcntl.F_UNLCK",
        "test_launch_run_directory.py::test_a_lock_is_read_and_stays_held",
    ),
    "deeply_nested_locks_end_the_program": Mistake(
        "launch/runtime/run_lock.py", "(ValueError, ValidationError, RecursionError)", "(ValueError, ValidationError)",
        GARBAGE,
    ),
    "an_earlier_exit_counts": Mistake(
        "launch/run_directory/summary.py", "(updated or 0.0) - _MADE_BEFORE", "-1.0",
        "test_launch_status.py::test_an_exit_before_the_last_rows_is_of_an_earlier_start",
    ),
    "killed_runs_are_stopped": Mistake(
        "launch/run_directory/summary.py", '        return "killed"\n', '        return "stopped"\n',
        "test_launch_status.py::test_states",
    ),
    "the_time_left_stands_still": Mistake(
        "launch/run_directory/summary.py", "- (now - updated if updated is not None else 0.0)", "",
        "test_launch_status.py::test_a_running_one_has_its_process_and_the_time_left",
    ),
    "names_cut_before_they_are_printable": Mistake(
        "launch/status.py", "        printable(str(path.relative_to(root) if",
        "        str(str(path.relative_to(root) if",
        "test_launch_status.py::test_the_table_fits_a_terminal",
    ),
    "published_losses_from_memory": Mistake(
        "launch/comparison/curves.py", "20_000: 0.3175", "20_000: 0.3157",
        "test_launch_compare.py::test_the_published_curve_is_that_of_its_log",
    ),
    "rows_weigh_the_same": Mistake(
        "launch/comparison/curves.py", "np.minimum(np.diff(self.steps, prepend=0), window)", "np.ones(len(self.steps))",
        "test_launch_compare.py::test_rows_weigh_as_many_steps_as_they_are_means_of",
    ),
    "a_window_with_its_first_step_too_many": Mistake(
        "launch/comparison/curves.py", 'at - window, side="right"', 'at - window, side="left"',
        "test_launch_compare.py::test_means_are_over_the_steps_of_the_window",
    ),
    "differences_of_the_wrong_sign": Mistake(
        "launch/comparison/table.py", "value / base - 1", "base / value - 1",
        "test_launch_compare.py::test_a_report_by_hand",
    ),
    "the_shortest_window_is_common": Mistake(
        "launch/comparison/table.py", "longest = max(curve.window", "longest = min(curve.window",
        "test_launch_compare.py::test_runs_of_other_intervals_are_compared_over_the_longer",
    ),
    "the_shortest_window_of_short_runs_is_common": Mistake(
        "launch/comparison/table.py", "return max(curve.window", "return min(curve.window",
        "test_launch_compare.py::test_runs_shorter_than_a_published_mean_are_compared_over_their_own",
    ),
    "runs_are_compared_over_more_steps_than_they_made": Mistake(
        "launch/comparison/table.py", "min(int(curve.steps[-1]) for curve in runs)",
        "max(int(curve.steps[-1]) for curve in runs)",
        "test_launch_compare.py::test_runs_shorter_than_a_published_mean_are_compared_over_their_own",
    ),
    "a_ring_sends_the_whole_buffer": Mistake(
        "launch/scaling_model/network.py", "intra = phases * (local - 1) / local * size", "intra = phases * size",
        "test_launch_scaling_model.py::test_a_gpu_sends_what_it_does_in_simulated_rings",
    ),
    "every_gpu_sends_the_node_s_part_across": Mistake(
        "launch/scaling_model/network.py", "(nodes - 1) / nodes * size / local", "(nodes - 1) / nodes * size",
        "test_launch_scaling_model.py::test_a_gpu_sends_what_it_does_in_simulated_rings",
    ),
    "zero_2_sums_once_in_a_step": Mistake(
        "launch/scaling_model/zero.py", "accumulation if stage >= 2 and not least else 1", "1",
        "test_launch_scaling_model.py::test_gradients_are_summed_once_under_zero_1_and_for_each_micro_batch_under_2",
    ),
    "buckets_travel_before_they_are_full": Mistake(
        "launch/scaling_model/zero.py", "sent = max(sent, filled) + bucket", "sent = sent + bucket",
        "test_launch_scaling_model.py::test_sums_that_overlap_end_as_by_a_clock",
    ),
    "daly_with_another_third": Mistake(
        "launch/scaling_model/failures.py", "math.sqrt(ratio) / 3", "math.sqrt(ratio) / 2",
        "test_launch_scaling_model.py::test_dalys_interval_is_the_numeric_minimum",
    ),
    "failures_while_starting_again_never_happen": Mistake(
        "launch/scaling_model/failures.py", "math.exp((self.restart + self.written) / mean) * grown", "grown",
        "test_launch_scaling_model.py::test_time_lost_is_that_of_simulated_failures",
    ),
    "small_batches_are_as_fast": Mistake(
        "launch/scaling_model/gpu.py", "return micro_batch / (micro_batch + self.half_batch)", "return 1.0",
        "test_launch_scaling_model.py::test_one_gpu_does_what_was_measured",
    ),
    "the_optimizer_is_shared_under_zero_0": Mistake(
        "launch/scaling_model/plan.py", "gpu.optimizer / (gpus if stage else 1)", "gpu.optimizer / gpus",
        "test_launch_scaling_model.py::test_gradients_are_summed_once_under_zero_1_and_for_each_micro_batch_under_2",
    ),
    "whole_graphs_overlap": Mistake(
        "launch/scaling_model/inputs.py", 'if mode in ("none", "regional"):', "if mode:",
        "test_launch_scaling.py::test_sums_overlap_where_gradients_come_one_by_one",
    ),
}  # fmt: skip
