"""Stand-ins for packages that the bench compares with: their published signatures, computed by torch.

A call that the package would refuse (an unknown keyword, a wrong dtype or layout) fails here too.
"""

import sys
from types import ModuleType

import torch
import torch.nn.functional as F


def install(monkeypatch, modules: dict[str, dict]) -> None:
    """Put modules of these names and contents, and their parent packages, where imports find them."""
    for name, contents in modules.items():
        for end in [i for i, letter in enumerate(name) if letter == "."] + [len(name)]:
            part = name[:end]
            if end == len(name) or not getattr(sys.modules.get(part), "stand_in", False):
                module = ModuleType(part)
                module.stand_in, module.__path__ = True, []
                monkeypatch.setitem(sys.modules, part, module)
        vars(sys.modules[name]).update(contents)


def remove(monkeypatch, *names: str) -> None:
    """Make these packages impossible to import, installed or not."""
    for name in names:
        for loaded in [n for n in sys.modules if n == name or n.startswith(f"{name}.")]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, name, None)


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()


class LigerRMSNorm:
    @staticmethod
    def apply(X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        assert (offset, casting_mode) == (0.0, "llama")
        assert not in_place, "its backward pass would overwrite the upstream gradient"
        return rms(X, W, eps).to(X.dtype)


class LigerModulatedRMSNorm:
    @staticmethod
    def apply(X, W, scale, shift, eps, offset=0.0, casting_mode="llama", in_place=True):
        assert (offset, casting_mode, in_place) == (0.0, "llama", False) and scale.shape == (X.shape[0], X.shape[2])
        y = rms(X, W, eps) * (1 + scale[:, None])
        return (y if shift is None else y + shift[:, None]).to(X.dtype)


class LigerSiLUMul(torch.autograd.Function):
    """Backward, it returns the saved tensors with the gradients written over them."""

    @staticmethod
    def forward(ctx, a, b):
        assert a.is_contiguous() and b.is_contiguous()
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        sigmoid = a.sigmoid()
        grad_b = grad * a * sigmoid
        a.data.copy_(grad * b * (a * sigmoid * (1 - sigmoid) + sigmoid))
        b.data.copy_(grad_b)
        return a.detach(), b.detach()


class LigerGroupNorm:
    @staticmethod
    def apply(X, affine_scaling_weight, affine_shifting_bias, num_channels, num_groups, eps):
        assert X.is_contiguous() and X.shape[1] == num_channels
        return F.group_norm(X, num_groups, affine_scaling_weight, affine_shifting_bias, eps)


LIGER = {
    "liger_kernel.ops.rms_norm": {"LigerRMSNormFunction": LigerRMSNorm},
    "liger_kernel.ops.modulated_rms_norm": {"LigerModulatedRMSNormFunction": LigerModulatedRMSNorm},
    "liger_kernel.ops.swiglu": {"LigerSiLUMulFunction": LigerSiLUMul},
    "liger_kernel.ops.group_norm": {"LigerGroupNormFunction": LigerGroupNorm},
}


def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    assert input.dtype == weight.dtype and tuple(normalized_shape) == (input.shape[-1],)
    return rms(input, weight, eps).to(input.dtype)


def mixed_dtype_fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    assert input.dtype != weight.dtype and tuple(normalized_shape) == (input.shape[-1],)
    return rms(input, weight, eps).to(weight.dtype)


class ApexGroupNorm(torch.nn.Module):
    def __init__(self, num_groups, num_channels, eps=1e-5, affine=True, device=None, dtype=None, act=""):
        super().__init__()
        assert affine and act == "silu"
        self.num_groups, self.eps = num_groups, eps
        self.weight = torch.nn.Parameter(torch.ones(num_channels, device=device, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.zeros(num_channels, device=device, dtype=dtype))

    def forward(self, input):
        assert input.is_contiguous(memory_format=torch.channels_last)
        # Contiguous, torch's statistics on a CPU keep their digits when the mean is large.
        return F.silu(F.group_norm(input.contiguous(), self.num_groups, self.weight, self.bias, self.eps))


class FusedAdam(torch.optim.Optimizer):
    """The signature of apex and DeepSpeed; `counted` says whose step count: of the group, or of the state."""

    counted = "group"

    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
        amsgrad=False,
        set_grad_none=True,
    ):
        assert isinstance(lr, float) and bias_correction and adam_w_mode and not amsgrad
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def step(self, closure=None):
        group = self.param_groups[0]
        (param,) = group["params"]
        state = self.state[param]
        counter = group if self.counted == "group" else state
        counter["step"] += 1
        assert param.grad.dtype == param.dtype
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(param.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(param.grad, param.grad, value=1 - beta2)
        first, second = (1 - beta ** counter["step"] for beta in (beta1, beta2))
        denominator = (state["exp_avg_sq"] / second).sqrt_().add_(group["eps"])
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.addcdiv_(state["exp_avg"] / first, denominator, value=-group["lr"])


class DeepSpeedFusedAdam(FusedAdam):
    counted = "state"


APEX = {
    "apex.normalization.fused_layer_norm": {
        "fused_rms_norm_affine": fused_rms_norm_affine,
        "mixed_dtype_fused_rms_norm_affine": mixed_dtype_fused_rms_norm_affine,
    },
    "apex.contrib.group_norm": {"GroupNorm": ApexGroupNorm},
    "apex.optimizers": {"FusedAdam": FusedAdam},
}
DEEPSPEED = {"deepspeed.ops.adam": {"FusedAdam": DeepSpeedFusedAdam}}


def quack_rmsnorm(
    x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6, prenorm=False
):
    assert bias is None and residual_dtype is None
    total = x if residual is None else (x.float() + residual.float()).to(residual.dtype)
    y = rms(total, weight, eps).to(out_dtype or x.dtype)
    return (y, total) if prenorm else y


QUACK = {"quack": {"rmsnorm": quack_rmsnorm}}


def apply_rotary_emb(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None):
    assert interleaved and not inplace and cos.dtype == sin.dtype == x.dtype
    assert cos.shape == sin.shape == (x.shape[1], x.shape[-1] // 2) and cos.is_contiguous()
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos.float()[:, None], sin.float()[:, None]
    return torch.stack((even * c - odd * s, odd * c + even * s), -1).flatten(-2).to(x.dtype)


def attend(q, k, v, causal: bool) -> torch.Tensor:
    """On `[B, N, heads, d]`, of 16 bits and with contiguous rows, as flash-attention asks for."""
    assert not causal and all(t.dtype.itemsize == 2 and t.stride(-1) == 1 for t in (q, k, v))
    q, k, v = (t.transpose(1, 2).float() for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).to(torch.bfloat16)


def flash_attn_2(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    return attend(q, k, v, causal)


def flash_attn_3(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
):
    out = attend(q, k, v, causal)
    return out, out.new_zeros(1)  # the log-sum-exp, which some versions return too


FLASH = {
    "flash_attn": {"flash_attn_func": flash_attn_2},
    "flash_attn.layers.rotary": {"apply_rotary_emb": apply_rotary_emb},
    "flash_attn_interface": {"flash_attn_func": flash_attn_3},
}
