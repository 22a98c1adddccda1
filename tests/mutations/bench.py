"""Mistakes in the benches."""

from tests.mutations import Mistake

MISTAKES = {
    "milliseconds_of_events_for_seconds": Mistake(
        "bench/measure/timing.py", "start.elapsed_time(end) / 1000 for", "start.elapsed_time(end) for",
        "test_bench_device.py::test_seconds_of_iterations_are_the_milliseconds_between_events",
    ),
    "an_iteration_for_a_call": Mistake(
        "bench/measure/timing.py", "sample / iterations[name].calls for sample in samples",
        "sample for sample in samples",
        "test_bench_timing.py::test_a_sample_is_an_iteration_over_its_calls",
    ),
    "first_iteration_of_a_round_counts": Mistake(
        "bench/measure/timing.py", "device.seconds(iterations[name].run, counts[name] + 1)[1:]",
        "device.seconds(iterations[name].run, counts[name] + 1)",
        "test_bench_timing.py::test_warm_up_and_the_first_iteration_of_a_round_do_not_count",
    ),
    "buffers_that_stay_in_the_l2": Mistake(
        "bench/measure/timing.py", "max(FOOTPRINT, TIMES_L2 * l2_bytes) / moved", "FOOTPRINT / moved",
        "test_bench_timing.py::test_buffers_exceed_the_l2_and_iterations_a_millisecond",
    ),
    "nothing_put_back": Mistake(
        "bench/measure/timing.py", "                iterations[name].restore()\n", "",
        "test_bench_timing.py::test_what_is_overwritten_is_put_back_before_every_round",
    ),
    "bandwidth_of_an_h200": Mistake(
        "common/data_sheets.py", "989e12, 1979e12, 4.8e12,", "989e12, 1979e12, 4.3e12,",
        "test_bench_timing.py::test_data_sheets_state_what_the_vendor_states",
    ),
    "rate_with_sparsity": Mistake(
        "common/data_sheets.py", "989e12, 1979e12, 4.8e12,", "1979e12, 3958e12, 4.8e12,",
        "test_bench_timing.py::test_data_sheets_state_what_the_vendor_states",
    ),
    "copy_counted_once": Mistake(
        "bench/measure/ceilings.py", 'state("copy", 2 * copied,', 'state("copy", copied,',
        "test_bench_timing.py::test_ceilings_are_rates_of_what_was_moved_and_multiplied",
    ),
    "limit_of_what_does_not_bind": Mistake(
        "bench/measure/ceilings.py", 'if memory >= compute else', 'if memory < compute else',
        "test_bench_timing.py::test_limits_and_what_binds",
    ),
    "fraction_upside_down": Mistake(
        "bench/measure/comparison.py", "flops_per_second / self.ceilings.matmul[dtype],",
        "self.ceilings.matmul[dtype] / flops_per_second,",
        "test_bench_comparison.py::test_figures_are_fractions_of_the_data_sheet_and_of_the_matmul_in_this_run",
    ),
    "hours_of_one_gpu": Mistake(
        "bench/step.py", "hours = IMAGES / (8 * rate) / 3600", "hours = IMAGES / rate / 3600",
        "test_bench_step.py::test_rows_of_a_job",
    ),
    "unguided_calls_count_twice": Mistake(
        "bench/sampling.py", "(2 * guided + unguided) *", "2 * (guided + unguided) *",
        "test_bench_sampling.py::test_rows_of_a_job",
    ),
    "times_faster_upside_down": Mistake(
        "bench/measure/comparison.py", "other: ready.seconds() / middle for", "other: middle / ready.seconds() for",
        "test_bench_comparison.py::test_a_whole_job",
    ),
    "column_of_no_key": Mistake(
        "bench/pages/tables.py", '"measured": "{rate:.2f} {unit}"', '"measured": "{rates:.2f} {unit}"',
        "test_bench_report.py::test_the_page_of_a_gpu",
    ),
    "losses_of_speed_let_through": Mistake(
        "bench/gate/compare.py", '"op": 0.05,', '"op": 0.5,',
        "test_bench_regress.py::test_six_percent_of_one_op_fails_and_two_percent_does_not",
    ),
    "idle_time_of_kernels_that_overlap": Mistake(
        "bench/measure/breakdown.py", "reached = max(reached, interval.end)", "reached = interval.end",
        "test_bench_step.py::test_breakdown_by_hand",
    ),
    "wrong_results_timed": Mistake(
        "bench/measure/work.py", '        if direction != "forward":\n            found',
        '        if direction == "everything":\n            found',
        "test_bench_ops.py::test_incorrect_failing_and_missing_providers_are_recorded_and_the_rest_is_timed",
    ),
    "rows_of_an_earlier_moment_count": Mistake(
        "bench/measure/rows.py", "name = (row[\"run\"], key(row)) if row.get(\"run\") else number", "name = number",
        "test_bench_ops.py::test_of_one_run_the_last_row_of_a_name_counts",
    ),
    "pixels_of_a_decoder_that_differ": Mistake(
        "bench/workloads/image_loading.py", "if mean >= LEAST_MEAN and least >= LEAST:", "if mean >= LEAST:",
        "test_bench_images.py::test_how_close_pixels_have_to_be",
    ),
    "a_decoder_credited_with_pillows_speed": Mistake(
        "bench/workloads/image_loading.py", "if by_pillow == 1:", "if by_pillow > 1:",
        "test_bench_images.py::test_files_that_only_pillow_reads_are_no_measure_of_a_decoder",
    ),
    "alignment_helps_where_less_is_better": Mistake(
        "bench/pages/alignment.py", "sum(d > 0 if self.figure.higher else d < 0 for d in self.differences)",
        "sum(d > 0 for d in self.differences)",
        "test_bench_vf_study.py::test_the_table_by_hand",
    ),
    "difference_of_alignment_upside_down": Mistake(
        "bench/pages/alignment.py", "tuple(a - b for a, b in zip(self.aligned,",
        "tuple(b - a for a, b in zip(self.aligned,",
        "test_bench_vf_study.py::test_the_table_by_hand",
    ),
    "a_seed_with_one_arm_counts": Mistake(
        "bench/pages/alignment.py", "if use_vf and (seed, False) in self.arms)", "if use_vf)",
        "test_bench_vf_study.py::test_a_seed_counts_once_both_its_rows_are_there",
    ),
    "stages_done_again": Mistake(
        "bench/workloads/alignment.py", "            if name in done:\n", "            if name == done:\n",
        "test_bench_vf_study.py::test_a_study_goes_on_where_it_was_interrupted",
    ),
    "both_tokenizers_aligned": Mistake(
        "bench/workloads/alignment.py", "loss.use_vf={json.dumps(self.use_vf)}", "loss.use_vf=true",
        "test_bench_vf_study.py::test_two_arms_differ_in_the_vf_loss_alone",
    ),
    "other_noise_for_the_aligned": Mistake(
        "bench/workloads/alignment.py", 'f"sample.seed={self.seed}")', 'f"sample.seed={self.seed + self.use_vf}")',
        "test_bench_vf_study.py::test_two_arms_differ_in_the_vf_loss_alone",
    ),
    "alignment_of_other_settings_mixed": Mistake(
        "bench/vf_study.py", "if earlier.get(name) != settings.get(name))", "if name not in earlier)",
        "test_bench_vf_study.py::test_a_folder_holds_one_study",
    ),
    "quality_as_speed_of_a_gpu": Mistake(
        "bench/gate/baseline.py", 'NO_SPEED = ("triage", "vf_study")', 'NO_SPEED = ("triage",)',
        "test_bench_vf_study.py::test_a_study_on_a_gpu_is_no_row_of_speeds",
    ),
}  # fmt: skip
