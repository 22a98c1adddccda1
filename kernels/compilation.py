"""`torch.compile` in the modes that a run file names, with what the ops of a network add to the compiler."""

from collections.abc import Callable
from typing import Any

import torch

from kernels.registry import Ops

MODES = ("none", "inductor", "cudagraphs", "aot_eager")


def compiled(function: Callable, mode: str, ops: Ops | None = None) -> Callable:
    """The function as one graph for each shape; a graph break is an error.

    Args:
        mode: "none" gives the function itself, "cudagraphs" is Inductor with CUDA graphs.
        ops: those that the function computes with; under Inductor, some take the place of nodes of the graph
            (`kernels.rewriting`).

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"compile mode is {mode!r}; allowed: {', '.join(MODES)}")
    if mode == "none":
        return function
    options: dict[str, Any] = {"triton.cudagraphs": True} if mode == "cudagraphs" else {}
    if ops is not None and mode != "aot_eager":
        from kernels.rewriting import inductor_options

        options |= inductor_options(ops)
    backend = "inductor" if mode == "cudagraphs" else mode
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend, options=options or None)
