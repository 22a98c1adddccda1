import torch
import torch.nn.functional as F

from kernels.arguments import accumulation_dtype
from kernels.registry import Backend


def swiglu_jvp(gate_up, gate_up_tangent, *, bias=None):
    upcast = gate_up.to(accumulation_dtype(gate_up))
    gate, up = (upcast if bias is None else upcast + bias.to(upcast.dtype)).chunk(2, dim=-1)
    activated = F.silu(gate) * up
    with torch.no_grad():
        gate_t, up_t = gate_up_tangent.to(upcast.dtype).chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        slope = sigmoid * (1 + gate * (1 - sigmoid))
        tangent = slope * gate_t * up + F.silu(gate) * up_t
    return activated.to(gate_up.dtype), tangent.to(gate_up.dtype)


BACKEND = Backend("reference", swiglu_jvp)
