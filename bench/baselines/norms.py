"""RMS norms of torch, Liger, apex and quack, and what they leave to torch: gate, residual and modulation."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench.baselines.interface import Adapter, Provider

#: (x, weight, eps) → the RMS norm of x
Norm = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


#: (x, weight, shift, scale, eps) → that, modulated
ModulatedNorm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, float], torch.Tensor]


def adaln(norm: ModulatedNorm) -> Adapter:
    """`adaln_rms_norm` from a modulated norm."""

    def run(x, weight, shift, scale, eps, *, out_dtype=None):
        return norm(x, weight, shift, scale, eps).to(out_dtype or x.dtype)

    return Adapter(run)


def gated(norm: ModulatedNorm) -> Adapter:
    """`gated_residual_adaln_rms_norm` from a modulated norm; torch adds in one kernel."""

    def run(x, branch, gate, weight, shift, scale, eps, *, branch_bias=None):
        x = _residual(x, branch, gate, branch_bias)
        return x, norm(x, weight, shift, scale, eps).to(branch.dtype)

    return Adapter(run)


def modulated(norm: Norm) -> ModulatedNorm:
    """torch modulates in one kernel."""
    return lambda x, weight, shift, scale, eps: _modulated(norm(x, weight, eps), shift, scale)


def _modulated(y: torch.Tensor, shift: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor:
    factor = 1 + scale[:, None].to(torch.promote_types(y.dtype, scale.dtype))
    return y * factor if shift is None else torch.addcmul(shift[:, None], y, factor)


def _residual(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x + gate · branch` in one kernel; it computes in the widest of the dtypes."""
    return torch.addcmul(x, gate[:, None], branch if bias is None else branch + bias).to(x.dtype)


def torch_norm() -> Norm:
    def norm(x, weight, eps):
        wide = torch.promote_types(x.dtype, weight.dtype)  # rounded to x's, the gain would get a poor gradient
        return F.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps)

    return norm


def liger_norm() -> Norm:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # offset, casting mode, in_place: in place, its backward would write into the upstream gradient.
    return lambda x, weight, eps: LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def apex_norm() -> Norm:
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine, mixed_dtype_fused_rms_norm_affine

    def norm(x, weight, eps):
        function = fused_rms_norm_affine if weight.dtype == x.dtype else mixed_dtype_fused_rms_norm_affine
        return function(x, weight, x.shape[-1:], eps)

    return norm


def quack_norm() -> Norm:
    from quack import rmsnorm

    return lambda x, weight, eps: rmsnorm(x, weight, eps=eps)


def liger_modulated() -> ModulatedNorm:
    from liger_kernel.ops.modulated_rms_norm import LigerModulatedRMSNormFunction

    def norm(x, weight, shift, scale, eps):
        return LigerModulatedRMSNormFunction.apply(x, weight, scale, shift, eps, 0.0, "llama", False)

    return norm


def quack_gated() -> Adapter:
    """quack adds the residual in its norm kernel and returns the sum too."""
    from quack import rmsnorm

    def run(x, branch, gate, weight, shift, scale, eps, *, branch_bias=None):
        product = gate[:, None].to(x.dtype) * (branch if branch_bias is None else branch + branch_bias)
        y, x = rmsnorm(product, weight, residual=x, out_dtype=branch.dtype, eps=eps, prenorm=True)
        return x, _modulated(y, shift, scale).to(branch.dtype)

    return Adapter(run)


def torch_group_norm() -> Adapter:
    def run(x, weight, bias, groups, eps):
        return F.silu(F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps))

    return Adapter(run)


def liger_group_norm() -> Adapter:
    from liger_kernel.ops.group_norm import LigerGroupNormFunction

    def arrange(x, **rest):
        return {"x": x.contiguous(), **rest}

    def run(x, weight, bias, groups, eps):
        return F.silu(LigerGroupNormFunction.apply(x, weight, bias, x.shape[1], groups, eps))

    return Adapter(run, arrange)


def apex_group_norm() -> Adapter:
    from apex.contrib.group_norm import GroupNorm

    def arrange(x, weight, bias, groups, eps):
        module = GroupNorm(groups, x.shape[1], eps=eps, device=x.device, dtype=weight.dtype, act="silu")
        return {"module": module, "x": x, "weight": weight, "bias": bias}

    def run(module, x, weight, bias):
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))

    return Adapter(run, arrange)


def _channels_last_only(x, **rest) -> list[str]:
    last = x.is_contiguous(memory_format=torch.channels_last)
    return [] if last else ["its kernels take channels-last tensors; for others it calls torch"]


_CONTIGUOUS = "from a contiguous tensor, as its kernel takes; SiLU by torch"
_NORMS = (("torch", torch_norm, "torch"), ("liger", liger_norm, "liger-kernel"), ("apex", apex_norm, "apex"))
_REST = "modulation, gate, residual and bias by torch"


def _providers(op: Callable[[ModulatedNorm], Adapter], norms: tuple, liger: str) -> tuple[Provider, ...]:
    """Those of an op from a modulated norm; liger: what its own modulated norm includes."""
    made = (
        Provider(name, lambda load=load: op(modulated(load())), includes=_REST, package=package)
        for name, load, package in norms
    )
    own = Provider("liger-modulated", lambda: op(liger_modulated()), includes=liger, package="liger-kernel")
    return (*made, own)


ADALN = _providers(
    adaln,
    (*_NORMS, ("quack", quack_norm, "quack-kernels")),
    "norm and modulation in one kernel, float atomics backward",
)
GATED = (
    *_providers(gated, _NORMS, "gate and residual by torch; float atomics backward"),
    Provider("quack", quack_gated, includes="gate and modulation by torch", package="quack-kernels"),
)
GROUP_NORM = (
    Provider("torch", torch_group_norm, includes="two kernels: group norm, SiLU"),
    Provider("liger", liger_group_norm, includes=_CONTIGUOUS, package="liger-kernel"),
    Provider("apex", apex_group_norm, _channels_last_only, "SiLU in its kernel", "apex"),
)
