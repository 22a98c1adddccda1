"""Build the trainer of a run: the task of its model, its data, and where it is written."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kernels.registry import Ops
from launch.config import ConfigError, LightningDiTRun, Run, VavaeRun, select_ops
from launch.runtime.processes import Processes
from launch.training.flops import training_flops
from launch.training.placement import place_latents
from launch.training.rollback import Rollback
from launch.training.trainer_config import TrainerConfig
from lightningdit.data import LatentDataset
from lightningdit.task import LightningDiTTask, check_classes, check_latents

if TYPE_CHECKING:
    from launch.training.trainer import Trainer
    from vavae.data import ImageDataset
    from vavae.task import VavaeTask


def name_run(run: Run, kind: str, processes: Processes) -> Run:
    """The run with a name: one without `train.exp_name` gets it from the main process's time and the model."""
    if run.train.exp_name is not None:
        return run
    model = (getattr(run.model, "model_type", None) or kind).replace("/", "-")
    name = processes.broadcast(f"{time.strftime('%Y%m%d-%H%M%S')}-{model}")
    if processes.is_main:
        print(f"no train.exp_name: this is a new run; to resume it, say train.exp_name={name}")
    return run.model_copy(update={"train": run.train.model_copy(update={"exp_name": name})})


def make_trainer(run: Run, kind: str, processes: Processes, rollback: Rollback | None = None) -> "Trainer":
    """The loop of a run that has a name, at its newest checkpoint or at its start, with nothing trained yet.

    rollback: what an earlier one has raised.
    """
    from launch.training.trainer import Trainer  # imports DeepSpeed: seconds of its own
    from launch.training.wandb_writer import require_wandb  # imports TensorBoard

    train = run.train.with_validation(run.data.valid_path)
    require_wandb(train.wandb)
    assert train.exp_name is not None, "name_run gives one"
    ops = select_ops(run.kernels)
    task: VavaeTask | LightningDiTTask
    validation: ImageDataset | LatentDataset | None
    on_device = previews = figures = None
    if isinstance(run, VavaeRun):
        task, validation = vavae_task(run, ops, processes.device)
        require_one_decoder(task.batches, processes)
        # As it is on this machine: going on elsewhere, by another decoder, is said.
        data = run.images().model_copy(update={"decoder": task.batches.decoder})
        run = run.model_copy(update={"data": data})
    else:
        task, validation = _lightningdit_task(run, ops)
        from launch.training.previews import make_previews  # imports Pillow and torchvision

        on_device = place_latents(run, task.batches, processes)
        previews = make_previews(run, task, processes)
        if run.evaluation.figures:
            from launch.training.sample_figures import make_figures  # imports timm

            figures = make_figures(run, task, processes)
    directory = Path(train.output_dir) / train.exp_name
    config = TrainerConfig(
        kind=kind,
        directory=directory,
        last_step=train.steps(len(task.batches)),
        train=train,
        optimizer=run.optimizer,
        deepspeed=run.deepspeed,
        run=run.model_dump(mode="json"),
        flops=training_flops(run, len(task.batches)),
        paced=isinstance(run, LightningDiTRun),
    )
    trainer = Trainer(
        task,
        config,
        processes,
        ops,
        validation,
        on_device,
        previews=previews,
        sample_figures=figures,
        rollback=rollback,
    )
    if processes.is_main:
        print(
            f"training {kind} in {directory}: {config.last_step:,} steps of {train.global_batch_size} images, "
            f"{processes.world_size} × {processes.device.type}, ZeRO {run.deepspeed.zero_stage}, {train.precision}"
        )
    return trainer


def make_task(run: Run, ops: Ops, device: torch.device | str = "cpu") -> "VavaeTask | LightningDiTTask":
    """The task of a run with those ops."""
    return vavae_task(run, ops, device)[0] if isinstance(run, VavaeRun) else _lightningdit_task(run, ops)[0]


def require_one_decoder(images: "ImageDataset", processes: Processes) -> None:
    """Raise ConfigError, on every process, where `data.decoder: auto` came to different ones: pixels would differ."""
    found = processes.all_gather(images.decoder)
    if len(set(found)) > 1:
        ranks = ", ".join(f"{name} (first on rank {found.index(name)})" for name in sorted(set(found)))
        raise ConfigError(
            f"data.decoder auto takes {ranks}: name one that all processes have, or install what is lacking"
        )


def vavae_task(run: VavaeRun, ops, device: torch.device | str = "cpu") -> "tuple[VavaeTask, ImageDataset | None]":
    """The task of a run with those ops, and its validation images; images may be decoded on `device`."""
    from vavae.task import VavaeTask  # imports timm and lpips: seconds of their own

    task = VavaeTask(
        model=run.model,
        foundation=run.features(),
        loss=run.loss,
        data=run.images(),
        ops=ops,
        seed=run.train.global_seed,
        global_batch_size=run.train.global_batch_size,
        stages=run.stages,
        device=device,
        use_checkpoint=run.train.use_checkpoint,
        frozen_dtype=getattr(torch, run.train.precision),
        num_pictures=run.train.pictures,
        picture_similarities=run.train.picture_similarities,
    )
    if run.train.weight_init is not None:
        task.load_weights(run.train.weight_init)
    return task, None if run.data.valid_path is None else _open_images(run, "valid_path", device)


def _lightningdit_task(run: LightningDiTRun, ops) -> tuple[LightningDiTTask, LatentDataset | None]:
    seed = run.train.global_seed
    task = LightningDiTTask(
        run.network(),
        run.transport,
        run.data,
        ops,
        seed=seed,
        residual_dtype=getattr(torch, run.train.residual_dtype),
        params_gathered=run.deepspeed.zero_stage < 3,
    )
    if run.train.weight_init is not None:
        # As published: its training went on from `model`. The average is the better network to start from.
        task.load_weights(run.train.weight_init, "model" if run.preset == "paper" else "ema")
    if run.data.valid_path is None:
        return task, None
    validation = _open_latents(run, run.data.valid_path)
    check_classes(task.batches, validation)
    return task, validation


def open_dataset(run: Run, key: str, device: torch.device | str = "cpu") -> "LatentDataset | ImageDataset":
    """The data that `data.data_path` or `data.valid_path` names, fit for the run's model; raises ValueError if not."""
    if isinstance(run, VavaeRun):
        return _open_images(run, key, device)
    return _open_latents(run, getattr(run.data, key))


def _open_images(run: VavaeRun, key: str, device: torch.device | str = "cpu") -> "ImageDataset":
    from vavae.data import ImageDataset  # imports torchvision: seconds of its own

    data, seed = run.images(), run.train.global_seed
    if key == "data_path":
        return ImageDataset(data, seed, device=device)
    return ImageDataset(data.for_evaluation(data.valid_path), seed, split="val", device=device)


def _open_latents(run: LightningDiTRun, folder: str) -> LatentDataset:
    latents = LatentDataset.from_config(run.data.model_copy(update={"data_path": folder}), run.train.global_seed)
    check_latents(latents, run.network())
    return latents
