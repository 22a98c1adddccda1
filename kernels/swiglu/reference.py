import torch.nn.functional as F

from kernels.arguments import accumulation_dtype
from kernels.registry import Backend


def swiglu(gate_up, *, bias=None):
    wide = gate_up.to(accumulation_dtype(gate_up))
    gate, up = (wide if bias is None else wide + bias.to(wide.dtype)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


BACKEND = Backend("reference", swiglu)
