"""Counts what makes the host wait for a device in training steps, and what DeepSpeed copies; a child process runs it.

    python -m tests.host_reads KIND CONFIG OUTPUT.json [key=value …]

OUTPUT.json: "reads", where the host read a value → how often; "copies", where DeepSpeed reads and writes tensors →
bytes per step and trained parameter. What is ours, such as the optimizer's pass, is not in it, nor is communication.
"""

import json
import sys
import traceback
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from launch import train
from launch.runtime import read_ahead
from launch.training import loader
from launch.training.trainer import Trainer
from tests.operator_costs import READS, moved_bytes

LOADERS = {Path(module.__file__) for module in (loader, read_ahead)}
BACKWARD = "engine.py:backward"  # where DeepSpeed starts the network's own backward pass


class HostReads(TorchDispatchMode):
    """Where reads and copies came from: "file:function of the operator" → how often, and how many bytes."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.copied: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name in READS:
            self.note(func._schema.name)
        result = func(*args, **kwargs)
        code = _caller().f_code
        where = f"{Path(code.co_filename).name}:{code.co_name}"
        if "/deepspeed/" in code.co_filename and where != BACKWARD:
            self.copied[where] += moved_bytes(func, args, kwargs, result)
        return result

    def note(self, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
        if any(Path(frame.filename) in LOADERS for frame in frames):
            return  # its tensors never leave the host
        caller = next(frame for frame in reversed(frames) if Path(frame.filename) != Path(__file__))
        self.seen[f"{what} in {caller.filename}:{caller.name}"] += 1


def _caller():
    """The innermost frame that is neither torch's nor of this file."""
    frame = sys._getframe(1)
    while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return frame


def watch(reads: HostReads) -> None:
    """Count the reads, explicit waits and copies inside training steps; logging and checkpoints lie between them."""
    step = Trainer.train_step

    def watched(self, stream):
        from deepspeed.accelerator import get_accelerator

        accelerator = get_accelerator()
        accelerator.synchronize = lambda *_: reads.note("synchronize")
        with reads:
            step(self, stream)
        del accelerator.synchronize
        reads.trained = self.step * sum(
            p.numel() for n in self.task.networks.values() for p in n.parameters() if p.requires_grad
        )

    Trainer.train_step = watched


if __name__ == "__main__":
    kind, config, output, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    found = HostReads()
    watch(found)
    train.main([kind, config, *overrides])
    copies = {where: count / found.trained for where, count in found.copied.items()}
    Path(output).write_text(json.dumps({"reads": found.seen, "copies": copies}))
