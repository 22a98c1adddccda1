"""SwiGLU's product by torch and by Liger."""

import torch
import torch.nn.functional as F

from bench.baselines.interface import Adapter, Provider
from kernels.testing.tolerance import Tensors


def torch_swiglu() -> Adapter:
    def run(gate_up, *, bias=None):
        gate, up = (gate_up if bias is None else gate_up + bias.to(gate_up.dtype)).chunk(2, dim=-1)
        return F.silu(gate) * up

    return Adapter(run)


def liger_swiglu() -> Adapter:
    """Liger's kernel takes the halves as tensors of their own, as two projections would give them."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def arrange(gate_up, *, bias=None):
        gate, up = (half.contiguous() for half in gate_up.chunk(2, dim=-1))
        return {"gate": gate, "up": up}

    def run(gate, up):
        return LigerSiLUMulFunction.apply(gate, up)

    def merge(gradients: Tensors) -> Tensors:
        return {"gate_up": torch.cat((gradients["gate"], gradients["up"]), dim=-1)}

    return Adapter(run, arrange, ("gate", "up"), merge)


def _no_bias(gate_up, *, bias=None) -> list[str]:
    return [] if bias is None else ["its kernel adds no bias"]


SWIGLU = (
    Provider("torch", torch_swiglu, includes="two kernels: SiLU, product; a bias is a third"),
    # Its backward pass writes the gradients over the saved halves.
    Provider(
        "liger", liger_swiglu, _no_bias, "from two tensors instead of a packed one", "liger-kernel", overwrites=True
    ),
)
