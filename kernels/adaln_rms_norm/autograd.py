"""Autograd registration shared by the Triton and CUDA backends of `adaln_rms_norm`."""

from collections.abc import Callable

import torch

from kernels.arguments import dtype_names


def register_autograd(forward: torch.library.CustomOpDef, backward: torch.library.CustomOpDef) -> Callable:
    """Give one operator its gradient by the other; returns the op as these two compute it.

    Args:
        forward: (x, weight, shift, scale, eps, out_dtype) → y, and what `backward` takes besides: `kept`, if anything.
        backward: (x, weight, shift, scale, *kept, gradient of y, eps, vector_grads) → the gradients of x, weight, shift
            and scale; the last three empty unless `vector_grads`.
    """

    def save(ctx, inputs, output):
        *tensors, ctx.eps, _ = inputs
        _, *kept = as_tuple(output)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *kept)

    def gradients(ctx, d_y, *_):
        if d_y is None:
            return (None,) * 6
        wanted = ctx.needs_input_grad[:4]
        found = backward(*ctx.saved_tensors, d_y, ctx.eps, any(wanted[1:]))
        return *where_wanted(found, wanted), None, None

    forward.register_autograd(gradients, setup_context=save)

    def adaln_rms_norm(x, weight, shift, scale, eps, *, out_dtype=None):
        return as_tuple(forward(x, weight, shift, scale, eps, out_dtype or x.dtype))[0]

    return adaln_rms_norm


def as_tuple(results: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (results,) if isinstance(results, torch.Tensor) else results


def where_wanted(gradients, wanted) -> tuple[torch.Tensor | None, ...]:
    """Of the gradients those wanted, None in the place of the others."""
    return tuple(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))


def out_dtype_reasons(out_dtype: torch.dtype | None, dtypes: frozenset[torch.dtype]) -> list[str]:
    """Why kernels that write `dtypes` cannot give this one; empty if they can."""
    strange = out_dtype is not None and out_dtype not in dtypes
    return [f"out_dtype {out_dtype} is none of {dtype_names(dtypes)}"] if strange else []
