"""Mistakes in the tokenizer: images, losses, network."""

from tests.mutations import Mistake

FOUNDATION = "test_vavae_foundation_models.py"
GENERATOR = "test_vavae_loss.py::test_generator_loss_matches_the_recorded"
CROPS = "test_vavae_data.py::test_crops_match_the_recorded"
PLAN = "test_vavae_decoders.py::test_a_plan_cuts_the_square_of_the_upright_image"
PHOTOGRAPHS = "test_vavae_decoders.py::test_photographs_are_those_of_pillow"
ODD_FILES = "test_vavae_decoders.py::test_every_file_has_pillows_size_orientation_and_colours"
DIFFUSERS = "test_vavae_diffusers.py"
EVERYWHERE = "test_vavae_data.py::test_random_crops_are_cut_from_the_scaled_image_everywhere"

MISTAKES = {
    # Images.
    "last_row_of_a_crop_never_drawn": Mistake(
        "vavae/decoders/plan.py", "% (height - size + 1)", "% max(height - size, 1)", EVERYWHERE,
    ),
    "last_column_of_a_crop_never_drawn": Mistake(
        "vavae/decoders/plan.py", "% (width - size + 1)", "% max(width - size, 1)", EVERYWHERE,
    ),
    "crop_the_same_in_every_epoch": Mistake(
        "vavae/data.py", "seeds.CROP, epochs, indices)", "seeds.CROP, 0, indices)",
        "test_vavae_data.py::test_a_sample_depends_on_seed_epoch_and_index_alone",
    ),
    "label_of_the_image_asked_for": Mistake(
        "vavae/data.py", '"y": self.labels[found]}', '"y": self.labels[indices]}',
        "test_vavae_data.py::test_a_broken_image_is_skipped_and_counted_where_allowed",
    ),
    "classes_in_the_order_of_the_disk": Mistake(
        "vavae/sources/listing.py", "return tuple(sorted(names))", "return tuple(sorted(names, reverse=True))",
        "test_vavae_data.py::test_classes_are_sorted_folders_and_paths_are_sorted",
    ),
    "validation_numbers_in_sorted_order": Mistake(
        "vavae/sources/imagenet_labels.py", "synset = order.get(int(text)) if",
        "synset = dict(enumerate(sorted(order.values()), 1)).get(int(text)) if",
        "test_vavae_sources_imagenet.py::test_labels_are_found_beside_the_images",
    ),
    "validation_classes_of_their_own": Mistake(
        "vavae/sources/imagenet.py", 'order = None if split == "train" else', "order = None if split else",
        "test_vavae_sources_imagenet.py::test_the_folder_of_a_split_is_taken_and_said",
    ),
    "sample_up_to_the_last_dot": Mistake(
        "vavae/sources/tar_scan.py", 'base.partition(".")', 'base.rpartition(".")',
        "test_vavae_sources_tar.py::test_samples_are_grouped_by_their_key",
    ),
    "tar_that_ends_early": Mistake(
        "vavae/sources/tar_scan.py", "    _check_end(path, file, tar.offset, total)\n", "",
        "test_vavae_sources_tar.py::test_a_tar_that_is_not_right_is_named",
    ),
    "index_of_a_tar_of_the_same_size": Mistake(
        "vavae/sources/tar_index.py", "record.tar != identity and", "record.tar.bytes != identity.bytes and",
        "test_vavae_sources_tar_index.py::test_an_index_that_is_not_right_is_named",
    ),
    "index_of_a_tar_as_it_was_before": Mistake(
        "vavae/sources/tar_index.py", "if record.tar == identity and record.modified_ns == modified_ns:", "if True:",
        "test_vavae_sources_tar_index.py::test_a_tar_edited_in_its_middle_is_gone_through_anew",
    ),
    "tars_instead_of_the_images_beside_them": Mistake(
        "vavae/sources/__init__.py", " and not any(map(is_image_name, files)):", ":",
        "test_vavae_sources.py::test_images_beside_tars_are_a_folder_of_images",
    ),
    "labels_file_of_the_other_split_refused": Mistake(
        "vavae/sources/folder.py", 'if not (taken and options.split == "train"):', "if not taken:",
        "test_vavae_sources_imagenet.py::test_a_labels_file_is_for_the_validation_split_alone",
    ),
    "image_cut_short_taken": Mistake(
        "vavae/image_files.py", "if len(content) < size:", "if not content:",
        "test_vavae_sources_tar.py::test_an_image_that_cannot_be_read_is_named",
    ),
    "eight_bits_rounded": Mistake(
        "vavae/images.py", "(127.5 * images + 128.0)", "(127.5 * images + 127.5)",
        "test_vavae_data.py::test_uint8_rule_matches_the_recorded_and_loses_nothing",
    ),
    "eight_bits_not_clamped": Mistake(
        "vavae/images.py", "(127.5 * images + 128.0).clamp(0, 255).to(torch.uint8)",
        "(127.5 * images + 128.0).to(torch.int32).to(torch.uint8)",
        "test_vavae_data.py::test_uint8_rule_matches_the_recorded_and_loses_nothing",
    ),
    "halved_once_too_often": Mistake(
        "vavae/images.py", "while min(image.size) >= 2 * size:", "while min(image.size) > size:", CROPS,
    ),
    "halved_by_another_filter": Mistake(
        "vavae/images.py", "(image.width // 2, image.height // 2), Image.Resampling.BOX)",
        "(image.width // 2, image.height // 2), Image.Resampling.BICUBIC)", CROPS,
    ),
    "odd_margins_at_the_top": Mistake(
        "vavae/images.py", "left, top = (image.width - size) // 2, (image.height - size) // 2",
        "left, top = (image.width - size + 1) // 2, (image.height - size + 1) // 2", CROPS,
    ),
    "dead_channels_by_their_deviation": Mistake(
        "vavae/watch.py", "(variance <= ACTIVE_VARIANCE)", "(std <= ACTIVE_VARIANCE)",
        "test_vavae_watch.py::test_dead_channels_are_those_that_do_not_move",
    ),
    "deviation_over_the_images_alone": Mistake(
        "vavae/watch.py", ".var(dim=(0, 2, 3), correction=0)", ".mean((2, 3)).var(dim=0, correction=0)",
        "test_vavae_watch.py::test_dead_channels_are_those_that_do_not_move",
    ),
    "not_finite_taken_for_alive": Mistake(
        "vavae/watch.py", ".masked_fill(~variance.isfinite(), torch.nan)", "",
        "test_vavae_watch.py::test_what_is_not_finite_counts_neither_as_dead_nor_as_alive",
    ),
    "lpips_of_bytes": Mistake(
        "vavae/watch.py", "pair = (to_float_batch(x.permute(0, 2, 3, 1)) for", "pair = (x.float() for",
        "test_vavae_watch.py::test_figures_are_those_of_evaluation_and_of_other_libraries",
    ),
    "similarity_to_the_corner": Mistake(
        "vavae/watch.py", "unit[:, :, x.shape[2] // 2, x.shape[3] // 2]", "unit[:, :, 0, 0]",
        "test_vavae_watch.py::test_similarities_are_cosines_to_the_middle",
    ),
    "psnr_halved": Mistake(
        "vavae/images.py", "20.0 * torch.log10(255.0 / mse.sqrt())", "10.0 * torch.log10(255.0 / mse.sqrt())",
        "test_vavae_data.py::test_psnr_matches_the_recorded",
    ),
    "sixteen_bits_cut": Mistake(
        "vavae/image_files.py", "((values * 255 + white // 2) // white)", "((values * 255) // white)",
        "test_vavae_image_files.py::test_sixteen_bits_round_to_the_nearest",
    ),
    "white_taken_for_black": Mistake(
        "vavae/image_files.py", "        values = white - values\n", "        pass\n",
        "test_vavae_image_files.py::test_grey_of_any_depth_is_scaled_by_its_range",
    ),
    "sign_of_pixels_ignored": Mistake(
        "vavae/image_files.py", "isinstance(image, TiffImageFile) and _SIGNED in",
        "isinstance(image, TiffImageFile) and image.mode in",
        "test_vavae_image_files.py::test_what_cannot_be_shown_rightly_is_refused_by_name",
    ),
    "any_format_of_pillow": Mistake(
        "vavae/image_files.py", "(content), formats=_PILLOW_FORMATS)", "(content))",
        "test_vavae_image_files.py::test_an_eps_under_another_name_starts_no_program",
    ),
    "folders_of_systems_are_classes": Mistake(
        "vavae/sources/listing.py", 'return name.startswith(".") or name.lower() in SYSTEM_FILES',
        "return name.lower() in SYSTEM_FILES",
        "test_vavae_sources_listing.py::test_a_listing_finds_images_and_counts_all_else_by_kind",
    ),
    "turned_the_other_way": Mistake(
        "vavae/image_files.py", "6: Turn(True, False, True", "6: Turn(True, True, False", PLAN,
    ),
    "turned_before_it_is_placed": Mistake(
        "vavae/decoders/plan.py", "        top = upright[0] - size - top\n", "        pass\n", PLAN,
    ),
    "crop_of_dali_one_pixel_off": Mistake(
        "vavae/decoders/dali_decoder.py", "(jpeg.plan.left + offset) / width", "(jpeg.plan.left + offset + 1) / width",
        PHOTOGRAPHS,
    ),
    "dali_scales_without_a_filter": Mistake(
        "vavae/decoders/dali_decoder.py", "antialias=True", "antialias=False", PHOTOGRAPHS,
    ),
    "torch_scales_without_a_filter": Mistake(
        "vavae/decoders/torchvision_decoder.py", "return F.interpolate(x, size, mode=mode, antialias=True)",
        "return F.interpolate(x, size, mode=mode)", PHOTOGRAPHS,
    ),
    "halves_of_odd_sizes_shifted": Mistake(
        "vavae/decoders/torchvision_decoder.py", "(distances <= 0.5)", "(distances < 0.5)",
        "test_vavae_decoders.py::test_halving_is_pillows_for_every_size",
    ),
    "torn_files_are_decoded": Mistake(
        "vavae/decoders/jpeg.py", "content.startswith(_BEGIN) and content.endswith(_END)", "content.startswith(_BEGIN)",
        ODD_FILES,
    ),
    "four_channels_are_decoded": Mistake(
        "vavae/decoders/jpeg.py", 'image.mode not in ("RGB", "L")', 'image.mode not in ("RGB", "L", "CMYK")', ODD_FILES,
    ),
    "a_broken_file_changes_who_decodes_others": Mistake(
        "vavae/decoders/jpeg_decoder.py", "for one in group for place, square", "for one in [] for place, square",
        "test_vavae_decoders.py::test_a_file_that_cannot_be_read_says_why_and_leaves_the_others",
    ),
    "mirrored_in_every_epoch_alike": Mistake(
        "vavae/data.py", "seeds.FLIP, epochs, indices)", "seeds.FLIP, 0, indices)",
        "test_vavae_data.py::test_half_of_the_images_are_mirrored_where_asked",
    ),
    "rows_mirrored": Mistake(
        "vavae/data.py", "pixels.flip(3), pixels)", "pixels.flip(2), pixels)",
        "test_vavae_data.py::test_half_of_the_images_are_mirrored_where_asked",
    ),
    "any_share_may_be_broken": Mistake(
        "vavae/unreadable.py", "if unreadable > self._max_share * max(read, min(total, LEAST_READ)):", "if False:",
        "test_vavae_data.py::test_more_than_a_share_of_broken_images_stops",
    ),
    "any_share_may_be_empty": Mistake(
        "vavae/unreadable.py", "if empty > max_share * (num_files + empty):", "if False:",
        "test_vavae_unreadable.py::test_empty_files_count_at_once",
    ),
    "empty_images_not_counted": Mistake(
        "vavae/data.py", "empty=self.source.empty", "empty=0",
        "test_vavae_unreadable.py::test_empty_files_of_a_folder_count_in_the_share",
    ),
    "too_many_broken_forgotten": Mistake(
        "vavae/unreadable.py", "if self._verdict is not None:", "if False:",
        "test_vavae_unreadable.py::test_too_many_stays_said_to_every_caller",
    ),
    "the_paper_turns_photographs": Mistake(
        "vavae/config.py", '{"decoder": "pil", "exif_rotation": False}', '{"decoder": "pil"}',
        "test_vavae_decoders.py::test_the_published_pixels_unless_a_file_says_otherwise",
    ),
    # Loss.
    "kl_not_weighed": Mistake(
        "vavae/loss.py", "rest = rest + config.kl_weight * kl", "rest = rest + kl", GENERATOR,
    ),
    "kl_of_the_mean_not_doubled": Mistake(
        "vavae/loss.py", "return 2.0 * posterior.kl().mean()", "return posterior.kl().mean()",
        "test_vavae_loss.py::test_generator_loss_matches_the_recorded",
    ),
    "kl_without_its_half": Mistake(
        "vavae/model.py",
        "            terms = distance / other.var - 1.0 - self.logvar + other.logvar\n        return 0.5 *",
        "            terms = distance / other.var - 1.0 - self.logvar + other.logvar\n        return 1.0 *",
        "test_vavae_model.py::test_posterior_agrees_with_torch_distributions",
    ),
    "adaptive_weight_not_bounded": Mistake(
        "vavae/gradients.py", ".clamp(max=limit).detach()", ".detach()",
        "test_vavae_loss.py::test_adaptive_weights_match_the_recorded",
    ),
    "adaptive_weight_upside_down": Mistake(
        "vavae/gradients.py", "(upcast(reference).norm() / (upcast(term).norm() + 1e-4))",
        "(upcast(term).norm() / (upcast(reference).norm() + 1e-4))",
        "test_vavae_loss.py::test_adaptive_weights_match_the_recorded",
    ),
    "vf_bounded_as_the_gan_is": Mistake(
        "vavae/loss.py", "vf_gradient, MAX_VF_WEIGHT)", "vf_gradient, MAX_GAN_WEIGHT)",
        "test_vavae_loss.py::test_balancing_weights_have_the_published_limits",
    ),
    "generator_rewarded_for_being_found": Mistake(
        "vavae/loss.py", "gan = -upcast(discriminator", "gan = upcast(discriminator", GENERATOR,
    ),
    "decoder_not_told_of_the_gan": Mistake(
        "vavae/loss.py", "gradient = nll_gradient + config.disc_factor * weight * gan_gradient",
        "gradient = nll_gradient + 0 * gan_gradient",
        "test_vavae_gradients.py::test_gradients_are_those_of_the_plain_formulation",
    ),
    "decoder_walked_again_for_the_vf_term": Mistake(
        "vavae/loss.py", "return weight, (inputs, gradients) if trains else None", "return weight, None",
        "test_vavae_gradients.py::test_how_often_each_network_is_walked_backwards",
    ),
    "given_gradients_not_scaled": Mistake(
        "vavae/gradients.py", "(gradient.mul_(factor) for gradient", "(gradient for gradient",
        "test_vavae_gradients.py::test_given_gradients_are_scaled_as_the_loss_is",
    ),
    "discriminator_told_the_opposite": Mistake(
        "vavae/loss.py", "[config.disc_loss](real, fake)", "[config.disc_loss](fake, real)",
        "test_vavae_loss.py::test_discriminator_loss_matches_the_recorded",
    ),
    "hinge_without_its_margin": Mistake(
        "vavae/discriminator.py", "F.relu(1.0 - upcast(real))", "F.relu(-upcast(real))",
        "test_vavae_loss.py::test_gan_losses_match_the_recorded",
    ),
    "gan_a_step_late": Mistake(
        "vavae/discriminator.py", "return weight if iteration >= threshold", "return weight if iteration > threshold",
        "test_vavae_loss.py::test_adopt_weight_matches_the_recorded",
    ),
    "gan_counted_from_one": Mistake(
        "vavae/task.py", "step - 1, config.disc_start) > 0", "step, config.disc_start) > 0",
        "test_vavae_task.py::test_gan_begins_after_disc_start_iterations",
    ),
    "discriminator_trained_by_the_generator": Mistake(
        "vavae/discriminator.py", "        p.requires_grad_(False)\n    try:",
        "        p.requires_grad_(True)\n    try:",
        "test_vavae_loss.py::test_frozen_stops_gradients_at_parameters_only",
    ),
    "stage_of_the_step_after": Mistake(
        "vavae/task.py", "(step - 1) * self.global_batch_size / len(self.batches)",
        "step * self.global_batch_size / len(self.batches)",
        "test_vavae_task.py::test_stages_change_the_loss_with_the_epochs",
    ),
    # Network.
    "log_variance_for_the_deviation": Mistake(
        "vavae/model.py", "return torch.exp(0.5 * self.logvar)", "return torch.exp(self.logvar)",
        "test_vavae_model.py::test_sample_is_mean_plus_noise_times_std",
    ),
    "log_variance_not_clamped": Mistake(
        "vavae/model.py", "logvar.clamp(-30.0, 20.0)", "logvar", "test_vavae_model.py::test_log_variance_is_clamped",
    ),
    "padding_above_and_on_the_left": Mistake(
        "vavae/model.py", "F.pad(x, (0, 1, 0, 1))", "F.pad(x, (1, 0, 1, 0))",
        "test_vavae_model.py::test_downsample_pads_below_and_on_the_right_also_at_odd_sizes",
    ),
    "shortcut_without_its_convolution": Mistake(
        "vavae/model.py", "        return self.nin_shortcut(x) + h\n", "        return x + h\n",
        "test_vavae_model.py::test_encoder_and_posterior_match_the_recorded",
    ),
    "features_of_images_as_they_are": Mistake(
        "vavae/foundation/model.py", "images = images * self.scale + self.shift ", "images = images * self.scale ",
        "test_vavae_foundation.py::test_imagenet_normalization_is_of_the_unit_range",
    ),
    "features_of_the_layer_before": Mistake(
        "vavae/foundation/registry.py", "indices=1, norm=True,", "indices=1, norm=False,",
        "test_vavae_foundation.py::test_features_match_the_recorded",
    ),
    "features_resampled_in_bfloat16": Mistake(
        "vavae/foundation/model.py", "features.to(torch.promote_types(features.dtype, torch.float32))", "features",
        f"{FOUNDATION}::test_bfloat16_features_are_resampled_in_float32",
    ),
    "features_resampled_without_antialiasing": Mistake(
        "vavae/foundation/model.py", "features.shape[-1] > self.grid", "False",
        f"{FOUNDATION}::test_features_of_another_grid_are_resampled_to_the_latents",
    ),
    "mean_and_std_rounded_with_the_weights": Mistake(
        "vavae/foundation/model.py", "setattr(module, name, value.to(moved.device))", "pass",
        f"{FOUNDATION}::test_bfloat16_leaves_normalisation_and_positions_in_float32",
    ),
    "rotary_positions_rounded_with_the_weights": Mistake(
        "vavae/foundation/model.py", "buffer in rope.named_buffers(recurse=False) if", "buffer in () if",
        f"{FOUNDATION}::test_bfloat16_leaves_normalisation_and_positions_in_float32",
    ),
    "every_model_fed_the_mean_of_imagenet": Mistake(
        "vavae/foundation/model.py", "return entry.mean_and_std()", "return IMAGENET",
        f"{FOUNDATION}::test_normalization_is_as_asked",
    ),
    "mean_and_std_of_no_weights": Mistake(
        "vavae/foundation/registry.py", "stated = self.require_weights()", "stated = self.pretrained",
        f"{FOUNDATION}::test_a_model_of_no_stated_mean_and_std_says_what_to_set",
    ),
    "features_before_the_norm_of_eva02": Mistake(
        "vavae/foundation/registry.py", "    if _norms_after_pooling(model):\n", "    if False:\n",
        f"{FOUNDATION}::test_features_are_those_of_timm[eva02-b]",
    ),
    "relative_positions_the_other_way": Mistake(
        "vavae/foundation/relative_positions.py", "position[:, None] - position[None]",
        "position[None] - position[:, None]",
        f"{FOUNDATION}::test_features_are_those_of_timm[sam-b]",
    ),
    "relative_positions_gathered_in_each_pass": Mistake(
        "vavae/foundation/model.py", "        gather_relative_positions(vit, planned.feature_grid)\n", "",
        f"{FOUNDATION}::test_a_pass_copies_nothing_to_the_device[sam-b]",
    ),
    "rotary_positions_made_in_each_pass": Mistake(
        "vavae/foundation/registry.py", 'arguments["dynamic_img_size"] = False', 'arguments["dynamic_img_size"] = True',
        f"{FOUNDATION}::test_a_pass_copies_nothing_to_the_device[dinov3-b]",
    ),
    "buffers_of_no_file_without_values": Mistake(
        "vavae/foundation/weights.py", 'torch.empty_like(value, device="cpu") if value.is_meta else value',
        "torch.full_like(value, 9.0, device='cpu')",
        f"{FOUNDATION}::test_features_are_those_of_timm[dinov3-b]",
    ),
    "a_patch_of_another_size_interpolated": Mistake(
        "vavae/foundation/weights.py", "if patch and key.endswith", "if not patch and key.endswith",
        "test_vavae_foundation_weights.py::test_a_file_of_another_model_is_refused",
    ),
    "export_written_in_place": Mistake(
        "vavae/weights.py", "    with atomic_write(path) as f:\n        write_safetensors",
        '    with open(path, "wb") as f:\n        write_safetensors',
        "test_common_writers.py::test_nothing_else_writes_files",
    ),
    # The layout of diffusers.
    "levels_of_the_decoder_in_our_order": Mistake(
        "vavae/diffusers_layout.py", "numbers[0] = levels - 1 - numbers[0]", "numbers[0] = numbers[0]",
        f"{DIFFUSERS}::test_names_and_shapes_are_those_of_diffusers",
    ),
    "queries_for_keys": Mistake(
        "vavae/diffusers_layout.py", '"q": "to_q", "k": "to_k"', '"q": "to_k", "k": "to_q"',
        f"{DIFFUSERS}::test_diffusers_computes_the_same_from_what_is_written",
    ),
    "blocks_of_the_middle_swapped": Mistake(
        "vavae/diffusers_layout.py", '"mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1"',
        '"mid.block_1": "mid_block.resnets.1", "mid.block_2": "mid_block.resnets.0"',
        f"{DIFFUSERS}::test_what_diffusers_saves_is_read",
    ),
    "keys_of_diffusers_that_are_unknown_left_out": Mistake(
        "vavae/diffusers_layout.py", "    if unknown:\n        raise WeightsError(",
        "    if False:\n        raise WeightsError(", f"{DIFFUSERS}::test_keys_that_do_not_fit_are_named",
    ),
    "a_config_of_diffusers_believed": Mistake(
        "vavae/sizes.py", "if wrong := stated.contradictions(config, tensors):",
        "if (wrong := stated.contradictions(config, tensors)) and stated is None:",
        f"{DIFFUSERS}::test_a_config_that_contradicts_the_tensors_is_named",
    ),
    "other_numbers_of_groups_taken": Mistake(
        "vavae/diffusers_layout.py", "self.norm_num_groups != GROUPS,", "self.norm_num_groups < 1,",
        f"{DIFFUSERS}::test_a_config_of_another_network_is_refused",
    ),
    "scale_of_latents_not_said": Mistake(
        "vavae/weights.py", "    if is_diffusers(tensors):\n        _log", "    if not tensors:\n        _log",
        f"{DIFFUSERS}::test_the_scale_of_latents_is_said_and_not_applied",
    ),
}  # fmt: skip
