"""Mistakes in sampling and decoding."""

from tests.mutations import Mistake

SAME_BITS = "test_launch_sampling.py::test_batches_processes_and_threads_change_no_bit"
UNITS = "test_launch_sampling.py::test_units_batches_and_shares"
SHARED_BATCHES = "test_launch_sample.py::test_each_batch_is_made_by_one_process"
KILLED = "test_launch_sampling.py::test_what_was_killed_goes_on_and_leaves_the_same_files"
LABELS = "test_launch_sampling_labels.py"
REFUSED = "test_launch_decode.py::test_what_is_not_whole_or_not_the_tokenizer_s_is_refused"

MISTAKES = {
    "units_of_a_batch_s_size": Mistake(
        "launch/sampling/pipeline.py",
        "[self._pool.submit(self._run_unit, range(first, first + self.unit)) for first",
        "[self._pool.submit(self._run_unit, range(first, min(first + self.unit, stop))) for first",
        SAME_BITS,
    ),
    "units_by_as_many_threads_as_torch_uses": Mistake(
        "launch/sampling/pipeline.py",
        "initargs=(1,)",
        "initargs=(torch.get_num_threads(),)",
        SAME_BITS,
    ),
    "sampling_of_the_first_process_s_batches": Mistake(
        "launch/sampling/units.py",
        "for r in (rank, rank + 1))",
        "for r in (0, 1))",
        f"{SHARED_BATCHES} {UNITS}",
    ),
    "sampling_of_all_batches_by_all": Mistake(
        "launch/sampling/units.py",
        "for r in (rank, rank + 1))",
        "for r in (0, world_size))",
        f"{SHARED_BATCHES} {UNITS}",
    ),
    "units_half_done_left_out": Mistake(
        "launch/sampling/units.py",
        "reshape(-1, unit).all(1)",
        "reshape(-1, unit).any(1)",
        UNITS,
    ),
    "parts_without_their_temporary_files_cleared": Mistake(
        "launch/sampling/parts.py",
        'self.directory.glob(".*.tmp")',
        'self.directory.glob("*.tmp.none")',
        KILLED,
    ),
    "samples_described_before_they_are_there": Mistake(
        "launch/sampling/produce.py",
        "    found = job.format.gather(",
        "    write_json(job.description, job.facts)\n    found = job.format.gather(",
        "test_launch_sample.py::test_a_damaged_part_is_named_and_made_again",
    ),
    "sampling_in_another_precision": Mistake(
        "launch/sampling/generator.py",
        "self.model.to(device, getattr(torch, self.settings.precision))",
        "self.model.to(device)",
        "test_launch_sample.py::test_the_network_runs_in_the_precision_that_is_stated",
    ),
    "latents_decoded_as_they_are": Mistake(
        "launch/sampling/generator.py",
        '"z": self.statistics.denormalise(made.latents)',
        '"z": made.latents',
        "test_launch_sample.py::test_the_pixels_are_the_decoded_denormalised_samples",
    ),
    "samples_not_looked_at": Mistake(
        "launch/sampling/generator.py",
        "    if not finite.all():",
        "    if finite is None:",
        "test_launch_sample.py::test_a_sample_that_is_not_finite_is_named_and_its_batch_not_kept",
    ),
    "balanced_in_one_order": Mistake(
        "launch/sampling/labels.py",
        "mix(seed, run, np.arange(num_classes), _BALANCED)",
        "mix(seed, 0, np.arange(num_classes), _BALANCED)",
        f"{LABELS}::test_by_index_and_in_equal_shares",
    ),
    "random_labels_of_every_seed": Mistake(
        "launch/sampling/labels.py",
        "mix(seed, i, 0, _RANDOM)",
        "mix(0, i, 0, _RANDOM)",
        f"{LABELS}::test_another_seed_gives_other_labels",
    ),
    "samples_of_any_transport": Mistake(
        "launch/sampling/facts.py",
        '        "transport": _sampled_by(transport),\n',
        "",
        "test_launch_sampling_transport.py::test_samples_of_another_transport_are_not_mixed",
    ),
    "decoding_without_comparing_the_number": Mistake(
        "launch/decode.py",
        'description.get("num_samples") != len(data)',
        'description.get("num_samples") is None',
        REFUSED,
    ),
    "decoding_by_another_tokenizer": Mistake(
        "launch/decode.py",
        "    statistics_for(tokenizer, latents)",
        "    len(latents.parts)",
        REFUSED,
    ),
    "decoding_without_looking_at_statistics": Mistake(
        "launch/decode.py",
        "    check_statistics(data)\n",
        "",
        REFUSED,
    ),
    "noise_along_a_line": Mistake(
        "launch/sampling/strips.py",
        "if theta.sin() < 1e-6:",
        "if theta.sin() < 2:",
        "test_launch_show.py::test_slerp_keeps_the_length_and_ends_where_it_should",
    ),
    "null_label_blended": Mistake(
        "launch/sampling/strips.py",
        "if self.null_label is not None:",
        "if self.null_label == -1:",
        "test_launch_show.py::test_labels_blend_along_a_line_and_the_null_label_does_not",
    ),
    "nearest_of_the_last_batch": Mistake(
        "launch/sampling/neighbours.py",
        "torch.cat([distances, near], 1)",
        "torch.cat([distances + 1, near], 1)",
        "test_launch_show.py::test_nearest_images_are_those_of_brute_force",
    ),
}
