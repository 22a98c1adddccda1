"""Configurations of the published models."""

from lightningdit.config import ModelConfig, named_config


def published_config(name: str) -> ModelConfig:
    """That of LightningDiT-XL/1 and its like: on 16 × 16 × 32 latents, with SwiGLU, RoPE and RMSNorm."""
    return named_config(name, input_size=16, in_channels=32, use_swiglu=True, use_rope=True, use_rmsnorm=True)
