"""Recorded numbers of the published LightningDiT / VA-VAE code, and the comparisons that go with them."""

from tests.golden.golden import G, J, close, close_grads, formula_weight

__all__ = ["G", "J", "close", "close_grads", "formula_weight"]
