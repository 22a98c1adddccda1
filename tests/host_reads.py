"""Counts what makes the host wait for a device during training steps; a child process runs it.

    python -m tests.host_reads CONFIG OUTPUT.json [key=value …]
"""

import json
import sys
import traceback
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from launch import loader, train
from launch.trainer import Trainer

#: Operators that hand the host a value; on a GPU each waits for everything queued before it.
READS = frozenset({"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::allclose",
                   "aten::masked_select", "aten::unique_dim", "aten::_unique2"})
LOADER = Path(loader.__file__)


class HostReads(TorchDispatchMode):
    """Where reads came from: "file:function of the operator" → how often."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in READS:
            self.note(func._schema.name)
        return func(*args, **kwargs or {})

    def note(self, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
        if any(Path(frame.filename) == LOADER for frame in frames):
            return  # its tensors never leave the host
        caller = next(frame for frame in reversed(frames) if Path(frame.filename) != Path(__file__))
        self.seen[f"{what} in {caller.filename}:{caller.name}"] += 1


def watch(reads: HostReads) -> None:
    """Count the reads and explicit waits inside training steps; logging and checkpoints lie between them."""
    step = Trainer.train_step

    def watched(self, stream):
        from deepspeed.accelerator import get_accelerator

        accelerator = get_accelerator()
        accelerator.synchronize = lambda *_: reads.note("synchronize")
        with reads:
            step(self, stream)
        del accelerator.synchronize

    Trainer.train_step = watched


if __name__ == "__main__":
    config, output, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    found = HostReads()
    watch(found)
    train.main(["lightningdit", config, *overrides])
    Path(output).write_text(json.dumps(found.seen))
