"""Mistakes in pipelines of diffusers, model cards, and the way to the hub and back."""

from tests.mutations import Mistake

PIPELINE, CODE = "launch/exporting/pipeline.py", "launch/exporting/lightningdit_pipeline.py"
SETTINGS = "test_launch_export_pipeline.py::test_settings_travel_and_sample_the_same_latents"
LOADED = "test_launch_export_pipeline.py::test_a_run_becomes_a_pipeline_that_stock_diffusers_loads"
ROUNDING = "test_launch_export_pipeline.py::test_the_network_is_ours_to_rounding"
MISTAKES = {
    "the_shift_not_turned_round": Mistake(
        "launch/pipelines.py", "return 1 / timestep_shift if", "return timestep_shift if", SETTINGS
    ),
    "points_taken_for_steps": Mistake(
        PIPELINE, "settings.num_sampling_steps - 1,", "settings.num_sampling_steps,", SETTINGS
    ),
    "other_channels_unconditional": Mistake(CODE, "cond[:, channels:]]", "uncond[:, channels:]]", SETTINGS),
    "the_velocity_not_turned_round": Mistake(CODE, "step(-velocity,", "step(velocity,", LOADED),
    "a_latent_statistic_left_out": Mistake(CODE, "config.scaling_factor + mean\n", "config.scaling_factor\n", LOADED),
    "tables_cast_with_the_weights": Mistake(
        CODE, "getattr(self, name).dtype != table.dtype:", "table.dtype == torch.float64:", ROUNDING
    ),
    "shift_and_scale_swapped": Mistake(
        CODE, "(*vectors[1:3], *vectors[4:])", "(*vectors[:2], *vectors[4:])", ROUNDING
    ),
    "rows_and_columns_of_rope_swapped": Mistake(
        CODE, "torch.cat([rows, columns], dim=-1).reshape", "torch.cat([columns, rows], dim=-1).reshape", ROUNDING
    ),
    "any_tables_of_positions_dropped": Mistake(
        PIPELINE, "if different := different_tables(self.network):", "if different := []:",
        "test_launch_export_pipeline.py::test_what_no_pipeline_expresses_is_said",
    ),
    "another_models_figures_on_the_card": Mistake(
        "launch/exporting/card.py", "not in (None, sha256):", "is ...:",
        "test_launch_export_card.py::test_figures_of_other_weights_are_refused",
    ),
    "figures_beside_a_run_taken_unseen": Mistake(
        "launch/exporting/card.py", "result.hash_of(named) == hashes[named] and ", "",
        "test_launch_export_card.py::test_a_pipelines_card_has_the_figures_that_lie_beside_the_run",
    ),
    "figures_of_samples_on_a_tokenizers_card": Mistake(
        "launch/exporting/card.py", 'of_samples != ("model" in hashes)', "of_samples is ...",
        "test_launch_export_card.py::test_a_tokenizers_card_takes_no_figures_of_samples",
    ),
    "figures_decoded_by_another_tokenizer": Mistake(
        "launch/exporting/pipeline.py", "figures_of(results, beside, hashes)",
        'figures_of(results, beside, {"model": hashes["model"]})',
        "test_launch_export_card.py::test_figures_decoded_by_another_tokenizer_are_refused",
    ),
    "folders_told_to_others": Mistake(
        "launch/exporting/networks.py", "return Path(self.source).name", "return self.source",
        "test_launch_export_card.py::test_what_goes_to_others_tells_no_folder_of_this_machine",
    ),
    "one_of_two_statistics_taken_for_none": Mistake(
        "launch/pipelines.py", "if (mean is None) != (std is None):", "if False:",
        "test_launch_export_diffusers.py::test_a_folder_of_diffusers_keeps_the_statistics_it_states",
    ),
    "what_model_index_says_ignored": Mistake(
        "launch/pipelines.py", "stored | own)", "own | stored)",
        "test_launch_export_pipeline.py::test_programs_take_the_folder_for_network_and_tokenizer",
    ),
    "generators_left_over": Mistake(
        CODE, "and len(generator) != count:", "and len(generator) < count:",
        "test_launch_export_pipeline.py::test_calls_that_mean_nothing_are_refused",
    ),
    "code_taken_from_the_hub": Mistake(
        "launch/hub.py", '("*.json", "*.safetensors")', '("*",)',
        "test_launch_hub.py::test_a_network_is_sampled_from_the_hub",
    ),
    "names_without_the_prefix_downloaded": Mistake(
        "launch/hub.py", 're.compile(r"hf:/+")', 're.compile(r"(hf:/+)?")',
        "test_launch_hub.py::test_without_the_prefix_nothing_is_asked_of_the_net",
    ),
    "a_damaged_pipeline_read": Mistake(
        "launch/pipelines.py", "(found := sha256(weights)) != said.sha256", "(found := said.sha256) != said.sha256",
        "test_launch_export_pipeline.py::test_programs_take_the_folder_for_network_and_tokenizer",
    ),
    "weights_that_a_file_has_not_taken_for_others": Mistake(
        "launch/exporting/sources.py", "if weights not in (None, taken):", "if weights is ...:",
        "test_launch_export_diffusers.py::test_what_cannot_be_a_folder_is_said",
    ),
}  # fmt: skip
