"""Mistakes in latents that lie in devices' memory, and in where they are placed."""

from tests.mutations import Mistake

BATCHES, LATENTS = "launch/training/device_batches.py", "lightningdit/device_latents.py"
PLACEMENT = "launch/training/placement.py"
ALONE = "test_launch_device_batches.py::test_the_batches_of_the_host_loader"
OF_THREE = "test_launch_device_batches.py::test_processes_send_each_other_what_each_needs[3]"
AHEAD = "test_launch_device_batches.py::test_steps_are_made_ready_one_ahead_in_a_stream_of_their_own"
AUTO = "test_launch_device_batches.py::test_auto_is_the_device_where_it_has_room_and_the_host_else"
PARTS = "test_lightningdit_device_latents.py::test_parts_hold_every_latent_once_and_its_mirror_image"

MISTAKES = {
    "rows_in_the_order_that_they_arrive_in": Mistake(
        BATCHES, '''places[np.argsort(holders[own], kind="stable")] = np.arange(len(places))''',
        "places[:] = np.arange(len(places))", OF_THREE,
    ),
    "places_by_the_other_permutation": Mistake(
        BATCHES, '''places[np.argsort(holders[own], kind="stable")] = np.arange(len(places))''',
        '''places[:] = np.argsort(holders[own], kind="stable")''', OF_THREE,
    ),
    "counts_sent_and_received_the_other_way_round": Mistake(
        BATCHES, "tuple(held.sum(1).tolist()), tuple(received.tolist())",
        "tuple(received.tolist()), tuple(held.sum(1).tolist())",
        "test_launch_device_batches.py::test_the_exchange_knows_all_sizes_beforehand",
    ),
    "samples_of_the_first_step_of_a_block_alone": Mistake(
        BATCHES, "for step in steps]", "for step in [steps[0]] * len(steps)]", ALONE,
    ),
    "blocks_that_run_past_the_last_step": Mistake(
        BATCHES, "range(s, min(s + at_once, last_step + 1))", "range(s, s + at_once)", ALONE,
    ),
    "flips_of_the_first_epoch": Mistake(
        BATCHES, "latents.data.flips(epochs, indices)", "latents.data.flips(epochs * 0, indices)", ALONE,
    ),
    "noise_of_another_epoch": Mistake(
        BATCHES, "draw_noise(row, data.seed, epoch, index)", "draw_noise(row, data.seed, epoch + 1, index)", ALONE,
    ),
    "labels_in_the_order_of_the_set": Mistake(
        BATCHES, "labels[torch.from_numpy(indices[own])]", "labels[torch.from_numpy(np.sort(indices[own]))]", ALONE,
    ),
    "nothing_made_ready_ahead": Mistake(
        BATCHES, """\
            coming = self._make_ready(plan)
            if current is not None:
                yield current
""", """\
            if current is not None:
                yield current
            coming = self._make_ready(plan)
""", AHEAD,
    ),
    "the_other_stream_is_not_waited_for": Mistake(
        BATCHES, "            present.wait_event(ready.event)\n", "", AHEAD,
    ),
    "memory_of_the_other_stream_is_taken_too_early": Mistake(
        BATCHES, "value.record_stream(present)", "value.data_ptr()", AHEAD,
    ),
    "mirror_images_never": Mistake(
        LATENTS, " + flips * self._sizes[ranks]", "", ALONE,
    ),
    "mirror_images_over_the_plain_ones": Mistake(
        LATENTS, "behind = int(mirrored) * int(self._sizes[self.rank])", "behind = 0", PARTS,
    ),
    "every_process_holds_the_first_part": Mistake(
        LATENTS, "first, cuda = int(self._bounds[self.rank])", "first, cuda = int(self._bounds[0])", PARTS,
    ),
    "last_latents_of_a_part_not_read": Mistake(
        LATENTS, "min(start + step, size)) for start", "min(start + step, size - 1)) for start",
        "test_lightningdit_device_latents.py::test_parts_hold_every_latent_once_and_its_mirror_image[1-33554432]",
    ),
    "sum_and_product_fused": Mistake(
        LATENTS, "(noise * stored[:, 1]).add_(stored[:, 0])",
        "torch.addcmul(stored[:, 0].double(), noise.double(), stored[:, 1].double()).float()", ALONE,
    ),
    "multiplier_left_out_on_the_device": Mistake(
        LATENTS, "if data.statistics.multiplier != 1:", "if data.statistics.multiplier == 1:", ALONE,
    ),
    "memory_not_given_back": Mistake(
        LATENTS, '''        """Give the memory back; `load` reads it again."""
        self.rows = None
''', '''        """Give the memory back; `load` reads it again."""
''', "test_lightningdit_device_latents.py::test_it_is_read_once_until_its_memory_is_given_back",
    ),
    "second_shard_read_from_the_first_s_place": Mistake(
        "lightningdit/data.py", "(begin - int(self._starts[shard])) * self.row_bytes",
        "(begin - start) * self.row_bytes", PARTS,
    ),
    "one_read_for_all": Mistake(
        "lightningdit/data.py", "content, offset = content[read:], offset + read", "break",
        "test_lightningdit_device_latents.py::test_reads_that_come_in_pieces_are_whole",
    ),
    "float32_never_rounded": Mistake(
        "lightningdit/data.py", "return out if self.memory_dtype == self.dtype else values.copy_",
        "return out if True else values.copy_",
        "test_lightningdit_latents_stores.py::test_what_is_stored_may_be_rounded_to_bfloat16_before_it_is_used",
    ),
    "float16_never_rounded": Mistake(
        "lightningdit/data.py", ".view(out.shape).to(self.memory_dtype))", ".view(out.shape))",
        "test_lightningdit_latents_stores.py::test_what_is_stored_may_be_rounded_to_bfloat16_before_it_is_used",
    ),
    "latent_dtype_ignored": Mistake(
        "lightningdit/data.py", "latent_dtype=getattr(torch, config.latent_dtype),", "",
        "test_launch_device_batches.py::test_bfloat16_trains_to_the_same_bits_wherever_it_lies",
    ),
    "nothing_left_spare": Mistake(PLACEMENT, "free * (1 - SPARE)", "free", AUTO),
    "most_free_memory_of_any": Mistake(PLACEMENT, "free = min(processes", "free = max(processes", AUTO),
    "room_for_latents_alone": Mistake(
        PLACEMENT, "placed.bytes + training > free:  # an", "placed.bytes > free:  # an",
        "test_launch_device_batches.py::test_what_is_asked_for_and_does_not_fit_is_refused_with_figures",
    ),
    "estimate_for_one_process": Mistake(
        PLACEMENT, "setup_of(run, processes)", "setup_of(run, 1)",
        "test_launch_device_batches.py::test_the_estimate_of_training_is_that_of_the_dry_run",
    ),
    "trained_from_the_host_all_the_same": Mistake(
        "launch/training/trainer.py", "self.task.batches if self._on_device is None else self._on_device,",
        "self.task.batches,", "test_launch_device_batches.py::test_bfloat16_trains_to_the_same_bits_wherever_it_lies",
    ),
}  # fmt: skip
