"""Cost of one operator call from its arguments and results: bytes moved, and whether the host waits."""

import torch
from torch.utils._pytree import tree_leaves

#: Operators that hand the host a value; on a GPU each waits for everything queued before it.
READS = frozenset(
    {
        "aten::_local_scalar_dense",
        "aten::is_nonzero",
        "aten::equal",
        "aten::nonzero",
        "aten::allclose",
        "aten::masked_select",
        "aten::unique_dim",
        "aten::_unique2",
    }
)
#: In-place operators that do not read what they write.
OVERWRITES = frozenset({"aten::copy_", "aten::fill_", "aten::zero_"})


def moved_bytes(func: torch._ops.OpOverload, args: tuple, kwargs: dict, result) -> int:
    """Bytes that an operator reads and writes if each tensor crosses memory once; none for views and communication."""
    if func.is_view or func.namespace == "c10d" or func._schema.name in ("aten::detach", "aten::alias"):
        return 0
    inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    outputs = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
    if func._schema.name in OVERWRITES:
        inputs = inputs[1:]
    elif func._schema.name.startswith(("aten::empty", "aten::new_empty")):
        outputs = []
    return sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
