"""The tolerance rule for results of ops, and the calls whose results it compares; for tests and benches.

A result is right when its error is at most twice that of the reference in the same dtype, plus 4·eps·max|r|. Errors are
largest absolute differences from r, the reference in float64 on the same (rounded) inputs.

Where inputs have 16 bits, 4·eps is at least `TENSOR_CORE_TRUNCATION`, which matters to float32 results: tensor cores
add up products of 16-bit numbers in float32, but truncate what that cannot hold, where the reference rounds to nearest.
In sums over 1024 channels that moves both cosines of the VF loss, and so its first term, the same way.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from kernels.registry import Op

Inputs = dict[str, Any]
Tensors = dict[str, torch.Tensor]
#: Half an ulp in each of 64 steps of 16 products makes 1.5e-6 of a sum that grows steadily, and more of a mean of
#: differences above a margin: 7.9e-6 of the VF loss on an H200, by Triton's wgmma and by CUDA's mma alike.
TENSOR_CORE_TRUNCATION = 2.0**-16


def mismatches(got: Tensors, eager: Tensors, fp64: Tensors, half_precision: bool = False) -> list[str]:
    """Reasons why results are wrong: names, dtypes, shapes, errors above the tolerance; empty if they are right.

    Args:
        got: results by name, of the implementation under test.
        eager: those of the reference, on the same inputs.
        fp64: those of the reference in float64.
        half_precision: whether any input has 16-bit floats.
    """
    if set(got) != set(eager):
        return [f"got {sorted(got)}, the reference gives {sorted(eager)}"]
    found = (mismatch(name, got[name], eager[name], fp64[name], half_precision) for name in eager)
    return [text for text in found if text]


def mismatch(
    name: str, got: torch.Tensor, eager: torch.Tensor, fp64: torch.Tensor, half_precision: bool = False
) -> str:
    """The reason why one result is wrong, or an empty text; `half_precision` as `mismatches` takes it."""
    if (got.dtype, got.shape) != (eager.dtype, eager.shape):
        return f"{name}: {got.dtype} {tuple(got.shape)}, the reference gives {eager.dtype} {tuple(eager.shape)}"
    if not (eager.isfinite().all() and fp64.isfinite().all()):
        return f"{name}: the reference is not finite, a bad case"
    eager_error, error = (float((t.double() - fp64).abs().max()) for t in (eager, got))
    relative = max(4 * torch.finfo(got.dtype).eps, TENSOR_CORE_TRUNCATION if half_precision else 0.0)
    limit = 2 * eager_error + relative * float(fp64.abs().max())
    if error <= limit:  # false for NaN
        return ""
    return f"{name}: error {error:.3e}, limit {limit:.3e}, that of the reference {eager_error:.3e}"


def has_half_precision(inputs: Inputs) -> bool:
    """Whether any of the arguments has 16-bit floats (float16 or bfloat16)."""
    return any(tensor.is_floating_point() and tensor.dtype.itemsize == 2 for tensor in tensors_of(inputs))


def tensors_of(values: Any) -> list[torch.Tensor]:
    """All tensors among arguments, those in lists too."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def reference(op: Op) -> Callable[..., Any]:
    """Unchecked, so that it takes float64 where the op asks for another dtype."""
    return op.backend("reference").run


def outputs(op: Op, function: Callable[..., Any], inputs: Inputs) -> Tensors:
    """The results of a call by name, together with the arguments it changes in place; `inputs` stay as they are."""
    inputs = {name: copy(value) if name in op.mutates else value for name, value in inputs.items()}
    changed = {name: inputs[name] for name in op.mutates if inputs[name] is not None}
    return named(function(**inputs)) | changed


def gradients(
    op: Op,
    function: Callable[..., Any],
    inputs: Inputs,
    upstream: Tensors,
    wanted: list[str] | None = None,
    keep: bool = False,
) -> Tensors:
    """Argument name → gradient, of the `wanted` arguments (else all); with the results too if `keep`.

    Of an argument that is a list of tensors, each has a gradient, "gradient of name[0]" and so on.
    `upstream` may leave out results: no gradient comes from them.
    """
    wanted = [name for name in wanted or op.differentiable if inputs[name] is not None]
    asked = leaves(inputs, wanted)
    results = named(function(**inputs | asked))
    pairs = [(results[name], gradient) for name, gradient in upstream.items() if results[name].requires_grad]
    assert pairs, f"{op.name}: no result carries a gradient"
    by_name = flattened(asked)
    found = torch.autograd.grad(
        [result for result, _ in pairs], list(by_name.values()), [gradient for _, gradient in pairs], allow_unused=True
    )
    gradient_of = {
        f"gradient of {name}": torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(by_name.items(), found, strict=True)
    }
    return gradient_of | ({name: result.detach() for name, result in results.items()} if keep else {})


def differentiable(op: Op, results: Tensors) -> Tensors:
    """Those of the results that have gradients: all but tangents (`Op.forward_mode_of`)."""
    return dict(list(results.items())[:: 2 if op.forward_mode_of else 1])


def upstream_gradients(op: Op, results: Tensors) -> Tensors:
    """Random upstream gradients by name, of the results that have gradients."""
    return {name: random_like(result) for name, result in differentiable(op, results).items()}


def leaves(inputs: Inputs, names: list[str]) -> Inputs:
    """Those arguments, asking for gradients; they share memory with `inputs`."""
    return {name: tree_map(lambda tensor: tensor.detach().requires_grad_(), inputs[name]) for name in names}


def flattened(inputs: Inputs) -> Tensors:
    """The tensors among arguments by name; those of a list are "name[0]", "name[1]", …"""
    found: Tensors = {}
    for name, value in inputs.items():
        found |= {f"{name}[{i}]": t for i, t in enumerate(value)} if isinstance(value, list) else {name: value}
    return found


def named(result: torch.Tensor | tuple[torch.Tensor, ...] | None) -> Tensors:
    results = result if isinstance(result, tuple) else (result,)
    return {f"result {i}": tensor for i, tensor in enumerate(results) if tensor is not None}


def as_float64(inputs: Inputs) -> Inputs:
    """The same arguments in float64: tensors of floats, and dtypes asked for."""

    def widen(value):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.double()
        return torch.float64 if isinstance(value, torch.dtype) else value

    return tree_map(widen, inputs)


def copy(value):
    """Tensors, or lists of them, in memory of their own; anything else as it is.

    Tensors of a list that share a storage share one in the copy too, at the same places.
    """
    if isinstance(value, list) and len({tensor.untyped_storage()._cdata for tensor in value}) == 1 < len(value):
        storage = value[0].new_empty(0).set_(value[0].untyped_storage()).clone()
        return [storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()) for tensor in value]
    return tree_map_only(torch.Tensor, torch.clone, value)


def copied(inputs: Inputs) -> Inputs:
    return {name: copy(value) for name, value in inputs.items()}


def random_like(tensor: torch.Tensor) -> torch.Tensor:
    """Normal numbers in the dtype and on the device of `tensor`, the same each time."""
    generator = torch.Generator(tensor.device).manual_seed(tensor.numel())
    return torch.randn(tensor.shape, generator=generator, device=tensor.device).to(tensor.dtype)
