import torch.nn.functional as F

from kernels.arguments import accumulation_dtype
from kernels.registry import Backend


def swiglu(gate_up, *, bias=None):
    upcast = gate_up.to(accumulation_dtype(gate_up))
    gate, up = (upcast if bias is None else upcast + bias.to(upcast.dtype)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


BACKEND = Backend("reference", swiglu)
