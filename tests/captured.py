"""A stand-in of a CUDA graph: the operators of a function are recorded once and run again, with the numbers of then.

As in a graph, what the host decides and every number that is not in a tensor stays as it was when it was recorded.
"""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class Recording:
    """A `Capture` for `lightningdit.step_graphs`; captures: how many there were, replays: how often each was run."""

    def __init__(self, warm_up: int = 2):
        self.warm_up, self.captures, self.replays = warm_up, 0, list[int]()

    def __call__(self, function: Callable[[], object]) -> Callable[[], None]:
        number = self.captures
        self.captures += 1
        self.replays.append(0)
        for _ in range(self.warm_up):
            function()
        with _Recorder() as recorder:
            function()

        def replay() -> None:
            self.replays[number] += 1
            made: dict[int, object] = {}

            def now(value):
                return made.get(id(value), value) if isinstance(value, torch.Tensor) else value

            for func, args, kwargs, result in recorder.calls:
                again = func(*tree_map(now, args), **tree_map(now, kwargs))
                for old, new in zip(tree_flatten(result)[0], tree_flatten(again)[0], strict=True):
                    if isinstance(old, torch.Tensor):
                        made[id(old)] = new

        return replay
