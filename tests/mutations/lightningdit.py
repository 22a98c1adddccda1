"""Mistakes in the diffusion model: flow, sampler, network, latents."""

from tests.mutations import Mistake

CONVERSIONS = "test_lightningdit_flow.py::test_conversions"
LOSSES = "test_lightningdit_flow.py::test_losses"
RECORDED_MODEL = "test_lightningdit_model.py::test_output_and_gradients"
ANY_KILL = (
    "test_lightningdit_latents_parts.py::test_a_kill_before_any_change_of_the_disk_loses_nothing_of_the_set "
    "test_lightningdit_latents_parts.py::test_what_is_damaged_is_written_again"
)
NOT_REFUSED = "test_lightningdit_latents_check.py::test_correct_statistics_are_never_refused"
LIKELIHOOD = "test_lightningdit_solvers.py::test_log_likelihood_of_gaussian_data"

MISTAKES = {
    # Flow.
    "noise_and_data_exchanged": Mistake(
        "lightningdit/flow.py", "return alpha * x1 + sigma * x0,", "return alpha * x0 + sigma * x1,", LOSSES,
    ),
    "velocity_away_from_the_data": Mistake(
        "lightningdit/flow.py", "d_alpha * x1 + d_sigma * x0", "d_alpha * x1 - d_sigma * x0", LOSSES,
    ),
    "gvp_derivative": Mistake(
        "lightningdit/flow.py", "return angle.cos(), -math.pi / 2 * angle.sin()", "return angle.cos(), -angle.sin()",
        "test_lightningdit_flow.py::test_derivatives_are_derivatives",
    ),
    "score_with_another_sign": Mistake(
        "lightningdit/flow.py", "self.noise_from_velocity(velocity, x, t) / -self.path",
        "self.noise_from_velocity(velocity, x, t) / self.path", CONVERSIONS,
    ),
    "interval_starts_at_zero": Mistake(
        "lightningdit/flow.py", "return (eps if starts_late else 0.0), end", "return 0.0, end",
        "test_lightningdit_flow.py::test_training_interval",
    ),
    "interval_ends_at_one": Mistake(
        "lightningdit/flow.py", "end = 1 - (last_step_size if sde and last_step_size else eps)", "end = 1 - eps",
        "test_lightningdit_sampler.py::test_sde",
    ),
    "timesteps_uniform": Mistake(
        "lightningdit/flow.py", "(self._logit_normal(u) if lognorm else u)", "u",
        "test_lightningdit_flow.py::test_logit_normal_distribution",
    ),
    "cosine_over_the_batch": Mistake(
        "lightningdit/flow.py", "F.cosine_similarity(pred, velocity, dim=1)",
        "F.cosine_similarity(pred, velocity, dim=2)",
        LOSSES,
    ),
    "loss_weight_not_squared": Mistake(
        "lightningdit/flow.py", '(diffusion / sigma) ** 2 if', '(diffusion / sigma) if', LOSSES,
    ),
    # Sampler.
    "shift_the_other_way": Mistake(
        "lightningdit/solvers.py", "shift * t / (1 + (shift - 1) * t)", "t / (shift + (1 - shift) * t)",
        "test_lightningdit_sampler.py::test_time_grids",
    ),
    "guidance_begins_after_its_start": Mistake(
        "lightningdit/guidance.py", "return self.start <= t <= self.end", "return self.start < t <= self.end",
        "test_lightningdit_sampler.py::test_interval_start_itself_is_guided",
    ),
    "guidance_below_its_start": Mistake(
        "lightningdit/guidance.py", "return self.start <= t <= self.end", "return t <= self.start",
        "test_lightningdit_sampler.py::test_unconditional_half_is_skipped_below_the_interval",
    ),
    "guidance_from_the_condition": Mistake(
        "lightningdit/guidance.py", "        return other + scale * (cond - other)\n",
        "        return cond + scale * (cond - other)\n", "test_lightningdit_sampler.py::test_guided_channels",
    ),
    "other_channels_unconditional": Mistake(
        "lightningdit/guidance.py", "torch.cat([first, cond[:, channels:]], dim=1)",
        "torch.cat([first, other[:, channels:]], dim=1)", "test_lightningdit_sampler.py::test_guided_channels",
    ),
    "dopri5_across_the_start_of_guidance": Mistake(
        "lightningdit/guidance.py", "jumps = set() if guidance is None else {guidance.start, guidance.end}",
        "jumps = set()",
        "test_lightningdit_solvers.py::test_no_adaptive_step_crosses_the_start_of_guidance",
    ),
    "weights_of_heun": Mistake(
        "lightningdit/solvers.py", '"heun": ([(0.0, ()), (1.0, (1.0,))], (1 / 2, 1 / 2))',
        '"heun": ([(0.0, ()), (1.0, (1.0,))], (1 / 4, 3 / 4))',
        "test_lightningdit_solvers.py::test_order_of_convergence",
    ),
    "sde_noise_the_same_at_every_step": Mistake(
        "lightningdit/sampler.py", "            return sample_noise(config.seed, indices, shape, draw=k,",
        "            return sample_noise(config.seed, indices, shape, draw=1,",
        "test_lightningdit_sampler.py::test_every_step_of_the_sde_has_noise_of_its_own",
    ),
    "sde_noise_too_small": Mistake(
        "lightningdit/solvers.py", "(2 * g * dt).sqrt() * noise", "(g * dt).sqrt() * noise",
        "test_lightningdit_sampler.py::test_sde",
    ),
    "sde_drift_without_the_score": Mistake(
        "lightningdit/solvers.py", " + g * self._transport.score(output, x, t)", "",
        "test_lightningdit_sampler.py::test_sde",
    ),
    "likelihood_probed_by_the_starting_noise": Mistake(
        "lightningdit/sampler.py", "latents.shape[1:], draw=1,", "latents.shape[1:], draw=0,",
        "test_lightningdit_sampler.py::test_probes_of_the_likelihood_are_signs_of_their_own",
    ),
    "likelihood_without_the_divergence": Mistake(
        "lightningdit/solvers.py", "standard_normal_logp(noise) + divergence",
        "standard_normal_logp(noise) - divergence",
        LIKELIHOOD,
    ),
    "noise_of_the_place_in_the_batch": Mistake(
        "lightningdit/sampler.py", "generator=generator(seed, int(index), draw)) for index in indices]",
        "generator=generator(seed, row, draw)) for row, _ in enumerate(indices)]",
        "test_lightningdit_sampler.py::test_batching_does_not_change_samples",
    ),
    # Network.
    "modulation_in_another_order": Mistake(
        "lightningdit/model.py", "shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation",
        "scale_attn, shift_attn, gate_attn, scale_mlp, shift_mlp, gate_mlp = modulation", RECORDED_MODEL,
    ),
    "gates_exchanged": Mistake(
        "lightningdit/model.py", "self.mlp.last.deferred_bias, gate_mlp)", "self.mlp.last.deferred_bias, gate_attn)",
        RECORDED_MODEL,
    ),
    "final_scale_and_shift_exchanged": Mistake(
        "lightningdit/model.py", "shift, scale = self.adaLN_modulation(c)", "scale, shift = self.adaLN_modulation(c)",
        RECORDED_MODEL,
    ),
    "eps_of_the_norms": Mistake(
        "lightningdit/model.py", "EPS = 1e-6  #", "EPS = 1e-3  #", RECORDED_MODEL,
    ),
    "channels_before_patches": Mistake(
        "lightningdit/model.py", "x.reshape(B, grid, grid, P, P, C).permute(0, 5, 1, 3, 2, 4)",
        "x.reshape(B, grid, grid, P, P, C).permute(0, 5, 1, 4, 2, 3)", "test_lightningdit_model.py::test_unpatchify",
    ),
    "final_layer_not_zero": Mistake(
        "lightningdit/model.py", "for linear in (*zeroed, self.final_layer.linear):", "for linear in zeroed:",
        "test_lightningdit_model.py::test_starts_as_zero",
    ),
    "halves_of_rope_exchanged": Mistake(
        "lightningdit/embeddings.py", "torch.cat([rows, columns], dim=-1)", "torch.cat([columns, rows], dim=-1)",
        "test_lightningdit_model.py::test_rope_tables",
    ),
    "sines_before_cosines": Mistake(
        "lightningdit/embeddings.py", "torch.cat([angles.cos(), angles.sin()], dim=1)",
        "torch.cat([angles.sin(), angles.cos()], dim=1)", "test_lightningdit_model.py::test_timestep_embedding",
    ),
    "tables_rounded": Mistake(
        "lightningdit/embeddings.py", "            if cast.dtype.itemsize < 4:\n",
        "            if cast.dtype.itemsize < 2:\n",
        "test_lightningdit_model.py::test_tables_stay_float32",
    ),
    "null_label_is_a_class": Mistake(
        "lightningdit/task.py", 'y = y.masked_fill(draws["drop"], null_label)',
        'y = y.masked_fill(draws["drop"], 0)',
        "test_lightningdit_task.py::test_labels_are_dropped_in_training_alone",
    ),
    "labels_dropped_in_validation": Mistake(
        "lightningdit/task.py", 'batch["y"], undropped(draws))', 'batch["y"], draws)',
        "test_lightningdit_task.py::test_labels_are_dropped_in_training_alone",
    ),
    "cosine_term_not_minimised": Mistake(
        "lightningdit/task.py", '{"loss": parts["mse"] + parts["cos_loss"] if', '{"loss": parts["mse"] if',
        "test_lightningdit_task.py::test_step_minimises_both_terms_and_logs_them_apart",
    ),
    "draws_of_every_step_the_same": Mistake(
        "lightningdit/task.py", "generator(seed, step, salt, device=device)",
        "generator(seed, 1, salt, device=device)",
        "test_lightningdit_task.py::test_draws_are_of_seed_and_step_alone",
    ),
    "noise_and_times_of_one_stream": Mistake(
        "lightningdit/task.py", "_INIT, _NOISE, _TIMES, _DROPS = range(1, 5)",
        "_INIT, _NOISE, _TIMES, _DROPS = 1, 2, 2, 2",
        "test_lightningdit_task.py::test_draws_have_their_distributions",
    ),
    "logit_normal_a_step_short": Mistake(
        "lightningdit/task.py", "step <= self._lognorm_until\n", "step < self._lognorm_until\n",
        "test_lightningdit_task.py::test_logit_normal_ends_after_its_step",
    ),
    # Latents.
    "normalised_by_the_variance": Mistake(
        "lightningdit/data.py", "np.divide(x, self._std, out=x)", "np.divide(x, self._std**2, out=x)",
        "test_lightningdit_data.py::test_published_items_in_order",
    ),
    "multiplier_divides": Mistake(
        "lightningdit/data.py", "np.multiply(x, np.float32(self.statistics.multiplier), out=x)",
        "np.divide(x, np.float32(self.statistics.multiplier), out=x)",
        "test_lightningdit_data.py::test_other_multipliers",
    ),
    "mean_added_before_the_deviation": Mistake(
        "lightningdit/latents.py", "return z * std / self.multiplier + mean",
        "return (z + mean) * std / self.multiplier",
        "test_lightningdit_data.py::test_statistics_and_the_way_back",
    ),
    "flips_the_same_in_every_epoch": Mistake(
        "lightningdit/data.py", "mix(self.seed, epochs, indices)", "mix(self.seed, indices)",
        "test_lightningdit_data.py::test_flips_are_a_fair_hash_of_seed_epoch_and_index",
    ),
    "shard_of_the_next_latent": Mistake(
        "lightningdit/data.py", 'np.searchsorted(self._ends, indices, side="right")',
        'np.searchsorted(self._ends, indices, side="left")',
        "test_lightningdit_data.py::test_gathering_from_many_shards",
    ),
    "checksums_not_compared": Mistake(
        "lightningdit/latents.py", "if checksum and (found := sha256(path)) != entry.sha256:",
        "if checksum and not (found := sha256(path)):",
        "test_lightningdit_latents.py::test_flipped_bit",
    ),
    "gap_between_shards_not_noticed": Mistake(
        "lightningdit/latents.py", "        _require_no_gaps(directory, shards)\n", "        pass\n",
        "test_lightningdit_latents_shards.py::test_a_shard_that_is_missing_without_a_manifest_is_named",
    ),
    "shards_begin_where_they_begin": Mistake(
        "lightningdit/latents.py", "range(max(numbers[rank], default=0) + 1)",
        "range(min(numbers[rank], default=0), max(numbers[rank], default=0) + 1)",
        "test_lightningdit_latents_shards.py::test_a_shard_that_is_missing_without_a_manifest_is_named",
    ),
    "duplicates_of_shards_counted": Mistake(
        "lightningdit/latents.py", "if SHARD_NAME.fullmatch(path.name))", 'if path.name.startswith("latents_rank"))',
        "test_lightningdit_latents_shards.py::test_a_file_of_another_name_is_left_out_and_said",
    ),
    "statistics_of_one_channel_for_all": Mistake(
        "lightningdit/latents.py", "not in ((c,), (1, c), (c, 1, 1), (1, c, 1, 1))",
        "not in ((c,), (1, c), (c, 1, 1), (1, c, 1, 1), (1,))",
        "test_lightningdit_latents_statistics.py::test_statistics_of_another_shape_or_of_other_numbers_are_refused",
    ),
    "statistics_not_compared_with_the_manifest": Mistake(
        "lightningdit/latents.py", "if not all(\n            torch.equal(", "if not any(\n            torch.equal(",
        "test_lightningdit_latents_statistics.py::test_a_statistics_file_unlike_its_manifest_is_named",
    ),
    "last_label_without_a_name": Mistake(
        "lightningdit/data.py", "high >= named", "high > named",
        "test_lightningdit_latents_shards.py::test_labels_without_a_name_are_refused",
    ),
    "statistics_of_the_last_shard": Mistake(
        "lightningdit/latents_writer.py", "merge_moments(shard.moments for shard in shards)",
        "merge_moments(shard.moments for shard in shards[-1:])",
        "test_lightningdit_latents.py::test_statistics_are_of_the_whole_set",
    ),
    "latents_that_are_not_finite_stored": Mistake(
        "lightningdit/latents_writer.py", "        if torch.isfinite(stored).all():", "        if stored.dtype != 0:",
        "test_lightningdit_latents.py::test_writer_refuses",
    ),
    "record_of_a_shard_written_in_place": Mistake(
        "lightningdit/latents_writer.py", 'write_checksummed(path.with_suffix(".json"), record)',
        'path.with_suffix(".json").write_text(json.dumps(record))',
        "test_common_writers.py::test_nothing_else_writes_files",
    ),
    "part_counted_before_it_is_there": Mistake(
        "lightningdit/latents_parts.py", "        if path_exists(beside):\n", "        if True:\n", ANY_KILL,
    ),
    "parts_of_a_killed_process_left": Mistake(
        "lightningdit/latents_parts.py", "        if path.name not in known:\n            path.unlink()\n",
        "        if path.name not in known:\n            pass\n", ANY_KILL,
    ),
    "halves_of_a_killed_process_left": Mistake(
        "lightningdit/latents_parts.py", 'glob(".latents_rank*.tmp"):\n        leftover.unlink()',
        'glob(".latents_rank*.tmp"):\n        pass', ANY_KILL,
    ),
    "part_removed_before_its_record": Mistake(
        "lightningdit/latents_parts.py", '''\
    path.with_suffix(".json").unlink(missing_ok=True)
    path.unlink(missing_ok=True)
''', '''\
    path.unlink(missing_ok=True)
    path.with_suffix(".json").unlink(missing_ok=True)
''', ANY_KILL,
    ),
    "parts_removed_before_their_shard_is_there": Mistake(
        "lightningdit/latents_writer.py", '''\
            if number not in whole:
                self._join(''', '''\
            for part in parts[number]:
                (self.directory / part.file).with_suffix(".json").unlink()
            if number not in whole:
                self._join(''', ANY_KILL,
    ),
    "parts_joined_in_the_order_of_processes": Mistake(
        "lightningdit/latents_writer.py", "sorted(parts[number], key=lambda part: part.rows)", "parts[number][::-1]",
        "test_lightningdit_latents_parts.py::test_any_number_of_processes_writes_the_same_files",
    ),
    "rows_that_are_missing_not_noticed": Mistake(
        "lightningdit/latents_writer.py", "            if part.start != self._start + self._filled:\n",
        "            if False:\n",
        "test_lightningdit_latents_parts.py::test_rows_that_are_missing_when_parts_are_joined_are_named",
    ),
    "beyond_float16_stored": Mistake(
        "lightningdit/latents_writer.py", "self._require_finite(into, value[start : start + taken])",
        "self._require_finite(value, value)",
        "test_lightningdit_latents_stores.py::test_values_beyond_float16_are_refused",
    ),
    "variance_of_posteriors_left_out": Mistake(
        "lightningdit/latents_statistics.py", "/ max(count - 1, 1) + variance)", "/ max(count - 1, 1))",
        "test_lightningdit_latents_stores.py::test_statistics_of_moments_are_those_of_the_samples",
    ),
    "sample_of_moments_the_same_in_every_epoch": Mistake(
        "lightningdit/data.py", "draw_noise(row, self.seed, int(epoch), index)", "draw_noise(row, self.seed, 0, index)",
        "test_lightningdit_latents_stores.py::test_moments_are_drawn_by_seed_epoch_and_index",
    ),
    "errors_of_statistics_over_positions": Mistake(
        "lightningdit/latents_statistics.py", "spread_of_mean / math.sqrt(count)", "spread_of_mean / math.sqrt(values)",
        NOT_REFUSED,
    ),
    "statistics_refused_by_5_percent_alone": Mistake(
        "lightningdit/latents_statistics.py", "STANDARD_ERRORS = 5.0", "STANDARD_ERRORS = 0.0", NOT_REFUSED,
    ),
    "statistics_refused_by_errors_alone": Mistake(
        "lightningdit/latents_statistics.py", "TOLERANCE = 0.05 ", "TOLERANCE = 0.0 ",
        "test_lightningdit_latents_check.py::test_what_is_less_than_5_percent_off_is_not_refused",
    ),
    "statistics_compared_at_a_period": Mistake(
        "lightningdit/latents_statistics.py", "return edges[:-1] + (mix(", "return edges[:-1] + 0 * (mix(",
        "test_lightningdit_latents_check.py::test_labels_that_go_round_do_not_make_a_period",
    ),
    "statistics_not_compared_at_the_start": Mistake(
        "lightningdit/data.py", "        if config.check_statistics:\n", "        if False:\n",
        "test_lightningdit_latents_check.py::test_training_does_not_begin_with_statistics_of_other_latents",
    ),
    "shards_not_synchronised": Mistake(
        "common/tensors.py", "    with atomic_write(path) as f:\n        hashing = HashingWriter(f)",
        '    with open(path, "wb") as f:\n        hashing = HashingWriter(f)',
        "test_common_writers.py::test_nothing_else_writes_files",
    ),
    "export_written_in_place": Mistake(
        "lightningdit/weights.py", "    with atomic_write(tensors_path) as f:\n",
        '    with open(tensors_path, "wb") as f:\n',
        "test_common_writers.py::test_nothing_else_writes_files",
    ),
    "flops_without_attention": Mistake(
        "lightningdit/cost.py", "feed_forward + 2 * N * D", "feed_forward",
        "test_lightningdit_config.py::test_flops_are_those_torch_counts",
    ),
}  # fmt: skip
