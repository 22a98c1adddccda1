"""What `train.watch` measures in a tokenizer: the largest activation norm of each level, and the largest attention
logit of each attention layer (arXiv 2302.05442, section 2)."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from vavae.model import AttnBlock, AutoencoderKL, Level, MidBlock


@contextmanager
def measured(network: AutoencoderKL, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Record figures of the forward pass in the block → key → scalar, such as `activation_norm_max/encoder.down.0`.

    The pass runs eagerly, whatever the network is compiled to. A norm is that of a position's channels.
    """
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, module in network.named_modules():
            if "activation_norms" in names and isinstance(module, Level | MidBlock):

                def norm(module, args, output, name=name) -> None:
                    found[f"activation_norm_max/{name}"] = output.float().norm(dim=1).amax()

                stack.callback(module.register_forward_hook(norm).remove)
            if "attention_logits" in names and isinstance(module, AttnBlock):
                _record_logits(module, f"attention_logit_max/{name}", found, stack)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield found


def _record_logits(module: AttnBlock, key: str, found: dict[str, Tensor], stack: ExitStack) -> None:
    """The largest |q·k| / √C over images and pairs of positions, in float32, one image at a time."""
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module, args, output) -> None:
            seen[name] = output.float().flatten(2)  # [B, C, H·W]

        return hook

    def record(module, args, output) -> None:
        scale = seen["q"].shape[1] ** -0.5
        logits = [(scale * q.T @ k).abs().amax() for q, k in zip(seen["q"], seen["k"], strict=True)]
        found[key] = torch.stack(logits).amax()
        seen.clear()

    for part, hook in ((module.q, keep("q")), (module.k, keep("k")), (module, record)):
        stack.callback(part.register_forward_hook(hook).remove)
