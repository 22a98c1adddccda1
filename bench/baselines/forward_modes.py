"""Forward modes of ops as PyTorch has them: `torch.func.jvp` of the reference of the op whose tangents they compute."""

from typing import Any

import torch

import kernels
from bench.baselines.interface import Adapter, Provider
from kernels.forward_mode import SUFFIX
from kernels.registry import Op
from kernels.testing.tolerance import reference


def func_jvp(op: Op) -> Adapter:
    """Arguments that come with a tangent are differentiated, the others are constants.

    Results and tangents by turns, as the op returns them; the tangents are constants to autograd, as the op's are.
    """
    primal = reference(kernels.OPS[op.forward_mode_of])

    def run(**inputs: Any) -> tuple[torch.Tensor, ...]:
        given = {name: value for name, value in inputs.items() if not name.endswith(SUFFIX)}
        tangents = {name: inputs[name + SUFFIX] for name in given if inputs.get(name + SUFFIX) is not None}
        names = list(tangents)

        def call(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            found = primal(**given | dict(zip(names, values, strict=True)))
            return found if isinstance(found, tuple) else (found,)

        results, moved, *_ = torch.func.jvp(call, tuple(given[name] for name in names), tuple(tangents.values()))
        return tuple(t for pair in zip(results, moved, strict=True) for t in (pair[0], pair[1].detach()))

    return Adapter(run)


def _providers(op: Op) -> tuple[Provider, ...]:
    about = f"torch.func.jvp of the reference of {op.forward_mode_of}, op by op"
    return (Provider("func-jvp", lambda: func_jvp(op), includes=about, also_compiled=True),)


#: Forward mode → who else computes it: every op that is one.
FORWARD_MODES = {name: _providers(op) for name, op in kernels.OPS.items() if op.forward_mode_of}
