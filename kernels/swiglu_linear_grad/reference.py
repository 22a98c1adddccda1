import torch

from kernels.arguments import accumulation_dtype
from kernels.registry import Backend


def swiglu_linear_grad(d_output, weight, gate_up, *, bias=None):
    dtype = accumulation_dtype(gate_up)
    d_activated = torch.matmul(d_output, weight).to(dtype)
    upcast = gate_up.to(dtype)
    gate, up = (upcast if bias is None else upcast + bias.to(dtype)).chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    d_gate = d_activated * up * (sigmoid * (1 + gate * (1 - sigmoid)))
    d_gate_up = torch.cat([d_gate, d_activated * (gate * sigmoid)], dim=-1)
    d_bias = None if bias is None else d_gate_up.flatten(0, -2).sum(0).to(bias.dtype)
    return d_gate_up.to(gate_up.dtype), d_bias


BACKEND = Backend("reference", swiglu_linear_grad)
