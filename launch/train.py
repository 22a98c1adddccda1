"""`python -m launch train vavae|lightningdit CONFIG [key=value …] [--dry-run] [--gpus N]`."""

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import lightningdit.cost as dit_cost
from launch.config import ConfigError, LightningDiTRun, VavaeRun, load, select_ops
from launch.loader import Split
from launch.plan import Network, RunPlan
from lightningdit.data import LatentDataset
from lightningdit.model import LightningDiT
from lightningdit.task import LightningDiTTask

if TYPE_CHECKING:
    from launch.engine import Processes
    from launch.trainer import Trainer
    from vavae.data import ImageFolder
    from vavae.task import VavaeTask

Run = LightningDiTRun | VavaeRun
BYTES = {"bfloat16": 2, "float32": 4}


def main(argv: list[str]) -> int:
    """Train, or with --dry-run say what training would take; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m launch train", description=__doc__)
    parser.add_argument("kind", choices=["vavae", "lightningdit"])
    parser.add_argument("config", help="YAML file, ours or a published one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.max_steps=20")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--gpus", type=int, help="processes the plan is for (default: as launched, else GPUs here)")
    args = parser.parse_args(argv)
    run, notes = load(args.config, args.overrides, kind=args.kind)
    if int(os.environ.get("RANK", 0)) == 0:
        for note in notes:
            print(f"{args.config}: {note}")
    if args.dry_run:
        print("\n".join(plan(run, args.kind, args.gpus or _processes_here()).lines()))
        return 0
    _, stopped_by = run_training(run, args.kind)
    return 128 + stopped_by if stopped_by else 0


def run_training(run: Run, kind: str) -> tuple[Path, int | None]:
    """Train as `run` says → the run's directory, and the signal that ended it early or None."""
    from launch.engine import start_processes  # imports DeepSpeed: seconds that a dry run need not wait

    trainer = make_trainer(run, kind, start_processes())
    return trainer.plan.directory, trainer.run()


def make_trainer(run: Run, kind: str, processes: "Processes") -> "Trainer":
    """The loop of a run, at its newest checkpoint or at its start, with nothing trained yet."""
    from launch.trainer import Plan, Trainer

    train = run.train.validating(run.data.valid_path)
    ops = select_ops(run.kernels)
    task, validation = _vavae_task(run, ops) if kind == "vavae" else _lightningdit_task(run, ops)
    name = train.exp_name
    if name is None:  # made from the main process's time and the model
        model = (getattr(run.model, "model_type", None) or kind).replace("/", "-")
        name = processes.share(f"{time.strftime('%Y%m%d-%H%M%S')}-{model}")
        if processes.is_main:
            print(f"no train.exp_name: this is a new run; to resume it, say train.exp_name={name}")
    directory = Path(train.output_dir) / name
    plan = Plan(
        kind=kind, directory=directory, last_step=train.steps(len(task.batches)), train=train,
        optimizer=run.optimizer, deepspeed=run.deepspeed, config=run.model_dump(mode="json"),
    )
    trainer = Trainer(task, plan, processes, ops, validation)
    if processes.is_main:
        print(f"training {kind} in {directory}: {plan.last_step:,} steps of {train.global_batch_size} images, "
              f"{processes.world_size} × {processes.device.type}, ZeRO {run.deepspeed.zero_stage}, {train.precision}")
    return trainer


def _vavae_task(run: VavaeRun, ops) -> "tuple[VavaeTask, ImageFolder | None]":
    from vavae.data import ImageFolder  # imports torchvision, and the task timm and lpips: seconds of their own
    from vavae.task import VavaeTask

    task = VavaeTask(
        model=run.model, foundation=run.features(), loss=run.loss, data=run.data, ops=ops,
        seed=run.train.global_seed, global_batch_size=run.train.global_batch_size, stages=run.stages,
    )
    if run.train.weight_init is not None:
        task.load_weights(run.train.weight_init)
    validation = None
    if run.data.valid_path is not None:
        validation = ImageFolder.from_config(
            run.data.model_copy(update={"data_path": run.data.valid_path, "crop": "center"}), run.train.global_seed
        )
    return task, validation


def _lightningdit_task(run: LightningDiTRun, ops) -> tuple[LightningDiTTask, LatentDataset | None]:
    seed = run.train.global_seed
    task = LightningDiTTask(
        run.network(), run.transport, run.data, ops, seed=seed,
        residual_dtype=getattr(torch, run.train.residual_dtype), resident=run.deepspeed.zero_stage < 3,
    )
    if run.train.weight_init is not None:
        # As published: its training went on from `model`. The average is the better network to start from.
        task.load_weights(run.train.weight_init, "model" if run.preset == "paper" else "ema")
    validation = None
    if run.data.valid_path is not None:
        validation = LatentDataset.from_config(run.data.model_copy(update={"data_path": run.data.valid_path}), seed)
    return task, validation


def plan(run: Run, kind: str, processes: int) -> RunPlan:
    """The figures of a run on so many processes, without making any of it."""
    train = run.train
    num_images, assumed = _count_images(run, kind)
    networks, frozen, latents = _vavae_costs(run) if kind == "vavae" else _lightningdit_costs(run)
    if train.global_batch_size % processes:
        raise ConfigError(f"train.global_batch_size {train.global_batch_size} is no multiple of {processes} processes")
    steps = train.steps(num_images)
    Split(train.global_batch_size, processes, train.micro_batch_size or train.global_batch_size // processes)
    return RunPlan(
        title=f"plan for {kind} ({getattr(run.model, 'model_type', None) or 'sizes of its own'}), "
              f"preset {run.preset}, {train.precision}",
        networks=networks, frozen_parameters=frozen, num_images=num_images, images_assumed=assumed, steps=steps,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size or train.global_batch_size // processes,
        processes=processes, stage=run.deepspeed.zero_stage, bf16=train.precision == "bfloat16", latents=latents,
    )


def _count_images(run: Run, kind: str) -> tuple[int, bool]:
    """Images of the run's data, and whether that is only assumed because there are none to count."""
    if not Path(run.data.data_path).is_dir():
        return run.data.num_images, True
    if kind == "vavae":
        from vavae.data import ImageFolder

        return len(ImageFolder.from_config(run.data, 0)), False
    return len(LatentDataset.from_config(run.data, 0)), False


def _lightningdit_costs(run: LightningDiTRun):
    network = run.network()
    with torch.device("meta"):
        parameters = list(LightningDiT(network, select_ops("reference")).parameters())
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
        Network(name, c.parameters, c.trainable, c.flops + (frozen.flops if frozen and name == "autoencoder" else 0),
                c.saved_elements * width)
        for name, c in costs.items()
    )
    return networks, frozen.parameters if frozen else 0, (run.model.embed_dim,
                                                         run.data.image_size // run.model.downsample_ratio)


def _processes_here() -> int:
    return int(os.environ.get("WORLD_SIZE", 0)) or max(torch.cuda.device_count(), 1)

