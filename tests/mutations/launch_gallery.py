"""Mistakes in the page of runs: what it shows, thins, escapes, leaves out."""

from tests.mutations import Mistake

TEXT = "test_launch_gallery.py::"
PAGE, CURVES, VIEWERS = (f"launch/gallery_page/{name}.py" for name in ("page", "curves", "viewers"))

MISTAKES = {
    "gallery_text_of_runs_as_html": Mistake(
        PAGE, "autoescape=True", "autoescape=False", f"{TEXT}test_text_of_a_run_is_text"
    ),
    "gallery_only_the_least_of_a_part": Mistake(
        CURVES,
        "kept |= {int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])}",
        "kept |= {int(finite[values[finite].argmin()])}",
        f"{TEXT}test_thinning_keeps_extremes_ends_and_gaps",
    ),
    "gallery_gaps_are_bridged": Mistake(
        CURVES,
        "            kept.add(int(places[0]))",
        "            pass",
        f"{TEXT}test_thinning_keeps_extremes_ends_and_gaps",
    ),
    "gallery_validation_at_the_row_after": Mistake(
        "launch/run_directory/rows.py",
        'np.searchsorted(self.steps(), steps, side="right") - 1',
        'np.searchsorted(self.steps(), steps, side="right")',
        f"{TEXT}test_curves_are_the_values_of_the_log",
    ),
    "gallery_the_first_positions_alone": Mistake(
        VIEWERS,
        "np.linspace(0, len(items) - 1, most).round().astype(int)",
        "np.arange(most)",
        f"{TEXT}test_no_more_positions_and_classes_than_a_page_takes",
    ),
    "gallery_pictures_of_later_steps": Mistake(
        VIEWERS,
        "step for step in pictures if step <= upto",
        "step for step in pictures if step >= upto",
        f"{TEXT}test_a_position_shows_of_each_run_what_was_last_made",
    ),
    "gallery_samples_of_another_index": Mistake(
        VIEWERS,
        "batch[index - start].numpy()",
        "batch[start - index].numpy()",
        f"{TEXT}test_pictures_are_those_of_the_run_with_words_for_them",
    ),
    "gallery_pictures_without_end": Mistake(
        "launch/gallery_page/media.py",
        "        self._left -= len(text)\n",
        "",
        f"{TEXT}test_pictures_are_bounded_one_by_one_and_together",
    ),
    "gallery_places_of_runs_as_differences": Mistake(
        "launch/gallery_page/configs.py",
        "if key not in PLACES and any(",
        "if any(",
        f"{TEXT}test_one_run_is_compared_with_the_nearest_file_and_the_defaults",
    ),
    "gallery_the_farthest_recipe": Mistake(
        "launch/gallery_page/configs.py",
        "min(found, key=",
        "max(found, key=",
        f"{TEXT}test_every_shipped_file_is_nearest_to_itself",
    ),
    "gallery_keys_of_later_versions_as_differences": Mistake(
        "launch/gallery_page/configs.py",
        "columns = [filled(kind, config) for",
        "columns = [flat(config) for",
        f"{TEXT}test_a_key_that_a_run_of_an_earlier_version_lacks_means_its_default",
    ),
    "gallery_sets_of_latents_as_damage": Mistake(
        VIEWERS,
        ' if "latents_manifest" not in facts]',
        "]",
        f"{TEXT}test_a_set_of_latents_is_no_set_that_cannot_be_read",
    ),
    "gallery_damage_that_nobody_is_told_of": Mistake(
        "launch/gallery_page/sources.py",
        "        found.left_out[path] = reason(path, e)\n",
        "",
        f"{TEXT}test_what_is_damaged_or_half_written_is_named_and_left_out",
    ),
    "gallery_any_file_is_replaced": Mistake(
        "launch/gallery.py",
        "        ours = MARK.encode() in file.read(2000)",
        "        ours = bool(file.read(2000))",
        f"{TEXT}test_the_program_writes_beside_the_run_and_replaces_only_its_own_page",
    ),
}
