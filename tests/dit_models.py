"""Small LightningDiTs that tests share: the recorded ones, and random ones whose every connection shows."""

import torch

from lightningdit.config import ModelConfig
from lightningdit.model import LightningDiT
from tests.golden import G, J

VARIANTS = J("01_dit")["variants"]
RECORDED = ("a", "b", "d")  # the variants whose tensors are recorded


def build(variant, ops, dtype=torch.float32, **changes) -> LightningDiT:
    """The recorded model of that letter, with its recorded weights where they exist."""
    model = LightningDiT(ModelConfig(**VARIANTS[variant] | changes), ops)
    if variant in RECORDED:
        model.load_state_dict(G(f"01_dit_{variant}").group("param/"))
    return model.to(dtype).eval()


def random_model(config: ModelConfig, ops, seed=0) -> LightningDiT:
    """A model none of whose weights is zero, so that every connection shows."""
    torch.manual_seed(seed)
    model = LightningDiT(config, ops)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p) * 0.1 + (1.0 if "norm" in name and p.dim() == 1 else 0.0))
    return model


def inputs(config: ModelConfig, batch=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size, generator=g)
    return x, torch.rand(batch, generator=g), torch.randint(config.num_classes, (batch,), generator=g)
