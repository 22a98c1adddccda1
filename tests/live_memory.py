"""Bytes of tensors alive while code runs, counted operator by operator: the same on every machine, GPU or none."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """`now` and `peak` bytes of the storages that operators allocated under this mode and that still live.

    What a custom operator allocates for itself while it runs is not seen, and what the mode found is not counted, nor
    are tensors on "meta", which have no memory.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._meet(tensor.untyped_storage(), counts=False)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._meet(tensor.untyped_storage(), counts=True)
        self.peak = max(self.peak, self.now)
        return result

    def _meet(self, storage: torch.UntypedStorage, counts: bool) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counts else 0
        self.now += size

        def forget(_):
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, forget)


def _tensors(tree) -> list[torch.Tensor]:
    leaves = tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta"]
