"""What a run leaves behind where bad numbers stop it, for `python -m launch replay`.

dump_step_0000123/
  dump.json                              why, the row, skipped steps, the run's last losses; the bad step's samples,
                                         and losses and norms by the weights here
  <network>.safetensors                  weights at the stop, float32
  rank0000_micro0000.safetensors         what that process trained on in that step: `batch.…` and `draws.…`
  replay.sh                              the command that computes it again
"""

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.files import make_directory, write_json, write_text
from common.tensors import write_tensors
from launch.runtime.packages import ROOT
from launch.runtime.processes import Processes
from launch.training.block_norms import block_of
from launch.training.config import MEASURED
from launch.training.engine import Engine
from launch.training.loader import BatchSplit, SampleOrder, Tensors, samples_of_step, to_device
from launch.training.task import Measures, Task
from launch.training.trainer_config import TrainerConfig


@dataclass(frozen=True)
class RunParts:
    """What a run is made of where its bad steps are concerned."""

    config: TrainerConfig
    task: Task
    engines: Mapping[str, Engine]
    order: SampleOrder
    split: BatchSplit
    processes: Processes


@dataclass(frozen=True)
class BadSteps:
    """Steps from `first` to `last` that a run does not leave behind.

    spike: the first of them whose loss was a spike, if any was; steps that were skipped left no trace in the weights.
    """

    first: int
    last: int
    what: str
    spike: int | None = None

    @property
    def good_until(self) -> int:
        """The step before which weights are good ones, and there is something to draw anew."""
        return self.last if self.spike is None else self.spike


def replay_command(directory: Path) -> str:
    return f"python -m launch replay {shlex.quote(str(directory))}"


def _replay_script() -> str:
    """The same for a shell, by the interpreter and the packages of this process, wherever the dump is moved to."""
    return (
        "#!/bin/sh\n"
        f'[ -n "$PYTHON" ] || PYTHON={shlex.quote(sys.executable)}\n'
        f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}\n"
        'exec "$PYTHON" -m launch replay "$(dirname -- "$0")" "$@"\n'
    )


def write_dump(
    parts: RunParts,
    *,
    row: dict,
    bad: BadSteps,
    skipped_steps: list[dict],
    losses: Sequence[tuple[int, float]],
) -> Path:
    """Write the dump of the first bad step → its directory; every process must call it, and may not train afterwards.

    The step's micro-batches are computed once more by the weights at the stop, for the norms of each.

    Args:
        losses: (step, loss) of the run's last steps, as they were.
    """
    config, split, processes, step = parts.config, parts.split, parts.processes, bad.first
    directory = config.directory / f"dump_step_{step:07d}"
    facts = {
        "format": 1,
        "kind": config.kind,
        "reason": bad.what,
        "step": step,
        "last_bad_step": bad.last,
        "weights_of_step": row["step"],
        "row": row,
        "skipped_steps": [each | samples_of_step(parts.order, split, each["step"]) for each in skipped_steps],
        "losses": losses,
        "samples": samples_of_step(parts.order, split, step),
        "random_numbers": {
            "seed": parts.order.seed_of(step),
            "device": processes.device.type,
            "made_by": "common.seeds.generator(seed, step and purpose): a function of them and of the type of device",
        },
        "split": {"world_size": split.world_size, "accumulation": split.accumulation, "size": split.micro_batch_size},
        "redrawn": [list(each) for each in parts.order.redrawn],
        "config": config.run,
        "ranks": [],
    }
    if processes.is_main:
        make_directory(directory)
        write_text(directory / "replay.sh", _replay_script())
    for name, engine in parts.engines.items():
        weights = engine.full_state(["model"], keep=processes.is_main)["model"]
        if processes.is_main:
            write_tensors(directory / f"{name}.safetensors", weights)
    processes.barrier()
    ranks = processes.all_gather(_micro_batches(parts, directory, step))
    if processes.is_main:
        write_json(directory / "dump.json", _storable(facts | {"ranks": ranks}))
    processes.barrier()
    return directory


def _micro_batches(parts: RunParts, directory: Path, step: int) -> list[dict]:
    """Write this process's micro-batches of a step → what computing each again gives."""
    task, split, processes, seed = parts.task, parts.split, parts.processes, parts.order.seed_of(step)
    draws, found = task.draw(step, split.global_batch_size, processes.device, seed=seed), []
    for micro in range(split.accumulation):
        start, stop = split.bounds(micro, processes.rank)
        batch = task.batches.batch(*parts.order.slice(step, start, stop))
        own = {name: value[start:stop] for name, value in draws.items()}
        write_tensors(directory / micro_batch_name(processes.rank, micro), _flat(batch, own))
        found.append({"t": own["t"].tolist()} if "t" in own else {})
        found[-1] |= _compute_again(parts, to_device(batch, processes.device), own, step)
    return found


def micro_batch_name(rank: int, micro: int) -> str:
    return f"rank{rank:04d}_micro{micro:04d}.safetensors"


def _flat(batch: Tensors, draws: Tensors) -> Tensors:
    parts = {"batch": batch, "draws": draws}
    return {f"{part}.{n}": v.detach().cpu().contiguous() for part, values in parts.items() for n, v in values.items()}


def unflatten(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Batch and draws of a micro-batch's file."""
    parts: dict[str, Tensors] = {"batch": {}, "draws": {}}
    for key, value in tensors.items():
        part, _, name = key.partition(".")
        parts[part][name] = value
    return parts["batch"], parts["draws"]


def _compute_again(parts: RunParts, batch: Tensors, draws: Tensors, step: int) -> dict:
    """Loss and gradient norms by block of one micro-batch on this process, by network, and what the task measures.

    Norms are those of the micro-batch's own loss: the engines divide it by the number of micro-batches in a step.
    """
    task, engines = parts.task, parts.engines
    squares: dict[str, dict[str, torch.Tensor]] = {name: {} for name in engines}
    losses: dict[str, torch.Tensor] = {}
    hooks = []

    def add(network: str, block: str, grad: torch.Tensor) -> None:
        squares[network][block] = squares[network].get(block, 0.0) + grad.float().norm().square()

    for network, engine in engines.items():
        trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
        hooks += [p.register_hook(partial(add, network, block_of(name))) for name, p in trained]

    def backward(name: str, loss: torch.Tensor) -> None:
        losses[name] = loss.detach()
        engines[name].backward(loss)

    try:
        task.train_step(engines, batch, draws, step, backward)
    finally:
        for hook in hooks:
            hook.remove()
    figures = task.measure(MEASURED, engines, batch, draws) if isinstance(task, Measures) else {}
    scale = parts.split.accumulation
    norms = {n: {block: scale * value.sqrt().item() for block, value in of.items()} for n, of in squares.items()}
    return {
        "losses": {name: loss.item() for name, loss in losses.items()},
        "grad_norms": norms,
        "figures": {name: value.item() for name, value in figures.items()},
    }


def _storable(content: Any) -> Any:
    """`content` for JSON, which has no numbers that are not finite: they are the texts "nan", "inf" and "-inf"."""
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    if isinstance(content, Mapping):
        return {key: _storable(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_storable(value) for value in content]
    return content
