"""`python -m launch replay DUMP [key=value …]`: what stopped a run, computed again from its dump.

DUMP is the directory `dump_step_…` that a run leaves where skipped steps or a lasting spike stop it. Its micro-batches
go through the network with the random numbers of the run and its weights at the stop, eagerly and on this machine, on a
GPU or a CPU; for each is printed the loss, the module whose output is the first that is not finite, and, for each
block, the largest number of its output and the norm of its gradient, beside what the run computed by the same weights
when it wrote the dump. A spike met earlier weights than these: the run's own losses are printed for that.

Overrides change the run: where `kernels=reference` computes finite numbers from the same inputs, a kernel is at fault,
where `train.precision=float32` does, the precision is, and where neither does, the inputs or the weights are.
`data.data_path` may name any data that fits the model.
"""

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.files import FileError, read_json
from common.tensors import load_strict, read_tensors
from launch.arguments import local_path, require_device
from launch.config import ConfigError, Run, select_ops, stored_run
from launch.training.block_norms import block_of
from launch.training.build import make_task
from launch.training.dump import micro_batch_name, unflatten
from launch.training.loader import Tensors, to_device
from launch.training.task import Task


def main(argv: list[str]) -> int:
    """Replay a dump; returns 0, whatever comes out."""
    parser = argparse.ArgumentParser(
        prog="python -m launch replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dump", type=local_path, help="directory dump_step_… of a run")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as kernels=reference")
    parser.add_argument(
        "--rank", type=int, help="of this process alone (default: all whose loss was not finite, or all)"
    )
    parser.add_argument("--device", help="cpu, cuda … (default: a GPU where there is one)")
    args = parser.parse_intermixed_args(argv)
    device = torch.device(require_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu")))
    dump = read_dump(args.dump)
    ranks = _ranks(dump, args.rank)
    run: Any = stored_run(dump["config"], args.dump / "dump.json", args.overrides, kind=dump["kind"])
    task = _task(run, args.dump, device)
    print(f"step {dump['step']}: {dump['reason']}")
    print(_losses_in_the_run(dump))
    print(
        f"weights after step {dump['weights_of_step']} (those that step {dump['step']} met only where all steps since "
        f"were skipped), {run.train.precision} on {device}, kernels {run.kernels}"
    )
    for rank in ranks:
        for micro, recorded in enumerate(dump["ranks"][rank]):
            batch, draws = unflatten(read_tensors(args.dump / micro_batch_name(rank, micro)))
            print(f"\nrank {rank}, micro-batch {micro}, samples {_samples(dump, rank, micro)}")
            found = replay(task, to_device(batch, device), to_device(draws, device), dump["step"])
            print("\n".join(found.lines(recorded)))
    return 0


def read_dump(directory: Path) -> dict:
    """The content of a dump's `dump.json`; raises ConfigError, or FileError where it is damaged."""
    if not (directory / "dump.json").is_file():
        raise ConfigError(f"{directory} has no dump.json: it is no dump of a run, or one that was cut short")
    content = read_json(directory / "dump.json")
    if not isinstance(content, dict) or content.get("format") != 1:
        raise FileError(f"{directory / 'dump.json'} is no dump of a format that is known here (1)")
    return content


def _ranks(dump: dict, asked: int | None) -> list[int]:
    count = len(dump["ranks"])
    if asked is not None:
        if not 0 <= asked < count:
            raise ConfigError(f"--rank is {asked}; the run had ranks 0 to {count - 1}")
        return [asked]
    bad = [rank for rank, micros in enumerate(dump["ranks"]) if any(_not_finite(m["losses"]) for m in micros)]
    return bad or list(range(count))


def _not_finite(values: dict) -> bool:
    return any(isinstance(value, str) for value in values.values())


def _losses_in_the_run(dump: dict) -> str:
    """The run's own losses around the first bad step."""
    first, last = dump["step"] - 2, dump["step"] + 5
    near = [f"{step}: {_number(loss)}" for step, loss in dump.get("losses", ()) if first <= step <= last]
    return f"losses in the run, by step: {', '.join(near) or 'not recorded'}"


def _samples(dump: dict, rank: int, micro: int) -> str:
    size = dump["split"]["size"]
    found = dump["samples"]["samples"][rank][micro * size : (micro + 1) * size]
    return ", ".join(map(str, found[:8])) + (f" … ({size})" if size > 8 else "")


def _task(run: Run, dump: Path, device: torch.device) -> Task:
    """The run's task with the dump's weights, on the device and in the run's precision."""
    sections = {"train": {"weight_init": None}, "data": {"valid_path": None}}
    alone = {name: getattr(run, name).model_copy(update=keys) for name, keys in sections.items()}
    task: Any = make_task(run.model_copy(update=alone), select_ops(run.kernels), device)
    for name, network in task.networks.items():
        path = dump / f"{name}.safetensors"
        weights = read_tensors(path)
        load_strict(network, weights, path)
        network.to(device, getattr(torch, run.train.precision)).train()
        for key, p in network.named_parameters():
            if not p.requires_grad:  # in training these are not rounded either
                p.data = weights[key].to(device)
    task.to(device)
    return task


@dataclass
class Replay:
    """What one micro-batch gave."""

    inputs: list[str] = field(default_factory=list)  # what in the micro-batch is not finite
    losses: dict[str, float] = field(default_factory=dict)
    first: str | None = None  # the module whose output is the first that is not finite
    outputs: dict[str, float] = field(default_factory=dict)  # block → largest absolute number of its outputs
    grad_norms: dict[str, float] = field(default_factory=dict)

    def lines(self, recorded: dict) -> Iterator[str]:
        """For a person, beside what the run computed by the same weights when it wrote the dump."""
        for name, loss in self.losses.items():
            yield f"  loss of {name}: {loss:.6g} (when dumped: {_number(recorded['losses'].get(name))})"
        yield from (f"  not finite in the micro-batch: {what}" for what in self.inputs)
        yield f"  first module whose output is not finite: {self.first or 'none'}"
        theirs = {
            f"{network}.{block}": norm
            for network, norms in recorded["grad_norms"].items()
            for block, norm in norms.items()
        }
        width = max(map(len, self.grad_norms), default=5)
        yield f"  {'block':<{width}}  {'largest output':>14}  {'gradient norm':>13}  {'when dumped':>11}"
        for block, norm in self.grad_norms.items():
            output = _number(self.outputs.get(block))
            yield f"  {block:<{width}}  {output:>14}  {norm:>13.4g}  {_number(theirs.get(block)):>11}"


def _number(value: float | str | None) -> str:
    return "-" if value is None else f"{float(value):.4g}"


def replay(task: Task, batch: Tensors, draws: Tensors, step: int) -> Replay:
    """One micro-batch through the networks and back, on plain modules; nothing is updated but their gradients."""
    found = Replay(inputs=[*_wrong("batch", batch), *_wrong("draws", draws)])

    def backward(name: str, loss: torch.Tensor) -> None:
        found.losses[name] = loss.item()
        loss.backward()

    for network in task.networks.values():
        network.zero_grad(set_to_none=True)
    with _watched(task.networks, found):
        task.train_step(task.networks, batch, draws, step, backward)
    for name, network in task.networks.items():
        squares: dict[str, float] = {}
        for key, p in network.named_parameters():
            if p.grad is not None:
                block = f"{name}.{block_of(key)}"
                squares[block] = squares.get(block, 0.0) + p.grad.double().square().sum().item()
        found.grad_norms |= {block: math.sqrt(value) for block, value in squares.items()}
    return found


def _wrong(what: str, tensors: Tensors) -> Iterator[str]:
    """What is not finite, with the sample that it is in."""
    for name, value in tensors.items():
        if value.is_floating_point() and not (finite := value.isfinite()).all():
            sample = int((~finite).flatten(1).any(1).nonzero()[0]) if value.dim() > 1 else int((~finite).nonzero()[0])
            yield f"{what}.{name}, {int((~finite).sum())} numbers, the first in sample {sample} of the micro-batch"


@contextmanager
def _watched(networks: dict[str, nn.Module], found: Replay) -> Iterator[None]:
    """Look at the outputs of all modules as they come."""
    hooks = []
    for network, root in networks.items():
        for key, module in root.named_modules():
            name = f"{network}.{key}" if key else network

            def look(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                for value in _tensors(output):
                    largest = value.detach().abs().amax().item()
                    found.outputs[name] = max(found.outputs.get(name, 0.0), largest, key=_badness)
                    if not math.isfinite(largest) and found.first is None:
                        found.first = name

            hooks.append(module.register_forward_hook(look))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _badness(value: float) -> tuple[bool, float]:
    """NaN above all."""
    return math.isnan(value), value


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        if output.is_floating_point() and output.numel():
            yield output
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _tensors(part)
