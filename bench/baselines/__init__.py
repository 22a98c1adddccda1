"""Baselines by op: other people's kernels behind the interface of a provider. Each imports its package when loaded."""

from bench.baselines import activations, attention, forward_modes, norms, optimizers
from bench.baselines.interface import Adapter, Provider

#: Op name → who else computes it.
BASELINES: dict[str, tuple[Provider, ...]] = {
    "adaln_rms_norm": norms.ADALN,
    "gated_residual_adaln_rms_norm": norms.GATED,
    "group_norm_silu": norms.GROUP_NORM,
    "swiglu": activations.SWIGLU,
    "rope_attention": attention.ATTENTION,
    "adamw_ema_": optimizers.OPTIMIZERS,
    **forward_modes.FORWARD_MODES,
}

__all__ = ["BASELINES", "Adapter", "Provider"]
