"""Figures of a LightningDiT's samples in training: a few hundred of them, decoded and judged where they are made."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.config import ConfigError, LightningDiTRun, select_ops
from launch.evaluation.figures import choose_figures
from launch.evaluation.judge import DescribedSamples, Judge, JudgeSource, TensorImages
from launch.evaluation.runner import NEAREST_K
from launch.evaluation.shares import BATCHES_PER_PART, Share
from launch.run_directory.rows import SAMPLES
from launch.runtime.processes import Processes
from launch.sampling.labels import protocol_labels
from launch.trained import build_tokenizer
from launch.training.previews import decode_in_parts, few_step_settings, in_batches
from lightningdit.config import ModelConfig, SampleConfig
from lightningdit.flow import Transport
from lightningdit.latents import LatentStatistics
from lightningdit.sampler import sample
from lightningdit.task import LightningDiTTask
from vavae.model import AutoencoderKL

REFERENCE = "reference"  # directory of its features, in the run's


class DiffusionFigures:
    """Figures of samples of `settings` whose noise and class follow from their number alone; see
    `launch.training.task.SampleFigures`.

    Args:
        every: the steps between two measurements.
        labels: int64 `[N]`, of all samples.
        tokenizer, judge: on the CPU, of each process; they are on the device only meanwhile.
        facts: what figures depend on beside the weights, of the main process.
    """

    def __init__(
        self,
        network: ModelConfig,
        transport: Transport,
        settings: SampleConfig,
        statistics: LatentStatistics,
        tokenizer: AutoencoderKL,
        judge: Judge,
        *,
        every: int,
        labels: Tensor,
        facts: Mapping[str, Any],
    ):
        self.every, self.facts = every, facts
        self._network, self._transport, self._settings, self._labels = network, transport, settings, labels
        self._statistics, self._tokenizer, self._judge = statistics, tokenizer, judge

    @torch.no_grad()
    def measure(
        self, networks: Mapping[str, Callable], processes: Processes, batch_size: int
    ) -> tuple[dict[str, float | None], str | None]:
        """Each process samples, decodes and describes its share; the networks are called equally often by all."""
        started, count = time.perf_counter(), len(self._labels)
        size = judged_at_once(count, processes.world_size, self._judge.source.batch_size)
        share = Share.of(count, size, processes)
        most = max(processes.all_gather(share.stop - share.start))
        model = in_batches(networks["model"], batch_size)
        numbers = [(share.start + i) % count for i in range(most)]
        parts = [self._sample(model, numbers[i : i + batch_size], processes) for i in range(0, most, batch_size)]
        latents = torch.cat(parts)[: share.stop - share.start]
        figures: dict[str, float | None] = dict.fromkeys(figure.name for figure in self._judge.source.figures)
        reason = None
        if processes.any(not bool(latents.isfinite().all())):
            reason = "the samples are not finite"
        else:
            described = self._described(latents, share, size, processes)
            try:
                figures |= self._judge.compare(described) if processes.is_main else {}
            except ValueError as e:  # a run does not end for a figure
                reason = str(e)
        seconds = {"seconds": time.perf_counter() - started}
        return {SAMPLES + name: value for name, value in (figures | seconds).items()}, reason

    def _sample(self, model: Callable, numbers: list[int], processes: Processes) -> Tensor:
        """Latents of the samples of these numbers, on the CPU."""
        config = self._network
        y = self._labels[numbers].to(processes.device)
        shape = (config.in_channels, config.input_size, config.input_size)
        made = sample(model, self._transport, self._settings, y, numbers, shape=shape, null_label=config.null_label)
        return made.latents.cpu()

    def _described(self, latents: Tensor, share: Share, batch_size: int, processes: Processes) -> DescribedSamples:
        side = self._judge.source.image_size or 0
        images = torch.empty(0, side, side, 3, dtype=torch.uint8)  # of a process without a share
        if len(latents):
            images = decode_in_parts(self._tokenizer, self._statistics, latents, processes.device)  # [n, H, W, 3]
        self._judge.to(processes.device)
        try:
            own = TensorImages(images, share.start, len(self._labels))
            return self._judge.describe(own, self._labels[share.start : share.stop], batch_size, processes)
        finally:
            self._judge.to("cpu")


def judged_at_once(count: int, world_size: int, most: int) -> int:
    """Images of a batch of the networks that judge, so that processes have shares of about the same size."""
    return max(1, min(most, -(-count // (world_size * BATCHES_PER_PART))))


def figure_settings(run: LightningDiTRun) -> SampleConfig:
    """The `sample` section as figures in training have it."""
    found = few_step_settings(run, run.evaluation.num_sampling_steps)
    scale = run.evaluation.cfg_scale
    if scale is None:
        return found
    if scale != 1 and run.network().null_label is None:
        raise ConfigError(
            f"evaluation.cfg_scale {scale:g} needs a null label: the model has model.class_dropout_prob 0"
        )
    return found.model_copy(update={"cfg_scale": scale})


def judge_source(run: LightningDiTRun) -> JudgeSource | None:
    """What a run's samples are judged by, None where it asks for no figures; raises ConfigError, naming the key, where
    that cannot be: a file is not named or not there, or no figure reads it."""
    asked = run.evaluation
    if not asked.figures:
        return None
    figures = choose_figures(asked.figures)
    compared = any(figure.needs != "nothing" for figure in figures)
    of_images = [figure.name for figure in figures if figure.needs == "images"]
    if of_images and asked.samples <= NEAREST_K:
        raise ConfigError(f"evaluation.samples is {asked.samples}; {', '.join(of_images)}: of more than {NEAREST_K}")
    reference = asked.reference or (run.data.fid_reference_file if compared else None)
    paths = {"reference": reference, "inception_weights": asked.inception_weights}
    paths |= {"foundation": asked.foundation, "dinov2_weights": asked.dinov2_weights}
    known = {key: None if path is None else Path(path) for key, path in paths.items()}
    try:
        return JudgeSource(
            figures,
            image_size=run.data.image_size,
            inception_sha256=asked.inception_sha256,
            section="evaluation",
            **known,  # type: ignore[arg-type]
        )
    except ValueError as e:
        raise ConfigError(str(e)) from None


def make_figures(run: LightningDiTRun, task: LightningDiTTask, processes: Processes) -> DiffusionFigures | None:
    """The figures of a run, or None where it wants none; a reference of images is measured, once for all starts.

    Raises ConfigError, on every process, for networks that cannot be loaded on one of them, or a reference that does
    not fit.
    """
    source = judge_source(run)
    if source is None:
        return None
    found = error = None
    settings = figure_settings(run)
    try:
        found = _open(run, source, processes)
    except ValueError as e:
        error = str(e)
    errors = [text for text in processes.all_gather(error) if text is not None]
    if found is None or errors:
        failure = ConfigError(errors[0])
        failure.reported_by_main = True  # type: ignore[attr-defined]
        raise failure
    tokenizer, judge = found
    asked, labels = run.evaluation, run.sample.labels
    return DiffusionFigures(
        run.network(),
        task.transport,
        settings,
        task.batches.statistics,
        tokenizer,
        judge,
        every=asked.every or run.train.valid_every or run.train.ckpt_every,
        labels=torch.from_numpy(protocol_labels(labels, asked.samples, run.data.num_classes, settings.seed)),
        facts=_facts(run, source, settings) if processes.is_main else {},
    )


def _facts(run: LightningDiTRun, source: JudgeSource, settings: SampleConfig) -> dict[str, Any]:
    """What the figures of a run are of and by, in plain values, as an event of its log has it."""
    asked, networks = run.evaluation, source.facts["features"].values()
    facts = {"figures": ", ".join(asked.figures), "samples": asked.samples, "labels": run.sample.labels}
    steps = "mean_steps" if settings.mode == "meanflow" else "num_sampling_steps"
    facts |= {steps: getattr(settings, steps), "guidance": settings.guidance()}
    facts["features"] = "; ".join(", ".join(f"{key} {value}" for key, value in network.items()) for network in networks)
    if source.reference is None:
        return facts
    return facts | {"reference": str(source.reference), "reference_sha256": source.facts["reference"]["files_sha256"]}


def _open(run: LightningDiTRun, source: JudgeSource, processes: Processes) -> tuple[AutoencoderKL, Judge]:
    """Tokenizer and judge of this process, on the CPU; the main one alone has the reference."""
    tokenizer = build_tokenizer(run, select_ops(run.kernels), run.network().in_channels)
    cache = run.train.directory / REFERENCE
    judge = source.open(device=processes.device, cache=cache, compares=processes.is_main)
    judge.to("cpu")
    return tokenizer, judge
