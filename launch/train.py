"""`python -m launch train vavae|lightningdit CONFIG [key=value …] [--dry-run] [--gpus N]`."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import kernels
import lightningdit.cost as dit_cost
from launch.arguments import add_run_file, load_run
from launch.config import ConfigError, LightningDiTRun, VavaeRun, select_ops
from launch.runtime import launcher
from launch.runtime.run_lock import owning
from launch.training.checks import check_run, network_on_meta
from launch.training.loader import Split
from launch.training.plan import Network, RunPlan
from lightningdit.data import LatentDataset
from lightningdit.task import LightningDiTTask, check_classes, check_latents

if TYPE_CHECKING:
    from launch.runtime.processes import Processes
    from launch.training.trainer import Trainer
    from vavae.data import ImageFolder
    from vavae.task import VavaeTask

Run = LightningDiTRun | VavaeRun
BYTES = {"bfloat16": 2, "float32": 4}


def main(argv: list[str]) -> int:
    """Train, or with --dry-run say what training would take; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m launch train", description=__doc__)
    parser.add_argument("kind", choices=["vavae", "lightningdit"])
    add_run_file(parser, "YAML file, ours or a published one", "train.max_steps=20")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--gpus", type=int, help="processes the plan is for (default: as launched, else GPUs here)")
    args = parser.parse_intermixed_args(argv)
    run = load_run(args.config, args.overrides, args.kind)
    if args.gpus is not None and args.gpus < 1:
        raise ConfigError(f"--gpus must be at least 1, got {args.gpus}")
    if args.dry_run:
        print("\n".join(plan(run, args.kind, args.gpus or _processes_here()).lines()))
        return 0
    _, stopped_by = run_training(run, args.kind)
    return 128 + stopped_by if stopped_by else 0


def run_training(run: Run, kind: str) -> tuple[Path, int | None]:
    """Train as `run` says → the run's directory, and the signal that ended it early or None."""
    check_run(run)
    from launch.training.engine import (
        start_processes,  # imports DeepSpeed: seconds that a mistake or a dry run need not wait
    )

    processes = start_processes()
    run = named(run, kind, processes)
    with owning(Path(run.train.output_dir) / run.train.exp_name, processes):
        trainer = make_trainer(run, kind, processes)
        return trainer.plan.directory, trainer.run()


def named(run: Run, kind: str, processes: "Processes") -> Run:
    """The run with a name: one without `train.exp_name` gets it from the main process's time and the model."""
    if run.train.exp_name is not None:
        return run
    model = (getattr(run.model, "model_type", None) or kind).replace("/", "-")
    name = processes.share(f"{time.strftime('%Y%m%d-%H%M%S')}-{model}")
    if processes.is_main:
        print(f"no train.exp_name: this is a new run; to resume it, say train.exp_name={name}")
    return run.model_copy(update={"train": run.train.model_copy(update={"exp_name": name})})


def make_trainer(run: Run, kind: str, processes: "Processes") -> "Trainer":
    """The loop of a run, at its newest checkpoint or at its start, with nothing trained yet."""
    from launch.training.trainer import Plan, Trainer

    run = named(run, kind, processes)
    train = run.train.validating(run.data.valid_path)
    ops = select_ops(run.kernels)
    task, validation = _vavae_task(run, ops) if kind == "vavae" else _lightningdit_task(run, ops)
    directory = Path(train.output_dir) / train.exp_name
    plan = Plan(
        kind=kind,
        directory=directory,
        last_step=train.steps(len(task.batches)),
        train=train,
        optimizer=run.optimizer,
        deepspeed=run.deepspeed,
        config=run.model_dump(mode="json"),
    )
    trainer = Trainer(task, plan, processes, ops, validation)
    if processes.is_main:
        print(
            f"training {kind} in {directory}: {plan.last_step:,} steps of {train.global_batch_size} images, "
            f"{processes.world_size} × {processes.device.type}, ZeRO {run.deepspeed.zero_stage}, {train.precision}"
        )
    return trainer


def _vavae_task(run: VavaeRun, ops) -> "tuple[VavaeTask, ImageFolder | None]":
    from vavae.task import VavaeTask  # imports timm and lpips: seconds of their own

    task = VavaeTask(
        model=run.model,
        foundation=run.features(),
        loss=run.loss,
        data=run.data,
        ops=ops,
        seed=run.train.global_seed,
        global_batch_size=run.train.global_batch_size,
        stages=run.stages,
    )
    if run.train.weight_init is not None:
        task.load_weights(run.train.weight_init)
    return task, None if run.data.valid_path is None else _open(run, run.data.valid_path)


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
    validation = _open(run, run.data.valid_path)
    check_classes(task.batches, validation)
    return task, validation


