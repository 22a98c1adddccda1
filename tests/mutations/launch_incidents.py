"""Mistakes in rollbacks, dumps, loss spikes, figures by block and sums of gradients."""

from tests.mutations import Mistake

_INCIDENTS, _SPIKES = "test_launch_incidents.py", "test_launch_spikes.py"
_ROLLBACK = "test_launch_rollback.py"
_TWO_PROCESSES = f"{_SPIKES}::test_two_processes_have_the_figures_and_losses_of_one"
MISTAKES = {
    "rolled_back_to_the_newest": Mistake(
        "launch/training/incidents.py", "good = [*before, *reversed(among)]", "good = [*reversed(among), *before]",
        f"{_INCIDENTS}::test_ten_bad_steps_in_a_row_are_left_behind_by_one_rollback",
    ),
    "rolled_back_to_the_newest_among_skipped_steps": Mistake(
        "launch/training/incidents.py", "*reversed(among)]", "*among]",
        f"{_ROLLBACK}::test_the_first_checkpoint_among_skipped_steps_will_do_where_none_is_from_before",
    ),
    "bad_checkpoints_stay": Mistake(
        "launch/training/incidents.py", "            if step_of(each.path) > found.step:\n",
        "            if step_of(each.path) > found.step + 100:\n",
        f"{_INCIDENTS}::test_ten_bad_steps_in_a_row_are_left_behind_by_one_rollback",
    ),
    "rollback_is_not_kept": Mistake(
        "launch/training/trainer.py",
        "                log.write_event(self._rollback.event())\n            self.save()\n",
        "                log.write_event(self._rollback.event())\n",
        f"{_INCIDENTS}::test_ten_bad_steps_in_a_row_are_left_behind_by_one_rollback",
    ),
    "drawn_anew_in_samples_alone": Mistake(
        "launch/training/trainer.py", "self._draws, seed=seed)", "self._draws)",
        f"{_INCIDENTS}::test_without_a_checkpoint_the_run_begins_anew",
    ),
    "rollbacks_without_end": Mistake(
        "launch/training/incidents.py", "len(self._order.redrawn) < self._parts.config.train.rollbacks", "True",
        f"{_INCIDENTS}::test_a_spike_that_lasts_is_left_behind_once",
    ),
    "spikes_are_saved": Mistake(
        "launch/training/incidents.py", "        if bad.spike is None:\n", "        if bad:\n",
        f"{_INCIDENTS}::test_a_spike_that_lasts_is_left_behind_once",
    ),
    "spikes_before_skipped_steps_forgotten": Mistake(
        "launch/training/incidents.py", "        if begun is None or begun > skipped.last:\n",
        "        if begun is not None:\n",
        f"{_ROLLBACK}::test_a_spike_that_ends_in_skipped_steps_is_gone_back_from_as_a_whole",
    ),
    "lasting_spikes_beside_skipped_steps_forgotten": Mistake(
        "launch/training/incidents.py", "        if lasting is not None:\n", "        if lasting is None:\n",
        f"{_ROLLBACK}::test_a_spike_that_ends_in_skipped_steps_is_gone_back_from_as_a_whole",
    ),
    "lasting_spikes_forgotten_over_a_restart": Mistake(
        "launch/training/spikes.py", 'found = state.get("found")', "found = None",
        f"{_ROLLBACK}::test_a_spike_that_lasted_is_gone_back_from_after_a_restart_too",
    ),
    "oldest_set_aside_first": Mistake(
        "launch/training/incidents.py", "        for each in kept:\n", "        for each in reversed(kept):\n",
        f"{_ROLLBACK}::test_checkpoints_are_set_aside_newest_first_once_a_whole_one_is_found",
    ),
    "rolled_back_to_damaged_checkpoints": Mistake(
        "launch/training/incidents.py",
        "            found, damaged = newest_allowed(good, self._parts.config.train)\n",
        "            found, damaged = good[0], {}\n",
        f"{_ROLLBACK}::test_checkpoints_are_set_aside_newest_first_once_a_whole_one_is_found",
    ),
    "rollback_as_a_start_of_the_user": Mistake(
        "launch/training/trainer.py", "going_on=rollback is not None", "going_on=False",
        f"{_INCIDENTS}::test_ten_bad_steps_in_a_row_are_left_behind_by_one_rollback",
    ),
    "start_that_is_set_aside_asked_for": Mistake(
        "launch/training/restore.py", "    if own and going_on:\n", "    if own and going_on and train.ckpt is None:\n",
        f"{_ROLLBACK}::test_a_run_that_goes_on_takes_its_own_checkpoint_whatever_its_start_was",
    ),
    "rollbacks_told_as_resumes": Mistake(
        "launch/training/trainer.py", "None if start is None or rollback is not None else start.path",
        "None if start is None else start.path",
        f"{_INCIDENTS}::test_ten_bad_steps_in_a_row_are_left_behind_by_one_rollback",
    ),
    "hours_thrown_away_with_steps": Mistake(
        "launch/training/trainer.py", "            self._progress.time.load_state(rollback.time)\n",
        "            pass\n",
        f"{_INCIDENTS}::test_ten_bad_steps_in_a_row_are_left_behind_by_one_rollback",
    ),
    "norms_of_parts_of_a_step": Mistake(
        "launch/training/dump.py", "scale = parts.split.accumulation", "scale = 1",
        f"{_INCIDENTS}::test_the_replay_of_a_dump_shows_the_same_nan",
    ),
    "losses_of_the_run_not_dumped": Mistake(
        "launch/training/incidents.py", "        self._last_losses.extend(losses)\n", "",
        f"{_INCIDENTS}::test_a_spike_that_lasts_is_left_behind_once",
    ),
    "infinite_figures_as_large_numbers": Mistake(
        "launch/training/figures.py", "nan_to_num(torch.inf, torch.inf, -torch.inf)", "nan_to_num(nan=torch.inf)",
        f"{_SPIKES}::test_a_figure_that_is_not_finite_is_none_in_its_row",
    ),
    "block_norms_of_one_process": Mistake(
        "launch/training/block_norms.py", "            dist.all_reduce(total)\n", "            pass\n", _TWO_PROCESSES,
    ),
    "drift_of_one_process": Mistake(
        "launch/training/optimizer.py",
        "            dist.all_reduce(squares)\n        return (squares[0]",
        "            pass\n        return (squares[0]",
        _TWO_PROCESSES,
    ),
    "maxima_of_one_process": Mistake(
        "launch/training/figures.py", "            dist.all_reduce(values, op=dist.ReduceOp.MAX)\n",
        "            pass\n",
        _TWO_PROCESSES,
    ),
    "losses_of_one_process": Mistake(
        "launch/training/spikes.py", "            dist.all_reduce(losses)\n", "            pass\n", _TWO_PROCESSES,
    ),
    "replay_of_initial_weights": Mistake(
        "launch/replay.py", "        load_strict(network, weights, path)\n", "",
        f"{_INCIDENTS}::test_the_replay_of_a_dump_shows_the_same_nan",
    ),
    "replay_of_other_draws": Mistake(
        "launch/training/dump.py", "own = {name: value[start:stop] for", "own = {name: value[start:stop].flip(0) for",
        f"{_INCIDENTS}::test_the_replay_of_a_dump_shows_the_same_nan",
    ),
    "ranges_of_before_come_first": Mistake(
        "launch/training/loader.py", "in reversed(self.redrawn)", "in self.redrawn",
        f"{_SPIKES}::test_steps_that_are_drawn_anew_take_their_places_from_another_seed",
    ),
    "permutations_of_any_seed": Mistake(
        "launch/training/loader.py", "generator=generator(seed, epoch)", "generator=generator(self.seed, epoch)",
        f"{_SPIKES}::test_steps_that_are_drawn_anew_take_their_places_from_another_seed",
    ),
    "deviation_is_not_scaled": Mistake(
        "launch/training/spikes.py", "NORMAL = 1.4826", "NORMAL = 1.0",
        f"{_SPIKES}::test_a_spike_is_seven_robust_deviations_above_the_median",
    ),
    "losses_of_any_objective": Mistake(
        "launch/training/spikes.py", "            self._losses.clear()\n", "            pass\n",
        f"{_SPIKES}::test_losses_of_another_objective_are_not_compared",
    ),
    "skipped_steps_end_a_spike": Mistake(
        "launch/training/spikes.py", "        if not math.isfinite(loss):\n            return\n",
        "        if not math.isfinite(loss):\n            self.first, self.in_a_row = None, 0\n            return\n",
        f"{_SPIKES}::test_a_spike_lasts_over_skipped_steps_and_a_restart_until_a_loss_is_none",
    ),
    "logits_before_rope": Mistake(
        "lightningdit/watch.py", "    if cos is not None and sin is not None:\n", "    if cos is None:\n",
        f"{_SPIKES}::test_the_largest_logit_is_that_of_the_attention",
    ),
    "watched_ops_stay": Mistake(
        "lightningdit/watch.py", "            attention.ops = ops\n", "            pass\n",
        f"{_SPIKES}::test_what_is_watched_changes_no_bit_of_the_training",
    ),
    "drift_of_half_of_the_weights": Mistake(
        "launch/training/optimizer.py", "for first in range(0, weights.numel(), DRIFT_ELEMENTS)",
        "for first in range(weights.numel() // 2, weights.numel(), DRIFT_ELEMENTS)",
        f"{_SPIKES}::test_figures_of_a_row",
    ),
    "float32_sums_sent_in_bfloat16": Mistake(
        "launch/training/gradient_sums.py", '"communication_data_type": "fp32"}', '"communication_data_type": "bf16"}',
        "test_launch_gradient_sums.py::test_sums_have_the_errors_of_their_dtype_and_take_what_the_readme_says",
    ),
}  # fmt: skip
