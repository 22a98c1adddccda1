"""A second backend of `swiglu`, in `torch.library` like a kernel. A test copies it into an op's folder."""

import torch

from kernels.registry import Backend


@torch.library.custom_op("planted::swiglu_fwd", mutates_args=())
def swiglu_fwd(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    out = torch.empty(up.shape, dtype=gate_up.dtype, device=gate_up.device)
    return out.copy_(gate / (1 + torch.exp(-gate)) * up)


@swiglu_fwd.register_fake
def _(gate_up):
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@torch.library.custom_op("planted::swiglu_bwd", mutates_args=())
def swiglu_bwd(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    sigmoid = 1 / (1 + torch.exp(-gate))
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((grad.float() * up * slope, grad.float() * gate * sigmoid), dim=-1).to(gate_up.dtype)


@swiglu_bwd.register_fake
def _(grad, gate_up):
    return torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)


swiglu_fwd.register_autograd(
    lambda ctx, grad: swiglu_bwd(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def swiglu(gate_up):
    return swiglu_fwd(gate_up)


def unsupported(gate_up):
    return [] if gate_up.dtype in BACKEND.dtypes else [f"dtype {gate_up.dtype} is not served"]


BACKEND = Backend(
    "triton",
    swiglu,
    unsupported=unsupported,
    dtypes=frozenset({torch.float32, torch.float16}),
    torch_ops=("planted::swiglu_fwd", "planted::swiglu_bwd"),
)
