"""Mistakes in extracting latents."""

from tests.mutations import Mistake

ONE_EXTRACTION = "test_launch_extract.py::test_two_processes_write_a_half_each_and_together_the_same_set"
SHARED_ROWS = "test_launch_extract.py::test_processes_share_the_batches_that_are_missing"
KILLED_AND_FINISHED = (
    "test_launch_extract_processes.py::test_three_processes_killed_and_finished_by_two_leave_the_files_of_one"
)
WRONG_AT_THE_END = "test_launch_round_trip.py::test_latents_that_are_not_the_images_are_found_at_the_end"

MISTAKES = {
    "extraction_with_rank_0_everywhere": Mistake(
        "launch/extraction/encoding.py", "for r in (rank, rank + 1))", "for r in (0, 1))",
        f"{ONE_EXTRACTION} {SHARED_ROWS}",
    ),
    "extraction_of_everything_by_every_process": Mistake(
        "launch/extraction/encoding.py", "for r in (rank, rank + 1))", "for r in (0, world_size))", SHARED_ROWS,
    ),
    "extraction_of_half_encoded_batches_left_out": Mistake(
        "launch/extraction/encoding.py", "if not done[start:stop].all()]", "if not done[start:stop].any()]",
        SHARED_ROWS,
    ),
    "extraction_joins_the_parts_of_one_process": Mistake(
        "launch/extract.py", "records = [*found, *_together(processes, writer.records)]\n    writer.merge(",
        "records = [*found, *writer.records]\n    writer.merge(", KILLED_AND_FINISHED,
    ),
    "extraction_goes_on_without_what_was_found": Mistake(
        "launch/extract.py", "records = [*found, *_together(processes, writer.records)]\n    writer.merge(",
        "records = _together(processes, writer.records)\n    writer.merge(", KILLED_AND_FINISHED,
    ),
    "extraction_goes_on_with_other_labels": Mistake(
        "launch/extract.py", "    digest.update(images.labels.numpy().tobytes())\n", "",
        "test_launch_extract.py::test_corrected_labels_may_not_go_on_with_these_shards",
    ),
    "extraction_in_another_precision": Mistake(
        "launch/extract.py", ".to(getattr(torch, precision))", ".to(torch.float32)",
        "test_launch_extract.py::test_the_precision_that_is_stated_is_the_one_that_encodes",
    ),
    "mirrored_along_the_rows": Mistake(
        "launch/extraction/encoding.py", "images.flip(-1)", "images.flip(-2)",
        "test_launch_extract.py::test_one_sample_of_each_image_and_of_its_mirror_image",
    ),
    "one_noise_for_both": Mistake(
        "launch/extraction/encoding.py", "torch.cat(noise.unbind(1))", "torch.cat([noise[:, 0], noise[:, 0]])",
        "test_launch_extract.py::test_one_sample_of_each_image_and_of_its_mirror_image",
    ),
    "extraction_noise_the_same_for_every_image": Mistake(
        "launch/extraction/encoding.py", "seeds.EXTRACTION_NOISE, index)", "seeds.EXTRACTION_NOISE, 0)",
        "test_launch_extract.py::test_one_sample_of_each_image_and_of_its_mirror_image",
    ),
    "variance_stored_for_the_deviation": Mistake(
        "launch/extraction/encoding.py", "[posterior.mean, posterior.std]", "[posterior.mean, posterior.var]",
        "test_launch_round_trip.py::test_every_store_in_every_dtype_is_what_the_posterior_says",
    ),
    "sample_stored_for_the_mean": Mistake(
        "launch/extraction/encoding.py", 'posterior.mode() if store == "mean" else', 'posterior.mode() if False else',
        "test_launch_round_trip.py::test_every_store_in_every_dtype_is_what_the_posterior_says",
    ),
    "stored_latents_not_compared": Mistake(
        "launch/extraction/round_trip.py", "wrong = ~(found >= trip.least)", "wrong = found != found", WRONG_AT_THE_END,
    ),
    "mirrored_stored_latents_not_compared": Mistake(
        "launch/extraction/round_trip.py", "trip.indices, flip) for flip in (False, True)]",
        "trip.indices, False) for flip in (False, True)]",
        "test_launch_round_trip.py::test_the_figures_are_those_of_what_is_stored",
    ),
    "statistics_not_compared_at_the_end": Mistake(
        "launch/extraction/round_trip.py", "    check_statistics(latents)\n", "",
        "test_launch_round_trip.py::test_statistics_that_do_not_fit_are_found_at_the_end",
    ),
    "set_complete_before_it_is_looked_at": Mistake(
        "launch/extract.py", "complete = partial(complete, records, check=check)",
        "complete = partial(complete, records)", WRONG_AT_THE_END,
    ),
    "extraction_goes_on_with_other_batches": Mistake(
        "launch/extract.py", '        "batch_size": batch_size,\n', "",
        "test_launch_extract.py::test_what_changes_the_bits_may_not_change_on_the_way",
    ),
    "a_folder_of_diffusers_is_a_run": Mistake(
        "launch/extract.py", "if not weights_file(path).is_dir():", "if not path.is_dir():",
        "test_launch_export_diffusers.py::test_programs_take_the_folder_for_a_tokenizer",
    ),
}  # fmt: skip
