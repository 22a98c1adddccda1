"""Mistakes in figures, in what they are of, and in what is said beside them."""

from tests.mutations import Mistake

MISTAKES = {
    "fid_with_half_of_the_cross_term": Mistake(
        "launch/evaluation/frechet.py", "sigma2.trace() - 2 * cross", "sigma2.trace() - cross",
        "test_launch_metrics.py::test_frechet_distance_of_commuting_gaussians",
    ),
    "biased_covariance": Mistake(
        "launch/evaluation/moments.py", "self.state[1] / (self.count - 1)", "self.state[1] / self.count",
        "test_launch_metrics.py::test_statistics_do_not_depend_on_batches_and_keep_their_digits_far_from_zero",
    ),
    "nearest_neighbour_is_oneself": Mistake(
        "launch/evaluation/precision_recall.py", "topk(min(k + 1, values", "topk(min(k, values",
        "test_launch_metrics.py::test_precision_recall_against_loops",
    ),
    "precision_and_recall_exchanged": Mistake(
        "launch/evaluation/precision_recall.py",
        "return _coverage(real, fake, k, block), _coverage(fake, real",
        "return _coverage(fake, real, k, block), _coverage(fake, real",
        "test_launch_metrics.py::test_precision_recall_against_loops",
    ),
    "inception_score_without_its_logarithm": Mistake(
        "launch/evaluation/inception_score.py", "log_p.logsumexp(0) - math.log(len(part))", "log_p.mean(0)",
        "test_launch_metrics.py::test_inception_score",
    ),
    "kernel_distance_of_images_with_themselves": Mistake(
        "launch/evaluation/kid.py", "[k.sum() - k.diagonal().sum() for k in within]", "[k.sum() for k in within]",
        "test_launch_figures.py::test_kernel_distance_by_its_definition",
    ),
    "moments_joined_as_they_come": Mistake(
        "launch/evaluation/moments.py", "(neighbour, part) if number & 1 else (part, neighbour)", "(neighbour, part)",
        "test_launch_figures.py::test_moments_of_parts_have_the_same_bits_whoever_adds_them",
    ),
    "equal_images_apart": Mistake(
        "launch/evaluation/precision_recall.py", "(beyond.abs() <= slack)", "(beyond.abs() < 0)",
        "test_launch_figures.py::test_equal_images_lie_in_balls_of_radius_0",
    ),
    "any_file_for_inception": Mistake(
        "launch/evaluation/inception.py", "if found == (accepted or SHA256).lower():", "if found:",
        "test_launch_inception.py::test_inception_weights_of_another_network_are_refused",
    ),
    "inception_downloaded_unasked": Mistake(
        "launch/evaluation/inception.py", "    if not allowed:\n", "    if allowed is None:\n",
        "test_launch_inception.py::test_inception_is_downloaded_only_where_that_is_asked_for",
    ),
    "labels_one_beyond_the_classes": Mistake(
        "launch/evaluation/labels.py", "(labels >= (num_classes or np.inf))", "(labels > (num_classes or np.inf))",
        "test_launch_evaluate_notes.py::test_labels_that_do_not_fit_are_refused",
    ),
    "fewer_images_than_promised": Mistake(
        "launch/evaluation/metadata.py", "promised != len(images)", "promised < len(images)",
        "test_launch_evaluate_notes.py::test_as_many_images_as_were_promised_or_an_error",
    ),
    "images_of_classes_in_the_order_of_folders": Mistake(
        "launch/evaluation/encoded_images.py", "key=indices.__getitem__", "key=None",
        "test_launch_image_source.py::test_images_in_folders_of_classes_come_by_index_as_those_of_one_folder",
    ),
    "a_file_of_another_hash_than_described": Mistake(
        "launch/evaluation/metadata.py", '!= entry["sha256"]', "is None",
        "test_launch_evaluate_notes.py::test_a_file_of_other_bytes_than_were_described_is_refused_and_no_hash_is_repeated",
    ),
    "a_self_test_that_cannot_fail": Mistake(
        "launch/evaluation/self_test.py", "_TOLERANCE = 1e-9", "_TOLERANCE = 1e9",
        "test_launch_evaluate_notes.py::test_no_figure_is_taken_where_the_self_test_fails",
    ),
    "positions_scaled_without_dinov2_s_offset": Mistake(
        "launch/evaluation/dinov2.py", "_OFFSET = 0.1", "_OFFSET = 0.0",
        "test_launch_fdd.py::test_positions_are_scaled_as_dinov2_does",
    ),
    "two_processes_measure_a_part": Mistake(
        "launch/evaluation/shares.py", "for r in (rank, rank + 1))", "for r in (rank, rank + 2))",
        "test_launch_evaluate_processes.py::test_shares_are_whole_parts_and_make_up_the_set",
    ),
    "a_reference_by_another_network": Mistake(
        "launch/evaluation/reference.py", "theirs is not None and ours != theirs", "theirs is None and ours != theirs",
        "test_launch_reference.py::test_a_reference_of_another_size_or_network_is_refused",
    ),
    "ssim_of_one_channel": Mistake(
        "vavae/images.py", "(0.01 * 255) ** 2, (0.03 * 255) ** 2", "0.01**2, 0.03**2",
        "test_launch_metrics.py::test_ssim_against_the_formula_written_out",
    ),
    "rfid_of_the_originals": Mistake(
        "launch/evaluation/reconstructions.py",
        "decoded = measure_together(pairs,", "decoded = measure_together(originals,",
        "test_launch_evaluation.py::test_reconstructions",
    ),
}  # fmt: skip
