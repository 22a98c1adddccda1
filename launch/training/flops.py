"""FLOPs of a training step per image, of the model as it is: what is computed again to save memory does not count."""

from collections.abc import Callable
from functools import cache

from launch.config import LightningDiTRun, Run, VavaeRun
from lightningdit.cost import training_flops_per_image
from vavae.config import loss_at


def training_flops(run: Run, num_images: int) -> Callable[[int], float]:
    """From a step (from 1) to FLOPs per image; a tokenizer's follow the terms of its loss that are in force.

    num_images: of an epoch. For a tokenizer the first call of each kind takes seconds: operators are counted.
    """
    if isinstance(run, LightningDiTRun):
        training = training_flops_per_image(run.network(), run.transport)
        return lambda step: training
    return _of_tokenizer(run, num_images)


def _of_tokenizer(run: VavaeRun, num_images: int) -> Callable[[int], float]:
    batch = run.train.global_batch_size

    @cache
    def counted(gan: bool, aligns: bool) -> float:
        from vavae.cost import training_cost  # imports timm and lpips: seconds of their own

        loss = run.loss if gan else run.loss.model_copy(update={"disc_weight": 0.0})
        loss = loss if aligns else loss.model_copy(update={"use_vf": False})
        return sum(c.flops for c in training_cost(run.model, run.features(), loss, run.data.image_size).values())

    def at(step: int) -> float:
        loss = loss_at(run.loss, run.stages, (step - 1) * batch / num_images)
        begun = loss.disc_start is not None and step - 1 >= loss.disc_start
        return counted(loss.use_gan and begun, loss.aligns)

    return at
