"""Mistakes in plans for runs that are not made, and in checkpointing of every k-th block."""

from tests.mutations import Mistake

MEMORY, PLAN = "test_launch_memory.py::test_an_engine_holds_what_is_estimated", "test_launch_dry_run.py::test_"

MISTAKES = {
    "gib_of_ten_to_the_nine": Mistake(
        "launch/training/memory.py", "GIB = 2**30", "GIB = 10**9", f"{PLAN}memory_is_said_in_units_of_1024_cubed",
    ),
    "plan_without_master_weights": Mistake(
        "launch/training/memory.py", "(FLOAT32 if bf16 or stage > 0 else 0)  #", "(FLOAT32 if bf16 else 0)  #",
        f"{PLAN}float32_keeps_a_master_copy_only_where_it_is_sharded",
    ),
    "plan_without_the_copy_of_bfloat16_weights": Mistake(
        "launch/training/memory.py", "copy = weight if bf16 else 0", "copy = 0", MEMORY,
    ),
    "micro_batches_that_divide_nothing": Mistake(
        "launch/training/micro_batches.py", "if self.per_process % d == 0]", "]",
        f"{PLAN}the_largest_micro_batch_divides_and_fits",
    ),
    "plan_of_the_whole_card": Mistake(
        "launch/training/memory.py", "return card * (1 - FRAGMENTATION) - CONTEXT", "return card",
        f"{PLAN}the_largest_micro_batch_divides_and_fits",
    ),
    "latents_on_every_device_whole": Mistake(
        "launch/training/planned_data.py", "        processes=processes,\n", "        processes=1,\n",
        f"{PLAN}latents_on_the_device_are_counted",
    ),
    "latents_in_the_dtype_that_is_asked_for": Mistake(
        "launch/training/planned_data.py", "here.memory_dtype if here else ", "",
        f"{PLAN}latents_that_are_here_are_counted_as_they_are_held_and_stored",
    ),
    "checkpoints_kept_for_ever_are_not_counted": Mistake(
        "launch/training/dry_run.py", "keep_every=train.keep_every", "keep_every=None",
        f"{PLAN}every_size_has_a_recipe_that_eight_gpus_of_80_gib_hold[b]",
    ),
    "pinned_blocks_are_not_rounded_up": Mistake(
        "launch/training/memory.py", "(_power_of_two(block) if pinned else block)", "block",
        "test_launch_memory.py::test_host_memory_of_a_save_and_what_of_a_card_is_counted_on",
    ),
    "previews_are_not_counted": Mistake(
        "launch/training/costs.py", "(validated or previews + judged > 0)", "validated",
        "test_launch_previews.py::test_a_plan_counts_previews_of_5_images",
    ),
    "stages_that_the_options_refuse": Mistake(
        "launch/training/dry_run.py", "        engine_options(changed.train, changed.deepspeed)\n", "",
        f"{PLAN}stages_are_those_that_the_run_itself_would_take",
    ),
    "peak_of_bfloat16_for_float32": Mistake(
        "launch/scaling_model/inputs.py", "SHEETS[PEAK_OF].peak(precision)", 'SHEETS[PEAK_OF].peak("bfloat16")',
        "test_launch_scaling.py::test_a_share_of_the_peak_is_that_of_the_precision",
    ),
    "previews_after_the_last_step_unsaid": Mistake(
        "launch/training/remarks.py", "shown is not None and shown > steps", "shown is not None and shown < 0",
        "test_launch_remarks.py::test_previews_after_the_last_step_are_said",
    ),
    "stages_begin_an_epoch_late": Mistake(
        "launch/training/remarks.py", "        begin += stage.epochs\n    return lines",
        "        begin += stage.epochs + 1\n    return lines",
        "test_launch_remarks.py::test_stages_are_listed_with_their_epochs",
    ),
    "plan_opens_images_by_another_decoder": Mistake(
        "launch/training/planned_data.py", "crop=run.data.crop, cached=True)[0]", "crop=run.data.crop)[0]",
        f"{PLAN}a_plan_names_one_decoder_where_images_are_kept",
    ),
    "every_other_block_but_one": Mistake(
        "kernels/compile/recompute.py", "block % k == 0", "block % (k + 1) == 0",
        "test_lightningdit_checkpointing.py::test_every_kth_block_is_computed_again",
    ),
    "every_kth_block_is_counted_as_all": Mistake(
        "lightningdit/cost.py", "(depth - checkpointed) * per_block", "0 * per_block",
        "test_step_memory.py::test_of_two_blocks_one_is_kept_where_every_second_is_checkpointed",
    ),
}  # fmt: skip
