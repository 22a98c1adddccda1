"""Checks of a run before anything is built, the same in training and in a dry run."""

import os
from pathlib import Path

import torch
from torch import nn

from common.files import FileError, open_regular
from common.tensors import weights_file
from launch.config import ConfigError, LightningDiTRun, Run, VavaeRun, select_ops
from launch.hub import is_reference
from launch.training.checkpoint_search import candidates
from launch.training.gradient_sums import engine_options
from lightningdit.model import LightningDiT
from vavae.config import check_sections


def check_run(run: Run) -> None:
    """Raise ValueError, naming the key, for what would end training at its start or once its turn comes.

    Opens no data, whose absence a plan may bear, and loads no weights, whose presence is enough here.
    """
    if isinstance(run, VavaeRun):
        check_sections(run.model, run.features(), run.loss, run.data, run.stages)
    run.train.with_validation(run.data.valid_path)
    run.train.steps(1)
    if run.train.ckpt is not None and run.train.weight_init is not None:
        raise ConfigError(
            "train.ckpt goes on from a checkpoint and its weights, train.weight_init starts from other "
            "weights: set one of the two to null"
        )
    _check_profiling(run, engine_options(run.train, run.deepspeed))
    for key, path in _weights(run).items():
        check_file(key, path)
    if isinstance(run, LightningDiTRun) and run.evaluation.figures:
        from launch.training.sample_figures import figure_settings, judge_source  # imports timm

        judge_source(run)
        figure_settings(run)
    if run.train.ckpt is not None:
        try:
            candidates(Path(run.train.ckpt))
        except ValueError as e:
            raise ConfigError(f"train.ckpt: {e}") from None
    check_directory("train.output_dir", run.train.directory)


def _check_profiling(run: Run, options: dict) -> None:
    """Refuse DeepSpeed's profiler and clock for networks that they cannot follow."""
    profiler = options.get("flops_profiler", {})
    asked = {"flops_profiler": profiler.get("enabled"), "wall_clock_breakdown": options.get("wall_clock_breakdown")}
    if asked["flops_profiler"] and run.train.compile not in ("auto", "none"):
        raise ConfigError(
            f"deepspeed: flops_profiler looks into modules, and train.compile {run.train.compile} leaves "
            "none to look into: leave it out, or compile none"
        )
    if isinstance(run, VavaeRun) and run.loss.use_gan:
        for key in filter(asked.get, asked):
            raise ConfigError(
                f"deepspeed: {key} times one forward pass for each backward pass, and the discriminator "
                "has two: leave it out, or set loss.disc_weight 0"
            )
    if asked["flops_profiler"]:
        _check_module_depth(run, profiler.get("module_depth") or 0)
        if profiler.get("output_file"):
            check_output_file("deepspeed: flops_profiler.output_file", Path(profiler["output_file"]))


def _check_module_depth(run: Run, depth: int) -> None:
    """Refuse to have levels of modules summed up that the network has not; DeepSpeed would look for them in a step."""
    if depth > 0 and depth > (levels := _levels(network_on_meta(run))):
        raise ConfigError(
            f"deepspeed: flops_profiler.module_depth is {depth}, but the network has modules in {levels} "
            "levels: give fewer, or -1 for all"
        )


def network_on_meta(run: Run) -> nn.Module:
    """The run's network, without memory; of a tokenizer the autoencoder."""
    ops = select_ops("reference")
    with torch.device("meta"):
        if isinstance(run, LightningDiTRun):
            return LightningDiT(run.network(), ops)
        from vavae.task import build_networks  # imports timm and lpips: seconds of their own

        return build_networks(run.model, run.loss, ops, 0, 1 if run.loss.use_vf else None)["autoencoder"]


def _levels(module: nn.Module) -> int:
    return 1 + max(map(_levels, module.children()), default=0)


def _weights(run: Run) -> dict[str, str]:
    """The weights files that training reads, by the key that names each."""
    named = {"train.weight_init": run.train.weight_init}
    if isinstance(run, LightningDiTRun) and (run.train.previews or run.evaluation.figures):
        named["vae.ckpt_path"] = run.vae.ckpt_path
    if isinstance(run, VavaeRun):
        named["foundation.weights"] = run.foundation.weights if run.loss.use_vf else None
        named["loss.perceptual_weights"] = run.loss.perceptual_weights if run.loss.perceptual == "lpips" else None
    # What is on the hub is downloaded when it is loaded.
    return {key: path for key, path in named.items() if path is not None and not is_reference(path)}


def check_file(key: str, path: Path | str) -> None:
    """Raise ConfigError, naming `key`, unless `path` is a file that can be read, or a folder of diffusers with one."""
    try:
        open_regular(weights_file(path)).close()
    except FileError as e:
        raise ConfigError(f"{key}: {e}") from None


def check_directory(key: str, path: Path) -> None:
    """Raise ConfigError, naming `key`, unless `path` is a directory that can be written in, or can be made."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists() or p.is_symlink())
    if not existing.is_dir():
        raise ConfigError(f"{key}: {existing} is no directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        made = "" if existing == path else f", so {path} cannot be made"
        raise ConfigError(f"{key}: no permission to write in {existing}{made}")


def check_output_file(key: str, path: Path) -> None:
    """Raise ConfigError, naming `key`, unless `path` is a file that can be written, or can be made."""
    if path.is_dir():
        raise ConfigError(f"{key}: {path} is a directory, not a file")
    if not path.exists():
        check_directory(key, path.parent)
    elif not os.access(path, os.W_OK):
        raise ConfigError(f"{key}: no permission to write {path}")