def _open(run: Run, folder: str) -> "LatentDataset | ImageFolder":
    """The data in a folder as validation takes it, fit for the run's model; raises ValueError where it is not."""
    seed = run.train.global_seed
    if isinstance(run, VavaeRun):
        from vavae.data import ImageFolder  # imports torchvision: seconds of its own

        return ImageFolder.from_config(run.data.model_copy(update={"data_path": folder, "crop": "center"}), seed)
    latents = LatentDataset.from_config(run.data.model_copy(update={"data_path": folder}), seed)
    check_latents(latents, run.network())
    return latents


def plan(run: Run, kind: str, processes: int) -> RunPlan:
    """The figures of a run on so many processes, without making any of it.

    Raises ValueError for what the run itself would refuse, but that its data or a backend is missing: the plan may be
    for another machine, and says so.
    """
    check_run(run)
    train, absent = run.train, _backends_missing(run)
    num_images, assumed, opened = run.data.num_images, True, []
    for key in ("data_path", "valid_path"):
        folder = getattr(run.data, key)
        if folder is None:
            continue
        if not Path(folder).exists():
            absent.append(f"data.{key} {folder}")
            continue
        opened.append(_open(_uncached(run), folder))
        if key == "data_path":
            num_images, assumed = len(opened[0]), False
    if kind == "lightningdit" and len(opened) == 2:
        check_classes(*opened)
    networks, frozen, latents = _vavae_costs(run) if kind == "vavae" else _lightningdit_costs(run)
    if train.global_batch_size % processes:
        raise ConfigError(f"train.global_batch_size {train.global_batch_size} is no multiple of {processes} processes")
    steps = train.steps(num_images)
    micro_batch_size = train.micro_batch_size or train.global_batch_size // processes
    Split(train.global_batch_size, processes, micro_batch_size)
    return RunPlan(
        title=f"plan for {kind} ({getattr(run.model, 'model_type', None) or 'sizes of its own'}), "
        f"preset {run.preset}, {train.precision}",
        networks=networks,
        frozen_parameters=frozen,
        num_images=num_images,
        images_assumed=assumed,
        steps=steps,
        global_batch_size=train.global_batch_size,
        micro_batch_size=micro_batch_size,
        processes=processes,
        stage=run.deepspeed.zero_stage,
        bf16=train.precision == "bfloat16",
        latents=latents,
        absent=tuple(absent),
        downloads=_downloads(run),
    )


def _uncached(run: Run) -> Run:
    """The run with its images left on the disk."""
    if isinstance(run, LightningDiTRun):
        return run
    return run.model_copy(update={"data": run.data.model_copy(update={"cache": False})})


def _backends_missing(run: Run) -> list[str]:
    """Backends that the run names for single ops and that cannot serve on this machine, with the reasons."""
    named = {} if isinstance(run.kernels, str) else run.kernels
    rows = [(op, backend) for op, backend in named.items() if op != "default" and backend != "auto"]
    reasons = {f"kernels.{op} {backend}": kernels.OPS[op].reasons(backend) for op, backend in rows}
    return [f"{choice} ({'; '.join(why)})" for choice, why in reasons.items() if why]


def _downloads(run: Run) -> tuple[str, ...]:
    """Weights that the run would download."""
    if isinstance(run, LightningDiTRun):
        return ()
    from vavae import foundation, loss  # import timm and lpips: seconds of their own

    features = foundation.to_download(run.features()) if run.loss.use_vf else None
    return tuple(what for what in (features, loss.to_download(run.loss)) if what is not None)


def _lightningdit_costs(run: LightningDiTRun):
    network, parameters = run.network(), list(network_on_meta(run).parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    residual_bytes = BYTES[run.train.residual_dtype]
    activations = dit_cost.activation_bytes_per_image(
        network, weight_bytes=BYTES[run.train.precision], residual_bytes=residual_bytes
    )
    _, flops = dit_cost.flops_per_image(network)
    model = Network("model", sum(p.numel() for p in parameters), trainable, flops, activations)
    return (model,), 0, (network.in_channels, network.input_size)


def _vavae_costs(run: VavaeRun):
    import vavae.cost as vae_cost

    costs = vae_cost.training_cost(run.model, run.features(), run.loss, run.data.image_size)
    width = BYTES[run.train.precision]
    frozen = costs.pop("frozen", None)
    networks = tuple(
        Network(
            name,
            c.parameters,
            c.trainable,
            c.flops + (frozen.flops if frozen and name == "autoencoder" else 0),
            c.saved_elements * width,
        )
        for name, c in costs.items()
    )
    return (
        networks,
        frozen.parameters if frozen else 0,
        (run.model.embed_dim, run.data.image_size // run.model.downsample_ratio),
    )


def _processes_here() -> int:
    place = launcher.place()
    return place.world_size if place else max(torch.cuda.device_count(), 1)
