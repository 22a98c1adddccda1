"""What `train.watch` measures in a LightningDiT: the largest attention logit and activation norm of each block.

Logits that grow without limit make attention collapse to one token and end in a diverging loss (Dehghani et al.,
arXiv 2302.05442, section 2; Wortsman et al., arXiv 2309.14322, section 3.1), long before the loss shows it.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kernels.adaln_rms_norm.reference import rms_normalize
from kernels.registry import Ops
from kernels.rope_attention.reference import apply_rope
from lightningdit.duals import Value, value_of
from lightningdit.model import Attention, LightningDiT, PendingResidual

LOGITS = 2**24  # that are in memory at once, float32: 64 MiB


class _MeasuringOps:
    """The ops of a block whose `rope_attention` also records the largest logit of its arguments."""

    def __init__(self, ops: Ops, found: list[Tensor]):
        self._ops, self._found = ops, found

    def rope_attention(self, qkv: Value, cos: Tensor | None, sin: Tensor | None, *args: Any, **kwargs: Any) -> Value:
        self._found.append(largest_logit(value_of(qkv), cos, sin, *args, **kwargs))
        return self._ops.rope_attention(qkv, cos, sin, *args, **kwargs)


def largest_logit(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    eps: float,
    bias: Tensor | None = None,
) -> Tensor:
    """The largest of |q·k| / √d over samples, heads and pairs of tokens, after QK norm and RoPE, in float32.

    Arguments as of the op `rope_attention`, qkv [B, N, 3, H, d]; a scalar, NaN where a logit is not finite.
    """
    packed = qkv.float() if bias is None else qkv.float() + bias.float().view(qkv.shape[2:])
    q, k, _ = packed.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, d] each
    if q_weight is not None and k_weight is not None:
        q, k = rms_normalize(q, eps) * q_weight.float(), rms_normalize(k, eps) * k_weight.float()
    if cos is not None and sin is not None:
        q, k = (apply_rope(x, cos.float(), sin.float()) for x in (q, k))
    q, k = (x.flatten(0, 1) for x in (q * q.shape[-1] ** -0.5, k))  # [B·H, N, d]
    at_once = max(LOGITS // q.shape[1] ** 2, 1)
    parts = zip(q.split(at_once), k.split(at_once), strict=True)
    return torch.stack([(a @ b.transpose(1, 2)).abs().amax() for a, b in parts]).amax()


def _largest_norm(stream: Value, pending: PendingResidual) -> Tensor:
    """The largest L2 norm of a token of the residual stream [B, N, D], the block's last branch added to it."""
    branch, gate = value_of(pending.branch).float(), value_of(pending.gate)[:, None].float()
    branch = branch if pending.bias is None else branch + pending.bias.float()
    return (value_of(stream).float() + gate * branch).norm(dim=-1).amax()


@contextmanager
def measured(network: LightningDiT, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Record figures of the forward passes in the block → key → scalar, such as `attention_logit_max/blocks.3`.

    The passes run eagerly, whatever the network is compiled to, so that its blocks can be looked into.
    """
    logits: dict[str, list[Tensor]] = {}
    norms: dict[str, Tensor] = {}
    attentions: list[tuple[Attention, Ops]] = []
    hooks = []
    found: dict[str, Tensor] = {}
    for number, block in enumerate(network.blocks):
        name = f"blocks.{number}"
        if "attention_logits" in names:
            attention: Any = block.attn
            attentions.append((attention, attention.ops))
            attention.ops = _MeasuringOps(attention.ops, logits.setdefault(name, []))
        if "activation_norms" in names:

            def record(module, args, output, name=name) -> None:
                largest = _largest_norm(*output)  # of all passes
                norms[name] = torch.maximum(norms[name], largest) if name in norms else largest

            hooks.append(block.register_forward_hook(record))
    try:
        with torch.compiler.set_stance("force_eager"):
            yield found
    finally:
        for attention, ops in attentions:
            attention.ops = ops
        for hook in hooks:
            hook.remove()
    found |= {f"attention_logit_max/{name}": torch.stack(values).amax() for name, values in logits.items()}
    found |= {f"activation_norm_max/{name}": value for name, value in norms.items()}
