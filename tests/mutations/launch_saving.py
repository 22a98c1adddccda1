"""Mistakes in saving in the background, and in taking the newest whole checkpoint."""

from tests.mutations import Mistake

ONE, TWO = (
    f"test_launch_saving.py::test_the_files_{of}are_those_of_an_inline_save" for of in ("", "of_two_processes_")
)
LATER = "test_launch_saving.py::test_what_training_changes_after_the_call_is_not_saved"
DAMAGED = "test_launch_damaged.py::test_each_file_of_the_newest_damaged_in_turn"
MISTAKES = {
    "references_in_place_of_copies": Mistake(
        "launch/training/saving.py",
        "                parts[name].view(value.shape).copy_(value.detach(), non_blocking=True)",
        "                parts[name] = value.detach().view(-1)",
        LATER,
    ),
    "state_not_copied": Mistake(
        "launch/training/saving.py",
        "copy.deepcopy(state)",
        "state",
        LATER,
    ),
    "parts_in_the_order_of_ranks": Mistake(
        "launch/training/saving.py",
        "sorted(found, key=lambda part: part[1])",
        "sorted(found, reverse=True)",
        TWO,
    ),
    "padding_saved": Mistake(
        "launch/training/engine.py",
        "size = min(part.numel(), p.ds_numel - start)",
        "size = part.numel()",
        TWO,
    ),
    "rounded_weights_saved": Mistake(
        "launch/training/engine.py",
        'state = None if key == "model" and not self._optimizer_has_masters else MASTER if key == "model" else key',
        'state = None if key == "model" else key',
        ONE,
    ),
    "buffers_as_at_the_first_save": Mistake(
        "launch/training/saving.py",
        "self.untrained = self._engine.untrained_state() if self._is_main else {}",
        "self.untrained = self.untrained or self._engine.untrained_state()",
        ONE,
    ),
    "parts_left_unreceived": Mistake(
        "launch/training/saving.py",
        "                self._discard_awaited()\n",
        "                pass\n",
        TWO,
    ),
    "errors_of_the_thread_lost": Mistake(
        "launch/training/saving.py",
        "            self._error = e\n",
        "            pass\n",
        "test_launch_saving.py::test_what_writing_meets_is_raised_once_and_the_checkpoint_before_stays",
    ),
    "two_saves_at_once": Mistake(
        "launch/training/saving.py",
        "        begin = time.perf_counter()\n        self.wait()\n",
        "        begin = time.perf_counter()\n",
        "test_launch_saving.py::test_a_save_waits_for_the_one_before_and_no_longer",
    ),
    "loop_does_not_ask_the_writer": Mistake(
        "launch/training/trainer.py",
        "            self.train_step(stream)\n            self._report_saved(log)\n",
        "            self.train_step(stream)\n",
        "test_launch_saving.py::test_a_full_disk_ends_the_run_at_its_next_step",
    ),
    "end_does_not_wait": Mistake(
        "launch/training/trainer.py",
        "            self.saver.leave()\n",
        "",
        "test_launch_saving.py::test_a_run_that_ends_with_an_error_finishes_what_it_was_writing",
    ),
    "leaving_waits_for_ever": Mistake(
        "launch/training/saving.py",
        "if not self.wait(LEAVE_TIMEOUT):",
        "if not self.wait(5.0):",
        "test_launch_saving.py::test_a_run_that_ends_gives_a_save_some_time_and_no_more",
    ),
    "steps_to_keep_pruned": Mistake(
        "launch/training/checkpoint.py",
        "step_of(path) % keep_every == 0:",
        "step_of(path) % keep_every == 1:",
        "test_launch_saving.py::test_the_newest_are_kept_and_those_of_every_so_many_steps",
    ),
    "damaged_checkpoint_removed": Mistake(
        "launch/training/restore.py",
        "        aside = checkpoint.set_aside(path)\n",
        "        aside = checkpoint.set_aside(path)\n        checkpoint._remove(aside)\n",
        DAMAGED,
    ),
    "damaged_checkpoint_keeps_its_name": Mistake(
        "launch/training/checkpoint.py",
        'f"{path.name}.{suffix}" + (f".{number}" if number > 1 else "")',
        'f"step_{number:07d}"',
        DAMAGED,
    ),
    "pruned_before_the_newest_is_known_to_be_whole": Mistake(
        "launch/training/restore.py",
        "    start = find_start(checkpoints, train, going_on=going_on)\n",
        "    checkpoint.prune(checkpoints, train.keep_checkpoints or 99)\n"
        "    start = find_start(checkpoints, train, going_on=going_on)\n",
        "test_launch_damaged.py::test_the_last_whole_one_outlives_any_number_of_damaged_ones",
    ),
    "strict_takes_the_one_before": Mistake(
        "launch/training/restore.py",
        '    if train.resume != "strict":\n',
        "    if train.resume:\n",
        "test_launch_damaged.py::test_strict_ends_with_the_newest_ones_reason",
    ),
    "all_damaged_begins_anew": Mistake(
        "launch/training/restore.py",
        "    newest, damaged = newest_allowed(own, train)\n",
        """\
    try:
        newest, damaged = newest_allowed(own, train)
    except CheckpointError:
        return Start(None)
""",
        "test_launch_damaged.py::test_where_all_are_damaged_each_has_its_reason_and_nothing_is_touched",
    ),
    "stale_handles_are_damage": Mistake(
        "common/files.py",
        "kind = UnreachableError if error.errno in _UNREACHABLE else FileError",
        "kind = FileError",
        "test_launch_damaged.py::test_what_the_system_does_not_tell_is_no_damage",
    ),
    "verified_files_hashed_again": Mistake(
        "launch/training/checkpoint.py",
        "if self.verified.get(name) != stamp and (found",
        "if (found",
        "test_launch_damaged.py::test_each_file_is_hashed_once_unless_it_changes",
    ),
    "verified_files_never_hashed_again": Mistake(
        "launch/training/checkpoint.py",
        "if self.verified.get(name) != stamp and (found",
        "if name not in self.verified and (found",
        "test_launch_damaged.py::test_each_file_is_hashed_once_unless_it_changes",
    ),
    "readers_take_a_damaged_average": Mistake(
        "launch/training/checkpoint_search.py",
        'WEIGHTS = ("model", "ema")',
        'WEIGHTS = ("model",)',
        "test_launch_damaged.py::test_programs_that_only_read_take_the_one_before_and_rename_nothing",
    ),
    "hash_of_a_part_of_what_is_written": Mistake(
        "common/files.py",
        "        self._digest.update(content)\n",
        "        self._digest.update(content[:64])\n",
        "test_launch_checkpoint.py::test_what_is_saved_comes_back",
    ),
}
