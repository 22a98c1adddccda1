"""Start a run from a checkpoint: which one, and its weights, optimizer states and counters."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from common.files import path_exists
from common.tensors import load_strict
from launch.runtime.processes import Processes
from launch.training import checkpoint
from launch.training.checkpoint import Checkpoint, CheckpointError
from launch.training.checkpoint_search import candidates, newest_whole
from launch.training.config import TrainConfig
from launch.training.engine import Engine
from launch.training.task import Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a run begins from. checkpoint: found whole; damaged: later ones of the run that are not, with the reason."""

    checkpoint: Checkpoint | None
    damaged: Mapping[Path, str] = field(default_factory=dict)


def agree_on_start(
    checkpoints: Path, train: TrainConfig, processes: Processes, *, going_on: bool = False
) -> Checkpoint | None:
    """The checkpoint that the main process finds (see `find_start`), on every process; None for a new run.

    Incomplete saves below `checkpoints` are removed first. Damaged checkpoints that are later than the one found are
    set aside, then all but those to be kept are removed. Raises, on every process, what the main one raised, or
    CheckpointError where a process cannot see the checkpoint.
    """
    found = processes.on_main(lambda: _prepare_start(checkpoints, train, going_on))
    path = None if found is None else found.path
    if processes.any(path is not None and not path.is_dir()):
        raise CheckpointError(f"{path} is not visible from every process: is train.output_dir shared?")
    return found


def _prepare_start(checkpoints: Path, train: TrainConfig, going_on: bool) -> Checkpoint | None:
    if checkpoints.is_dir():
        checkpoint.clean_up(checkpoints)
    start = find_start(checkpoints, train, going_on=going_on)
    for path, reason in start.damaged.items():
        aside = checkpoint.set_aside(path)
        log.warning("%s is DAMAGED and set aside as %s: %s", path, aside.name, reason)
    if train.keep_checkpoints:
        checkpoint.prune(checkpoints, train.keep_checkpoints, train.keep_every)
    return start.checkpoint


def find_start(checkpoints: Path, train: TrainConfig, *, going_on: bool = False) -> Start:
    """The newest whole checkpoint of this run's directory, else what `train.ckpt` names, else none.

    going_on: whether this process has begun the run already: then it goes on from the run's own checkpoints, whatever
    `train.resume` and `train.ckpt` say of a start.

    Raises ValueError where going on from there would lose what is there, or is not what the user asked for; of it
    AllDamagedError where there are checkpoints and none is whole. Renames and removes nothing.
    """
    own = checkpoint.by_step(checkpoints)
    if own and going_on:
        return Start(*newest_allowed(own, train))
    named = None if train.ckpt is None else candidates(Path(train.ckpt))
    if not own:
        return _start_of_another(checkpoints, named, train)
    if not train.resume:
        raise ValueError(
            f"{checkpoints} already holds step {int(own[0].path.name.removeprefix('step_'))} and train.resume is "
            "false; give another train.exp_name or output_dir, or remove it"
        )
    newest, damaged = newest_allowed(own, train)
    if named is not None and named[0].path.resolve() != newest.path.resolve():
        if named[0].path.resolve() in {path.resolve() for path in damaged}:
            named[0].verify()  # says why not
        if named[0].path.resolve().parent == checkpoints.resolve():
            raise ValueError(
                f"train.ckpt is {named[0].path}, but this run has gone on to {newest.path.name}: to branch off, "
                "give another train.exp_name; to go on, leave train.ckpt out"
            )
        print(f"train.ckpt {named[0].path} was this run's start; now its own newest checkpoint is")
    if train.weight_init is not None:
        print(f"train.weight_init {train.weight_init} was this run's start; now its newest checkpoint is")
    return Start(newest, damaged)


def _start_of_another(checkpoints: Path, named: Sequence[Checkpoint] | None, train: TrainConfig) -> Start:
    """Of a run that has no checkpoint of its own; those of another run are left as they are."""
    _refuse_foreign(checkpoints)
    if named is None:
        return Start(None)
    found, damaged = newest_allowed(named, train)
    for reason in damaged.values():
        log.warning("DAMAGED and passed over: %s", reason)
    print(f"starting from {found.path}, as train.ckpt says")
    return Start(found)


def newest_allowed(found: Sequence[Checkpoint], train: TrainConfig) -> tuple[Checkpoint, dict[Path, str]]:
    """As `newest_whole`; raises CheckpointError where the first is not whole and `train.resume` is strict."""
    if train.resume != "strict":
        return newest_whole(found)
    try:
        return found[0].verify(), {}
    except CheckpointError as e:
        raise CheckpointError(
            f"{e} (train.resume is strict; true would set {found[0].path.name} aside and take the one before)"
        ) from None


def _refuse_foreign(checkpoints: Path) -> None:
    """Do not start over among another program's checkpoints, such as those of the published code."""
    files = checkpoints.iterdir() if path_exists(checkpoints) else ()
    foreign = sorted(p.name for p in files if p.suffix in (".pt", ".pth", ".ckpt"))
    if foreign:
        raise ValueError(
            f"{checkpoints} holds {foreign[-1]}, of another program: name it in "
            "train.weight_init, which takes its weights, and give another train.exp_name"
        )


def load_weights(start: Checkpoint, task: Task, identity: dict) -> int:
    """Load a checkpoint's weights and task state into a task whose networks have no engine yet → the checkpoint's step.

    identity: entries of the state that must be equal in this run. Raises CheckpointError where one is not.
    """
    state = start.state
    for key, ours in identity.items():
        if state[key] != ours:
            raise CheckpointError(
                f"{start.path} was trained with {key} {state[key]!r}, this run has "
                f"{ours!r}: its steps would not mean the same images"
            )
    task.load_state_dict(state["task"])
    for name, network in task.networks.items():
        load_strict(network, start.tensors(name), start.path / name)
    return state["step"]


def load_optimizer_states(start: Checkpoint, networks: dict[str, nn.Module], engines: dict[str, Engine]) -> None:
    """Load float32 weights, optimizer states and counters of a checkpoint into the engines of these networks."""
    for name, engine in engines.items():
        trained = [(n, p) for n, p in networks[name].named_parameters() if p.requires_grad]
        shapes = {n: getattr(p, "ds_shape", p.shape) for n, p in trained}  # ZeRO 3 leaves none in the parameter
        for key, tensors in start.states(name, shapes):
            engine.load_states({key: tensors})
        engine.optimizer.set_counters(start.state["counters"][name])


def config_changes(old: dict, new: dict, prefix: str = "") -> list[str]:
    """'key: old → new' for every key in which two run files differ."""
    changes = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changes += config_changes(a, b, f"{prefix}{key}.")
        elif a != b:
            changes.append(f"{prefix}{key}: {a!r} → {b!r}")
    return changes
