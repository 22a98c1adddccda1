"""Start a run from a checkpoint: which one, and its weights, optimizer states and counters."""

from pathlib import Path

from torch import nn

from common.files import path_exists
from common.tensors import load_strict
from launch.runtime.processes import Processes
from launch.training import checkpoint
from launch.training.checkpoint import Checkpoint, CheckpointError, find_checkpoint
from launch.training.config import TrainConfig
from launch.training.engine import Engine
from launch.training.task import Task


def agree_on_start(checkpoints: Path, train: TrainConfig, processes: Processes) -> Checkpoint | None:
    """The checkpoint that the main process finds (see `find_start`), on every process; None for a new run.

    Incomplete checkpoints below `checkpoints` are removed first, and all but the newest `train.keep_checkpoints`.
    Raises, on every process, what the main one raised, or CheckpointError where a process cannot see the checkpoint.
    """
    path = error = None
    if processes.is_main:
        try:
            if checkpoints.is_dir():
                checkpoint.clean_up(checkpoints)
                if train.keep_checkpoints:
                    checkpoint.prune(checkpoints, train.keep_checkpoints)
            path = find_start(checkpoints, train)
        except (ValueError, OSError) as e:
            error = e
    processes.raise_on_all(error)
    path = processes.broadcast(path)
    if processes.any(path is not None and not path.is_dir()):
        raise CheckpointError(f"{path} is not visible from every process: is train.output_dir shared?")
    return path and Checkpoint(path)


def find_start(checkpoints: Path, train: TrainConfig) -> Path | None:
    """The newest checkpoint of this run's directory, else the one that `train.ckpt` names, else None.

    Raises ValueError where going on from there would lose what is there, or is not what the user asked for.
    """
    own = checkpoint.newest(checkpoints)
    named = None if train.ckpt is None else find_checkpoint(Path(train.ckpt)).path
    if own is None:
        _refuse_foreign(checkpoints)
        if named is not None:
            print(f"starting from {named}, as train.ckpt says")
        return named
    if not train.resume:
        raise ValueError(
            f"{checkpoints} already holds step {own.step} and train.resume is false; "
            "give another train.exp_name or output_dir, or remove it"
        )
    if named is not None and named.resolve() != own.path.resolve():
        if named.resolve().parent == checkpoints.resolve():
            raise ValueError(
                f"train.ckpt is {named}, but this run has gone on to {own.path.name}: to branch off, "
                "give another train.exp_name; to go on, leave train.ckpt out"
            )
        print(f"train.ckpt {named} was this run's start; now its own newest checkpoint is")
    if train.weight_init is not None:
        print(f"train.weight_init {train.weight_init} was this run's start; now its newest checkpoint is")
    return own.path


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
