"""The compile modes that a run file names, and the options that the ops give to `torch.compile`.

"inductor" compiles a network whole: one graph forward and one backward, which CUDA graphs ("cudagraphs") can hold.
"regional" compiles each kind of block once, whatever the depth: the first step comes earlier, and every block of a step
costs two calls of a graph. "aot_eager" traces and compiles nothing; "none" does neither.
"""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn

from kernels.backends.operators import register_lowerings
from kernels.registry import Ops

MODES = ("none", "inductor", "regional", "cudagraphs", "aot_eager")
RECOMPILE_LIMIT = 64
DIRECTORY, TAG = "TORCHINDUCTOR_CACHE_DIR", "TORCH_COMPILE_CACHE_KEY_TAG"


def cache_directory() -> Path | None:
    """The folder of Inductor's cache on disk: `TORCHINDUCTOR_CACHE_DIR` where it is set, else one in the user's cache.

    Inductor's own default lies among temporary files, which do not outlive a machine's restart; it stays (and None is
    returned) where the user has no cache that can be written.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    chosen = os.environ.get(DIRECTORY)
    with suppress(OSError, KeyError, RuntimeError):  # no home folder, no such user, not writable
        if chosen in (None, "", default_cache_dir()):  # Inductor sets the variable to that where nobody has
            roots = (os.environ.get("XDG_CACHE_HOME", ""), os.environ.get("HOME") and str(Path.home() / ".cache"))
            for root in filter(os.path.isabs, filter(None, roots)):
                ours = Path(root) / "lightningdit" / "inductor"
                ours.mkdir(parents=True, exist_ok=True)
                if os.access(ours, os.W_OK | os.X_OK):
                    os.environ[DIRECTORY] = chosen = str(ours)
                    break
    return Path(chosen) if chosen else None


@cache
def source_hash() -> str:
    """A hash of this package. Cached graphs call its operators by name, so another version must not reuse them."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def compile_module(module: nn.Module, mode: str, ops: Ops | None = None, deterministic: bool = True) -> None:
    """Compile `module.forward` in a mode; a graph break is an error.

    A module with the attribute `compiled_methods`, pairs of a part and a method's name, is compiled in those methods.
    Only `forward`, not `__call__`: hooks on the module, such as DeepSpeed's, cannot be traced. With "cudagraphs",
    forward and backward are a graph each: weights are read in place, at the same addresses after each step, and the
    inputs are copied in.

    Args:
        mode: one of `MODES`; "regional" needs a module with the attribute `regions`, the parts that are compiled each
            for itself. Those of one class share what is compiled as long as their arguments look alike.
        ops, deterministic: as `compiled` takes them.

    Raises:
        ValueError: an unknown mode, or "regional" for a module without regions.
    """
    if mode == "regional":
        regions = getattr(module, "regions", None)
        if regions is None:
            raise ValueError(f"compile mode is 'regional', but {type(module).__name__} names no regions")
        forwards: dict[type, Callable] = {}
        for region in regions:
            kind = type(region)
            if kind not in forwards:
                forwards[kind] = compiled(kind.forward, "inductor", ops, deterministic)
            region.forward = MethodType(forwards[kind], region)
    elif mode != "none":
        for part, method in getattr(module, "compiled_methods", [(module, "forward")]):
            setattr(part, method, compiled(getattr(part, method), mode, ops, deterministic))


def compiled(function: Callable, mode: str, ops: Ops | None = None, deterministic: bool = True) -> Callable:
    """The function as one graph for each shape; a graph break is an error.

    Args:
        mode: one of `MODES` but "regional", which is for modules; "none" gives the function itself.
        ops: those that the function computes with; under Inductor, some take the place of nodes of the graph
            (`kernels.compile.graph_passes`).
        deterministic: keep Inductor from choosing by timing what changes a result's last bits, such as how a sum is
            cut in parts: a choice that another process, compiling the same, may make otherwise.

    Raises:
        ValueError: another mode.
    """
    if mode not in MODES or mode == "regional":
        allowed = ", ".join(known for known in MODES if known != "regional")
        raise ValueError(f"compile mode is {mode!r}; allowed: {allowed}")
    if mode == "none":
        return function
    options: dict[str, Any] | None = None
    if mode != "aot_eager":
        cache_directory()
        torch.compiler.config.cache_key_tag = os.environ.get(TAG, "") + source_hash()
        register_lowerings()
        from kernels.compile.recompute_policy import SaveBlockOutputs

        options = {
            "deterministic": deterministic,
            "triton.cudagraphs": mode == "cudagraphs",
            "joint_custom_pre_pass": SaveBlockOutputs(),
        }
        if ops is not None:
            from kernels.compile.graph_passes import inductor_options

            options |= inductor_options(ops)
    # A network is called in several ways, each a graph: in training and validation, with tangents, with gradients and
    # without, at several batch sizes. Past the limit a graph would be an error; the default of 8 is soon reached.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    backend = mode if mode == "aot_eager" else "inductor"
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend, options=options)
