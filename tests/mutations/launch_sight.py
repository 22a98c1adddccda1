"""Mistakes in what a run says of itself: rows, writers, validation at fixed times, previews, figures of samples."""

from tests.mutations import Mistake

PROGRESS, WRITERS, PREVIEWS = (f"test_launch_{name}.py::" for name in ("progress", "writers", "previews"))
HOURS = f"{PROGRESS}test_hours_go_on_with_the_checkpoint_and_the_calendar_does_not_stop"
MFU = f"{PROGRESS}test_mfu_is_the_models_flops_over_the_peak_of_all_devices"
FIXED_TIMES = "test_lightningdit_task.py::test_times_of_validation_are_quantiles_spread_evenly_in_any_batches"
SAME_PICTURES = f"{PREVIEWS}test_the_same_pictures_after_a_resume_and_by_two_processes_under_zero_3"
FIGURES = "test_launch_sample_figures.py::"
FIGURES_BY_HAND = f"{FIGURES}test_the_figures_are_those_of_the_averages_samples"
SAME_FIGURES = f"{FIGURES}test_the_same_figures_after_a_resume_and_by_two_processes_under_zero_3"
BY_HAND = f"{PREVIEWS}test_a_picture_is_what_the_sampler_makes_of_the_average"

MISTAKES = {
    # Rows.
    "mfu_of_one_device": Mistake(
        "launch/training/progress.py",
        "(self._peak * self._processes.world_size)",
        "self._peak",
        MFU,
    ),
    "peak_of_bfloat16_for_float32": Mistake(
        "common/data_sheets.py",
        '"float32": self.float32}',
        '"float32": self.bfloat16}',
        MFU,
    ),
    "fastest_loader_of_all": Mistake(
        "launch/training/progress.py",
        '"data_wait": max(',
        '"data_wait": min(',
        MFU,
    ),
    "memory_since_the_start": Mistake(
        "launch/training/progress.py",
        "        torch.cuda.reset_peak_memory_stats(device)\n",
        "",
        f"{PROGRESS}test_memory_is_the_most_since_the_row_before",
    ),
    "waiting_before_a_pause_counted": Mistake(
        "launch/training/progress.py",
        "        self.data_wait.read()\n        self._throughput",
        "        self._throughput",
        f"{PROGRESS}test_what_was_waited_for_before_a_pause_counts_in_no_row",
    ),
    "waiting_never_reset": Mistake(
        "launch/training/progress.py",
        "seconds, self._seconds = self._seconds, 0.0",
        "seconds = self._seconds",
        f"{PROGRESS}test_waiting_is_the_time_inside_and_starts_anew",
    ),
    "hours_of_this_start_alone": Mistake(
        "launch/training/progress.py",
        "else self._hours + here",
        "else here",
        HOURS,
    ),
    "pace_by_hours_not_by_gpu_hours": Mistake(
        "launch/training/progress.py",
        "else self._gpu_hours + here * self._gpus",
        "else self._gpu_hours + here",
        HOURS,
    ),
    "behind_for_ahead": Mistake(
        "launch/training/progress.py",
        "(images / PUBLISHED_IMAGES_PER_GPU_HOUR - gpu_hours)",
        "(gpu_hours - images / PUBLISHED_IMAGES_PER_GPU_HOUR)",
        HOURS,
    ),
    "hours_not_restored": Mistake(
        "launch/training/trainer.py",
        "        self._progress.time.load_state(start.state)\n",
        "",
        f"{PROGRESS}test_a_resumed_run_goes_on_with_its_hours_and_says_that_it_was_resumed",
    ),
    "gan_counted_from_the_start": Mistake(
        "launch/training/flops.py",
        "counted(loss.use_gan and begun,",
        "counted(loss.use_gan,",
        f"{PROGRESS}test_flops_are_those_of_the_terms_in_force",
    ),
    # Writers.
    "new_wandb_run_at_every_start": Mistake(
        "launch/training/wandb_writer.py",
        "    if not path_exists(path):\n",
        "    if True:\n",
        f"{WRITERS}test_a_run_goes_on_in_wandb_where_it_was",
    ),
    "wandb_ends_training": Mistake(
        "launch/training/wandb_writer.py",
        "        except Exception as e:\n            self._broken = True",
        "        except KeyError as e:\n            self._broken = True",
        f"{WRITERS}test_wandb_that_fails_later_is_named_once_and_training_goes_on",
    ),
    "wandb_without_a_server_ends_training": Mistake(
        "launch/training/wandb_writer.py",
        '        except Exception as e:\n            _warn_of_start(e, f"its',
        '        except KeyError as e:\n            _warn_of_start(e, f"its',
        f"{WRITERS}test_where_no_server_answers_the_log_is_kept_here_and_training_goes_on",
    ),
    "wandb_that_cannot_be_imported_ends_training": Mistake(
        "launch/training/wandb_writer.py",
        "        except Exception as e:  # also of",
        "        except ValueError as e:  # also of",
        f"{WRITERS}test_whatever_keeps_wandb_from_starting_is_said_once_and_training_goes_on",
    ),
    "wandb_waits_for_an_answer": Mistake(
        "launch/training/wandb_writer.py",
        "with _without_terminal():",
        "if True:",
        f"{WRITERS}test_a_run_goes_on_in_wandb_where_it_was",
    ),
    "wandb_whose_id_stays_in_use": Mistake(
        "launch/training/wandb_writer.py",
        "            wandb.teardown()",
        "            pass",
        f"{WRITERS}test_where_no_server_answers_the_log_is_kept_here_and_training_goes_on",
    ),
    "events_of_later_steps_kept": Mistake(
        "launch/training/writers.py",
        "if 0 <= _row_step(line) <= step]",
        'if 0 <= _row_step(line) <= step or b"event" in line]',
        f"{WRITERS}test_events_stay_up_to_the_step_that_is_resumed_from",
    ),
    "blocks_in_the_line": Mistake(
        "launch/training/log.py",
        "in_short(row).items()",
        "row.items()",
        f"{WRITERS}test_a_line_leaves_out_what_is_of_single_blocks_and_times",
    ),
    # Validation.
    "times_drawn_anew": Mistake(
        "lightningdit/task.py",
        "            t = self.transport.timesteps_at((0.5 + GOLDEN * places) % 1)\n",
        "            t = draws['t']\n",
        FIXED_TIMES,
    ),
    "times_of_the_first_batch_in_all": Mistake(
        "lightningdit/task.py",
        "torch.arange(number * batch_size, (number + 1) * batch_size,",
        "torch.arange(0, batch_size,",
        FIXED_TIMES,
    ),
    "uniform_times_where_training_has_others": Mistake(
        "lightningdit/flow.py",
        "quantiles = self._logit_normal(torch.special.ndtri(shares)) if self.use_lognorm else shares",
        "quantiles = shares",
        FIXED_TIMES,
    ),
    "losses_by_time_over_all_samples": Mistake(
        "lightningdit/task.py",
        "total.masked_fill(bucket != i, torch.nan)",
        "total",
        "test_lightningdit_task.py::test_validation_tells_losses_by_time_apart",
    ),
    "micro_batches_weigh_alike_in_a_bucket": Mistake(
        "launch/training/log.py",
        "                entry = entry.sum(1)\n",
        "                entry = entry.sum(1) / entry.sum(1)[1].clamp(min=1)\n",
        "test_launch_log.py::test_a_mean_over_samples_is_of_those_that_have_the_number",
    ),
    # Previews.
    "previews_by_the_weights": Mistake(
        "launch/training/evaluations.py",
        "with evaluating(self._engines, self._averaged):\n            latents",
        "with evaluating(self._engines):\n            latents",
        BY_HAND,
    ),
    "previews_without_guidance": Mistake(
        "launch/training/previews.py",
        '"cfg_scale": found.cfg_scale if',
        '"cfg_scale": 1.0 if',
        f"{PREVIEWS}test_previews_are_guided_as_samples_are_by_a_solver_of_few_steps",
    ),
    "previews_in_normalised_latents": Mistake(
        "launch/training/previews.py",
        "statistics.denormalise(part.to(device))",
        "part.to(device)",
        BY_HAND,
    ),
    "all_processes_sample_the_same": Mistake(
        "launch/training/previews.py",
        "(processes.rank * own + i) % count",
        "i % count",
        SAME_PICTURES,
    ),
    "batches_not_filled_up": Mistake(
        "launch/training/previews.py",
        "places = torch.arange(first, first + size, device=x.device) % len(x)",
        "places = torch.arange(first, min(first + size, len(x)), device=x.device)",
        f"{PREVIEWS}test_a_network_is_called_with_one_size_of_batch",
    ),
    # Figures of samples.
    "figures_by_the_weights": Mistake(
        "launch/training/evaluations.py",
        "with evaluating(self._engines, self._averaged):\n            figures",
        "with evaluating(self._engines):\n            figures",
        FIGURES_BY_HAND,
    ),
    "labels_by_index_whatever_the_section_says": Mistake(
        "launch/training/sample_figures.py",
        "protocol_labels(labels, asked.samples",
        'protocol_labels("index", asked.samples',
        FIGURES_BY_HAND,
    ),
    "processes_measure_the_same_samples": Mistake(
        "launch/training/sample_figures.py",
        "[(share.start + i) % count for i in range(most)]",
        "[i % count for i in range(most)]",
        SAME_FIGURES,
    ),
    "processes_sample_as_often_as_they_need": Mistake(
        "launch/training/sample_figures.py",
        "most = max(processes.all_gather(share.stop - share.start))",
        "most = share.stop - share.start",
        f"{FIGURES}test_all_processes_call_the_network_equally_often",
    ),
    "reference_measured_at_every_start": Mistake(
        "launch/training/sample_figures.py",
        "cache=cache, ",
        "",
        f"{FIGURES}test_the_reference_is_measured_once_for_all_starts",
    ),
    "figures_of_infinite_samples": Mistake(
        "launch/training/sample_figures.py",
        "if processes.any(not bool(latents.isfinite().all())):",
        "if False:",
        f"{FIGURES}test_samples_that_are_not_finite_are_nulls_and_a_warning",
    ),
    "reference_that_lacks_features_found_out_late": Mistake(
        "launch/evaluation/judge.py",
        "                    require_known(figure, known[figure.features])\n",
        "                    pass\n",
        f"{FIGURES}test_a_reference_that_does_not_fit_is_refused_before_the_first_step",
    ),
    "rows_of_figures_taken_for_training": Mistake(
        "launch/run_directory/rows.py",
        "if any(key.startswith(SAMPLES) for key in row):",
        "if False:",
        f"{FIGURES}test_readers_of_a_log_tell_the_rows_apart",
    ),
    "a_figure_ends_the_run": Mistake(
        "launch/training/sample_figures.py",
        "            except ValueError as e:  # a run",
        "            except KeyError as e:  # a run",
        f"{FIGURES}test_a_run_does_not_end_for_a_figure",
    ),
    "nothing_says_what_figures_are_of": Mistake(
        "launch/training/trainer.py",
        '            log.write_event({"step": self.step, "event": "evaluation", **figures.facts})\n',
        "            pass\n",
        f"{FIGURES}test_what_figures_are_of_and_by_is_an_event",
    ),
}
