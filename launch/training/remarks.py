"""What of a run file has no effect or contradicts the run's length, and what its stages are, for a plan to say."""

from collections.abc import Iterator

from launch.config import LightningDiTRun, Run, VavaeRun
from vavae.config import StageConfig, StageLoss

#: Of the VF term alone.
VF_KEYS = ("vf_weight", "distmat_weight", "cos_weight", "distmat_margin", "cos_margin")


def stage_lines(run: Run, num_images: int) -> list[str]:
    """The stages of a tokenizer's run, each with its epochs, its first step and its overrides of the loss."""
    if not isinstance(run, VavaeRun):
        return []
    lines, begin, batch = [], 0, run.train.global_batch_size
    for number, stage in enumerate(run.stages, 1):
        changed = ", ".join(f"{key} {value:g}" for key, value in _overrides(stage).items()) or "the run's own loss"
        first = -(-begin * num_images // batch) + 1
        lines.append(f"stage {number}, epochs {begin} to {begin + stage.epochs}, from step {first:,}: {changed}")
        begin += stage.epochs
    return lines


def remarks(run: Run, steps: int, num_images: int) -> list[str]:
    """One sentence for each thing that the run does not do though its file may seem to say so."""
    found = [*unread(run), *_about_length(run, steps)]
    found += _about_stages(run, steps, num_images) if isinstance(run, VavaeRun) else _about_lightningdit(run, steps)
    return found


def unread(run: Run) -> Iterator[str]:
    """Keys for other programs, which training may be thought to begin with."""
    if run.ckpt_path is not None:
        yield (
            f"ckpt_path {run.ckpt_path} is not read by training: train.ckpt goes on from a checkpoint, "
            "train.weight_init begins with weights"
        )


def _overrides(stage: StageConfig) -> dict[str, float]:
    return stage.loss.model_dump(exclude_none=True)


def _about_length(run: Run, steps: int) -> Iterator[str]:
    train, optimizer = run.train, run.optimizer
    if train.log_every > steps:
        yield f"train.log_every {train.log_every:,} is more than the run's {steps:,} steps: one row at its end"
    if train.ckpt_every > steps:
        yield f"train.ckpt_every {train.ckpt_every:,} is more than the run's {steps:,} steps: one checkpoint at its end"
    every = train.with_validation(run.data.valid_path).valid_every
    if every is not None and every > steps:
        yield f"train.valid_every {every:,} is more than the run's {steps:,} steps: it never validates"
    if optimizer.warmup_steps >= steps:
        yield (
            f"optimizer.warmup_steps {optimizer.warmup_steps:,} do not end within the run's {steps:,} steps: "
            f"the learning rate {optimizer.lr:g} is not passed"
        )


def _about_lightningdit(run: LightningDiTRun, steps: int) -> Iterator[str]:
    ours, models = run.train.use_checkpoint, run.model.use_checkpoint
    if ours and models and ours != models:
        yield f"train.use_checkpoint {ours} has no effect: model.use_checkpoint {models} comes first"
    shown = run.train.preview_every
    if shown is not None and shown > steps:
        yield f"train.preview_every {shown:,} is more than the run's {steps:,} steps: one preview at its end"
    measured = run.evaluation.every
    if run.evaluation.figures and measured is not None and measured > steps:
        yield f"evaluation.every {measured:,} is more than the run's {steps:,} steps: one measurement at its end"
    until = run.transport.lognorm_until_step
    if until is not None and until >= steps:
        yield f"transport.lognorm_until_step {until:,} has no effect: the run has {steps:,} steps"
    learned, scale = run.transport.guidance_scale, run.sample.cfg_scale
    if learned != 1 and scale != 1:
        yield f"transport.guidance_scale {learned:g} is learned, and sample.cfg_scale {scale:g} guides samples again"


def _about_stages(run: VavaeRun, steps: int, num_images: int) -> Iterator[str]:
    loss, epochs = run.loss, steps * run.train.global_batch_size / num_images
    if run.foundation is not None and not loss.use_vf:
        yield f"foundation (model_name {run.foundation.model_name}) has no effect: loss.use_vf is false"
    for number, stage in enumerate(run.stages, 1):
        unread = [key for key in VF_KEYS if key in _overrides(stage)]
        if unread and not loss.use_vf:
            yield f"stage {number}: {', '.join(unread)} have no effect: loss.use_vf is false"
        if stage.loss == StageLoss():
            yield f"stage {number} changes nothing of the loss"
    if loss.use_gan and loss.disc_start is not None and loss.disc_start > steps:
        yield f"loss.disc_start {loss.disc_start:,} is after the last of {steps:,} steps: the GAN term never counts"
    begin, step = 0, run.train.global_batch_size / num_images
    for number, stage in enumerate(run.stages, 1):
        if begin >= epochs:
            yield f"the run ends after {epochs:.1f} epochs, and stage {number} would begin after {begin}: it never does"
        elif number == len(run.stages) and epochs >= begin + stage.epochs + step:
            yield (
                f"the stages are {begin + stage.epochs} epochs and the run is {epochs:.1f}: the last stage's loss "
                "holds to the end"
            )
        elif begin + stage.epochs - epochs > step:
            yield f"the run ends after {epochs:.1f} epochs, before stage {number} does after {begin + stage.epochs}"
        begin += stage.epochs
