"""Mistakes in the tokenizer: images, losses, network."""

from tests.mutations import Mistake

GENERATOR = "test_vavae_loss.py::test_generator_loss_matches_the_recorded"
CROPS = "test_vavae_data.py::test_crops_match_the_recorded"
EVERYWHERE = "test_vavae_data.py::test_random_crops_are_cut_from_the_scaled_image_everywhere"

MISTAKES = {
    # Images.
    "last_row_of_a_crop_never_drawn": Mistake(
        "vavae/data.py", "(draw >> 32) % (spare_rows + 1)", "(draw >> 32) % max(spare_rows, 1)", EVERYWHERE,
    ),
    "last_column_of_a_crop_never_drawn": Mistake(
        "vavae/data.py", "% (spare_columns + 1)", "% max(spare_columns, 1)", EVERYWHERE,
    ),
    "crop_the_same_in_every_epoch": Mistake(
        "vavae/data.py", "seeds.CROP, epoch, index)", "seeds.CROP, 0, index)",
        "test_vavae_data.py::test_a_sample_depends_on_seed_epoch_and_index_alone",
    ),
    "label_of_the_image_asked_for": Mistake(
        "vavae/data.py", '"y": self.labels[taken]}', '"y": self.labels[indices]}',
        "test_vavae_data.py::test_a_broken_image_is_skipped_and_counted_where_allowed",
    ),
    "classes_in_the_order_of_the_disk": Mistake(
        "vavae/image_files.py", "return tuple(sorted(names))", "return tuple(sorted(names, reverse=True))",
        "test_vavae_data.py::test_classes_are_sorted_folders_and_paths_are_sorted",
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
        "vavae/image_files.py", "Image.open(file, formats=_PILLOW_FORMATS)", "Image.open(file)",
        "test_vavae_image_files.py::test_an_eps_under_another_name_starts_no_program",
    ),
    "folders_of_systems_are_classes": Mistake(
        "vavae/image_files.py", 'if entry.name.startswith(".") or entry.name.lower() in _SYSTEM_FILES:',
        "if entry.name.lower() in _SYSTEM_FILES:",
        "test_vavae_image_files.py::test_a_listing_finds_images_and_counts_all_else_by_kind",
    ),
    # Loss.
    "kl_not_weighed": Mistake(
        "vavae/loss.py", "total = nll + config.kl_weight * kl", "total = nll + kl", GENERATOR,
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
        "vavae/loss.py", ".clamp(max=limit).detach()", ".detach()",
        "test_vavae_loss.py::test_adaptive_weights_match_the_recorded",
    ),
    "adaptive_weight_upside_down": Mistake(
        "vavae/loss.py", "(norms[0] / (norms[1] + 1e-4))", "(norms[1] / (norms[0] + 1e-4))",
        "test_vavae_loss.py::test_adaptive_weights_match_the_recorded",
    ),
    "vf_bounded_as_the_gan_is": Mistake(
        "vavae/loss.py", "adaptive_weight(nll, vf, output.encoder_layer, MAX_VF_WEIGHT)",
        "adaptive_weight(nll, vf, output.encoder_layer, MAX_GAN_WEIGHT)",
        "test_vavae_loss.py::test_balancing_weights_have_the_published_limits",
    ),
    "generator_rewarded_for_being_found": Mistake(
        "vavae/loss.py", "gan = -_upcast(discriminator", "gan = _upcast(discriminator", GENERATOR,
    ),
    "discriminator_told_the_opposite": Mistake(
        "vavae/loss.py", "[config.disc_loss](real, fake)", "[config.disc_loss](fake, real)",
        "test_vavae_loss.py::test_discriminator_loss_matches_the_recorded",
    ),
    "hinge_without_its_margin": Mistake(
        "vavae/discriminator.py", "F.relu(1.0 - real.float())", "F.relu(-real.float())",
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
        "vavae/foundation.py", "images = images * self.scale + self.shift\n", "images = images * self.scale\n",
        "test_vavae_foundation.py::test_imagenet_normalization_is_of_the_unit_range",
    ),
    "features_of_the_layer_before": Mistake(
        "vavae/foundation.py", "indices=1, norm=True,", "indices=1, norm=False,",
        "test_vavae_foundation.py::test_features_match_the_recorded",
    ),
    "export_written_in_place": Mistake(
        "vavae/weights.py", "    with atomic_write(path) as f:\n        write_safetensors",
        '    with open(path, "wb") as f:\n        write_safetensors',
        "test_common_writers.py::test_nothing_else_writes_files",
    ),
}  # fmt: skip
