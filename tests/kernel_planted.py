"""A second backend of `swiglu`, in `torch.library` like a kernel. A test copies it into an op's folder."""

import torch

from kernels.registry import Backend


@torch.library.custom_op("planted::swiglu_fwd", mutates_args=())
def swiglu_fwd(gate_up: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    gate, up = biased(gate_up, bias).chunk(2, dim=-1)
    out = torch.empty(up.shape, dtype=gate_up.dtype, device=gate_up.device)
    return out.copy_(gate / (1 + torch.exp(-gate)) * up)


@swiglu_fwd.register_fake
def _(gate_up, bias):
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@torch.library.custom_op("planted::swiglu_bwd", mutates_args=())
def swiglu_bwd(
    grad: torch.Tensor, gate_up: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = biased(gate_up, bias).chunk(2, dim=-1)
    sigmoid = 1 / (1 + torch.exp(-gate))
    d_silu = sigmoid * (1 + gate * (1 - sigmoid))
    d_gate_up = torch.cat((grad.float() * up * d_silu, grad.float() * gate * sigmoid), dim=-1)
    d_bias = d_gate_up.view(-1, d_gate_up.shape[-1]).sum(dim=0)
    return d_gate_up.to(gate_up.dtype), d_bias.to((gate_up if bias is None else bias).dtype)


@swiglu_bwd.register_fake
def _(grad, gate_up, bias):
    d_gate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    return d_gate_up, (gate_up if bias is None else bias).new_empty(gate_up.shape[-1])


def biased(gate_up, bias):
    return gate_up.float() if bias is None else gate_up.float() + bias.float()


def backward(ctx, grad):
    d_gate_up, d_bias = swiglu_bwd(grad, *ctx.saved_tensors)
    return d_gate_up, d_bias if ctx.saved_tensors[1] is not None else None


swiglu_fwd.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def swiglu(gate_up, *, bias=None):
    return swiglu_fwd(gate_up, bias)


def unsupported(gate_up, *, bias=None):
    return [] if gate_up.dtype in BACKEND.dtypes else [f"dtype {gate_up.dtype} is not served"]


BACKEND = Backend(
    "triton",
    swiglu,
    unsupported=unsupported,
    dtypes=frozenset({torch.float32, torch.float16}),
    torch_ops=("planted::swiglu_fwd", "planted::swiglu_bwd"),
)
