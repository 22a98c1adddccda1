"""The launches that one call of an op with its Triton backend would make; nothing is computed."""

import torch

from kernels.backends.triton_launch import Launch, recorded
from kernels.registry import Op
from kernels.testing.cases import Case
from kernels.testing.tolerance import leaves, named


def launches(op: Op, case: Case, dtype: torch.dtype, architecture: int = 90) -> tuple[list[Launch], list[Launch]]:
    """Those of the call and those of its backward pass with all gradients asked for."""
    inputs = case.inputs(dtype, "meta")
    wanted = [name for name in op.differentiable if inputs[name] is not None]
    with recorded(architecture) as found:
        results = named(op.backend("triton").run(**inputs | leaves(inputs, wanted))).values()
        forward = len(found)
        differentiable = [result for result in results if result.requires_grad]
        if wanted:
            torch.autograd.backward(differentiable, [torch.empty_like(result) for result in differentiable])
    assert forward, f"{op.name}: a call launches nothing"
    return found[:forward], found[forward:]
