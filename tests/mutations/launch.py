"""Mistakes in the programs."""

from tests.mutations import Mistake

EPOCHS = "test_launch_loader.py::test_every_epoch_is_a_permutation_and_none_is_dropped"
TIGHT_SPLIT = "test_launch_loader.py::test_the_global_batch_does_not_depend_on_how_it_is_cut"
THROUGHPUT = "test_launch_log.py::test_every_figure_of_the_throughput"
MODES = "test_launch_validation.py::test_networks_are_evaluated_in_evaluation_mode_and_trained_in_training_mode"
ONE_SIGNAL = "test_launch_signals.py::test_a_signal_to_one_process_stops_all_after_the_same_step"
AVERAGED = "test_launch_averaged.py::test_the_average_is_validated_and_training_goes_on_bit_for_bit"
VALIDATED = "test_launch_validation.py::test_the_mean_is_that_of_other_images_and_other_draws_in_every_batch"
SCHEDULE = "test_launch_config.py::test_learning_rate_schedule"

MISTAKES = {
    # More than one process.
    "norm_added_up_over_processes_under_zero_0": Mistake(
        "launch/training/engine.py", "partitioned=self._stage > 0)", "partitioned=True)",
        "test_launch_train.py::test_the_number_of_processes_and_micro_batches_does_not_change_the_run",
    ),
    "norm_of_one_partition_alone": Mistake(
        "launch/training/optimizer.py", "            dist.all_reduce(total)\n", "",
        "test_launch_train.py::test_the_number_of_processes_and_micro_batches_does_not_change_the_run",
    ),
    "stop_without_agreement": Mistake(
        "launch/training/trainer.py", "stop.agree(self.processes.all_reduce_max)", "stop.number",
        ONE_SIGNAL,
    ),
    "meter_of_one_process": Mistake(
        "launch/training/log.py", "            dist.all_reduce(sums)\n", "            pass\n",
        "test_launch_train.py::test_the_number_of_processes_and_micro_batches_does_not_change_the_run",
    ),
    "vote_to_stop_asks_for_all": Mistake(
        "launch/runtime/processes.py", "op=dist.ReduceOp.MAX", "op=dist.ReduceOp.MIN",
        ONE_SIGNAL,
    ),
    # Resume.
    "train_ckpt_taken_again": Mistake(
        "launch/training/restore.py", "    return Start(newest, damaged)\n",
        "    return Start(named[0] if named else newest, damaged)\n",
        "test_launch_train.py::test_a_run_begins_from_another_runs_checkpoint_once",
    ),
    "weight_init_ignored": Mistake(
        "launch/training/build.py", '        task.load_weights(run.train.weight_init, "model"', '        ("model"',
        "test_launch_train.py::test_a_run_begins_from_the_weights_that_it_names[lightningdit-default-ema]",
    ),
    "weight_init_of_a_tokenizer_ignored": Mistake(
        "launch/training/build.py", "        task.load_weights(run.train.weight_init)\n", "        pass\n",
        "test_launch_train.py::test_a_run_begins_from_the_weights_that_it_names[vavae-default-ema]",
    ),
    "weight_init_of_the_average_in_the_paper_s_preset": Mistake(
        "launch/training/build.py", '"model" if run.preset == "paper" else "ema")', '"ema")',
        "test_launch_train.py::test_a_run_begins_from_the_weights_that_it_names[lightningdit-paper-model]",
    ),
    "moments_not_taken_back": Mistake(
        "launch/training/engine.py", "                self._write(name, key, values[name])", '''\
                self._write(name, key, values[name] * (key != "exp_avg_sq"))''',
        "test_launch_train.py::test_sigterm_ends_after_a_checkpoint",
    ),
    "counters_not_taken_back": Mistake(
        "launch/training/restore.py", '        engine.optimizer.set_counters(start.state["counters"][name])\n', "",
        "test_launch_train.py::test_sigterm_ends_after_a_checkpoint",
    ),
    "resumed_a_step_late": Mistake(
        "launch/training/trainer.py", "first_step=self.step + 1,", "first_step=self.step + 2,",
        "test_launch_train.py::test_sigterm_ends_after_a_checkpoint",
    ),
    "newest_by_name_as_text": Mistake(
        "launch/training/checkpoint.py",
        "key=step_of, reverse=True)", "key=lambda p: p.stat().st_mtime, reverse=True)",
        "test_launch_checkpoint.py::test_newest_goes_by_step_not_by_time_or_size",
    ),
    "prune_keeps_the_oldest": Mistake(
        "launch/training/checkpoint.py", "by_step(directory)[keep:]", "by_step(directory)[:-keep]",
        "test_launch_checkpoint.py::test_prune_keeps_the_highest_steps",
    ),
    "prune_keeps_one_more": Mistake(
        "launch/training/checkpoint.py", "by_step(directory)[keep:]", "by_step(directory)[keep + 1 :]",
        "test_launch_checkpoint.py::test_prune_keeps_the_highest_steps",
    ),
    "checkpoint_hash_not_compared": Mistake(
        "launch/training/checkpoint.py",
        "(found := sha256(path)) != wanted:", "not (found := sha256(path)):",
        "test_launch_checkpoint.py::test_a_flipped_bit_is_named",
    ),
    "checkpoint_step_not_compared_with_its_name": Mistake(
        "launch/training/checkpoint.py", "if named and int(named[1]) != found.step:", "if not named:",
        "test_launch_checkpoint.py::test_a_step_under_the_name_of_another_is_refused",
    ),
    "counters_of_another_network": Mistake(
        "launch/training/checkpoint.py", "if networks != state.counters.keys():", "if not networks:",
        "test_launch_checkpoint_state.py::test_values_that_contradict_each_other_are_named",
    ),
    "parts_of_steps_counted": Mistake(
        "launch/training/checkpoint_state.py", "    if not value.is_integer():\n", "    if value != value:\n",
        "test_launch_checkpoint_state.py::test_a_value_that_no_run_leaves_is_named_with_its_key",
    ),
    "skips_of_a_network_that_is_gone_kept": Mistake(
        "launch/training/incidents.py", ' if each["network"] in self._parts.engines]', "]",
        "test_launch_checkpoint_state.py::test_a_run_without_a_discriminator_goes_on_from_one_whose_discriminator_skipped",
    ),
    "names_of_counts_without_sums_kept": Mistake(
        "launch/training/log.py", 'set(names) & set(states[0]["counts"])', 'set(states[0]["counts"])',
        "test_launch_checkpoint_state.py::test_names_of_before_a_reading_make_no_counts_of_means",
    ),
    "average_exported_as_weights": Mistake(
        "launch/exporting/weights.py", 'checkpoint.weights("model", "model"), checkpoint.weights("model", "ema")',
        'checkpoint.weights("model", "ema"), checkpoint.weights("model", "ema")',
        "test_launch_export.py::test_export_of_a_network",
    ),
    "row_that_was_not_due_forgotten": Mistake(
        "launch/training/trainer.py", "        if kept is not None:\n            processes", """\
        if kept is None:
            processes""", ONE_SIGNAL,
    ),
    "lock_not_taken": Mistake(
        "launch/runtime/run_lock.py", "        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)\n", "        pass\n",
        "test_launch_run_lock.py::test_a_second_owner_is_refused_and_told_of_the_first",
    ),
    "lock_left_behind": Mistake(
        "launch/runtime/run_lock.py", "                path.unlink()\n", "                pass\n",
        "test_launch_run_lock.py::test_a_directory_made_for_nothing_goes_again",
    ),
    "success_where_leaving_fails": Mistake(
        "launch/runtime/lifetime.py", "            status = status or 1\n", "            pass\n",
        "test_launch_lifecycle.py::test_a_process_leaves_in_order_and_within_seconds",
    ),
    # Validation.
    "validation_draws_the_same_for_every_batch": Mistake(
        "lightningdit/task.py", "self.draw(-1 - number, batch_size, device)", "self.draw(-1, batch_size, device)",
        VALIDATED,
    ),
    "validation_of_the_same_images": Mistake(
        "launch/training/validation.py", "first = number * split.global_batch_size", "first = 0", VALIDATED,
    ),
    "validation_of_the_first_process_s_images": Mistake(
        "launch/training/validation.py", "self._batch(torch.arange(first + start, first + stop)",
        "self._batch(torch.arange(first, first + stop - start)",
        "test_launch_validation.py::test_two_processes_validate_what_one_does",
    ),
    "validation_in_training_mode": Mistake(
        "launch/training/validation.py", "engine.train(False)", "engine.train()",
        MODES,
    ),
    "evaluation_mode_afterwards": Mistake(
        "launch/training/validation.py", "            stack.callback(engine.train)\n", "", MODES,
    ),
    "average_never_validated": Mistake(
        "launch/training/validation.py", "            if name in averaged:", "            if False:", AVERAGED,
    ),
    "average_validated_under_the_name_of_the_weights": Mistake(
        "launch/training/validation.py", '{"ema": "valid_ema",', '{"ema": "valid",', AVERAGED,
    ),
    "average_left_in_the_weights": Mistake(
        "launch/training/engine.py", "            for target, value in reversed(kept):",
        "            for target, value in kept[:0]:", AVERAGED,
    ),
    "weights_put_back_in_the_order_they_were_taken": Mistake(
        "launch/training/engine.py", "in reversed(kept):", "in kept:", AVERAGED,
    ),
    "average_left_out_of_weights_that_stay_gathered": Mistake(
        "launch/training/engine.py", 'if p.ds_status.name == "AVAILABLE":', "if False:",
        "test_launch_averaged.py::test_two_processes_validate_the_average_that_one_has",
    ),
    "pictures_of_the_first_images": Mistake(
        "launch/training/validation.py", "self._batch(places * len(self.data) // count)", "self._batch(places)",
        "test_launch_watch.py::test_a_picture_shows_the_same_images_at_every_validation",
    ),
    "pictures_of_more_images_than_wanted": Mistake(
        "launch/training/validation.py", "torch.cat(parts)[:count]", "torch.cat(parts)",
        "test_launch_watch.py::test_a_picture_shows_the_same_images_at_every_validation",
    ),
    "picture_without_its_size": Mistake(
        "launch/training/writers.py", "Summary.Image(height=height, width=width,",
        "Summary.Image(height=width, width=height,",
        "test_launch_watch.py::test_a_picture_shows_the_same_images_at_every_validation",
    ),
    # Warnings.
    "warned_in_every_row": Mistake(
        "launch/training/watch.py", "        self._causes = set(found)\n", "",
        "test_launch_watch.py::test_a_cause_is_told_once_until_it_has_gone",
    ),
    "warned_once_in_a_run": Mistake(
        "launch/training/watch.py", "self._causes = set(found)", "self._causes |= set(found)",
        "test_launch_watch.py::test_a_cause_is_told_once_until_it_has_gone",
    ),
    # Throughput and schedule.
    "seconds_of_all_steps": Mistake(
        "launch/training/progress.py", "self.elapsed / max(step - self._step, 1)", "self.elapsed",
        THROUGHPUT,
    ),
    "eta_from_the_start": Mistake(
        "launch/training/progress.py", "per_step * (last_step - step)", "per_step * last_step", THROUGHPUT,
    ),
    "milliseconds_for_seconds": Mistake(
        "launch/training/progress.py", '"seconds_per_step": per_step,', '"seconds_per_step": 1e3 * per_step,',
        THROUGHPUT,
    ),
    "images_of_one_process_per_second": Mistake(
        "launch/training/progress.py", '"images_per_second": global_batch_size / per_step,',
        '"images_per_second": 1 / per_step,',
        THROUGHPUT,
    ),
    "saving_counted_into_the_rate": Mistake(
        "launch/training/trainer.py", '''\
            if save or paused:
                self._progress''', '''\
            if paused:
                self._progress''', "test_launch_validation.py::test_a_rate_is_that_of_training_alone",
    ),
    "learning_rate_of_the_step_before": Mistake(
        "launch/training/trainer.py", "engine.optimizer.set_lr(optimizer.lr_at(self.step, self.config.last_step))",
        "engine.optimizer.set_lr(optimizer.lr_at(self.step - 1, self.config.last_step))",
        "test_launch_train.py::test_the_optimizer_is_given_the_rate_that_the_log_says",
    ),
    "warm_up_from_zero": Mistake(
        "launch/training/config.py", "return self.lr * step / self.warmup_steps",
        "return self.lr * (step - 1) / self.warmup_steps",
        SCHEDULE,
    ),
    "cosine_without_a_floor": Mistake(
        "launch/training/config.py", "(self.final_lr_fraction + (1 - self.final_lr_fraction) * cosine)", "cosine",
        SCHEDULE,
    ),
    "epochs_rounded_down": Mistake(
        "launch/training/config.py", "return -(-self.max_epochs * num_images // self.global_batch_size)",
        "return self.max_epochs * num_images // self.global_batch_size",
        "test_launch_config.py::test_the_last_step_of_so_many_epochs_ends_them",
    ),
    # Precision.
    "average_started_from_rounded_weights": Mistake(
        "launch/training/engine.py", '            self._write(name, "ema", value)\n', "",
        "test_launch_step.py::test_master_weights_and_average_start_from_unrounded_weights",
    ),
    # Files.
    # Loader.
    "order_the_same_in_every_epoch": Mistake(
        "launch/training/loader.py",
        "generator=generator(seed, epoch)", "generator=generator(seed, 0)", EPOCHS,
    ),
    "rest_of_an_epoch_dropped": Mistake(
        "launch/training/loader.py", "first + stop), self.num_samples)",
        "first + stop), self.num_samples - self.num_samples % self.global_batch_size)",
        EPOCHS,
    ),
    "split_by_rank_first": Mistake(
        "launch/training/loader.py", "start = (micro * self.world_size + rank) * self.micro_batch_size",
        "start = (micro + rank) * self.micro_batch_size", TIGHT_SPLIT,
    ),
    "split_that_overlaps": Mistake(
        "launch/training/loader.py", "return start, start + self.micro_batch_size",
        "return start, start + self.micro_batch_size + 1", TIGHT_SPLIT,
    ),
    # Optimizer.
    "clipping_never": Mistake(
        "launch/training/optimizer.py", ".clamp(max=1.0)", ".clamp(min=1.0)",
        "test_launch_optimizer.py::test_steps_are_those_of_torch_with_clipped_gradients_and_an_average",
    ),
    "skipped_steps_counted_as_applied": Mistake(
        "launch/training/optimizer.py", 'self.counters["applied"] += 1 - skipped', 'self.counters["applied"] += 1',
        "test_launch_skips.py::test_a_skipped_step_touches_nothing",
    ),
    "loss_not_checked": Mistake(
        "launch/training/optimizer.py", "self._nonfinite_losses += (~torch.isfinite(loss)).float()",
        "self._nonfinite_losses += 0",
        "test_launch_skips.py::test_too_many_skipped_steps_in_a_row_stop_the_run_wherever_the_rows_are",
    ),
    "skipped_in_a_row_never_ends": Mistake(
        "launch/training/optimizer.py", "in_a_row.add_(1).mul_(skipped)", "in_a_row.add_(skipped)",
        "test_launch_skips.py::test_fewer_skipped_steps_in_a_row_than_that_do_not_stop_it",
    ),
    "statistics_of_skipped_steps_kept": Mistake(
        "launch/training/engine.py", "buffer.copy_(torch.where(skipped, kept, buffer))", "buffer.copy_(buffer)",
        "test_launch_skips.py::test_a_skipped_step_leaves_running_statistics_alone",
    ),
    # Sections and plans.
    "names_hold_anything": Mistake(
        "common/sections.py", "    if printable(text) != text:\n", "    if printable(text[:9]) != text[:9]:\n",
        "test_launch_sections.py::test_no_name_or_path_holds_what_no_file_system_takes",
    ),
    "processes_share_a_gpu_without_a_local_rank": Mistake(
        "launch/runtime/launcher.py",
        '    local_rank = _number("LOCAL_RANK", 0, world_size - 1)\n', "    local_rank = 0\n",
        "test_launch_lifecycle.py::test_an_environment_that_makes_no_sense_is_named",
    ),
    "other_packages_taken_for_ours": Mistake(
        "launch/runtime/packages.py", 'if MARKS.get(name, b"") not in content:', "if not content:",
        "test_launch_packages.py::test_a_file_of_ours_that_was_overwritten_is_named",
    ),
    # Exports, results and statistics of latents.
    "exports_replace_what_is_there": Mistake(
        "common/files.py", "        os.link(source, path)\n", "        os.replace(source, path)\n",
        "test_launch_export.py::test_of_two_exports_of_one_name_one_is_made",
    ),
    "a_failed_export_takes_the_others_files": Mistake(
        "launch/exporting/places.py", "            for path in placed:\n", "            for path in paths:\n",
        "test_launch_export.py::test_of_two_exports_of_one_name_one_is_made",
    ),
    "statistics_of_any_size_compared": Mistake(
        "launch/evaluation/moments.py", "value.abs().max())) > MAX_MOMENT", "value.abs().max())) > math.inf",
        "test_launch_evaluation.py::test_statistics_without_a_distance_are_named_with_their_file",
    ),
    "results_replace_what_made_the_images": Mistake(
        "launch/evaluate.py", 'isinstance(earlier, dict) and "metrics" in earlier)', "isinstance(earlier, dict))",
        "test_launch_evaluate_options.py::test_where_a_result_cannot_go_is_said_before_it_is_measured",
    ),
    "a_folder_takes_the_place_of_an_empty_one": Mistake(
        "launch/exporting/places.py", "    if path_exists(folder):\n", "    if path_exists(folder / 'config.json'):\n",
        "test_launch_export_diffusers.py::test_a_folder_replaces_nothing_that_is_there",
    ),
    "statistics_of_another_tokenizer_exported": Mistake(
        "launch/trained.py", "stated != (own := fingerprint(tokenizer)):", "not (own := fingerprint(tokenizer)):",
        "test_launch_export_diffusers.py::test_what_cannot_be_a_folder_is_said",
    ),
    "mean_0_and_std_1_written_as_statistics": Mistake(
        "launch/exporting/tokenizer.py", "scale.is_identity or shift_factor", "shift_factor",
        "test_launch_export_diffusers.py::test_a_scale_alone_leaves_the_statistics_null",
    ),
}  # fmt: skip
