"""The frozen network of timm whose features the latents are aligned to: DINOv2, MAE, CLIP, SAM and others.

    FoundationModel.from_config(config, grid=16)(images)   # [B, 3, 256, 256] → [B, width, 16, 16]

The only package that imports timm, in `registry` and `weights`.
"""

from vavae.foundation.model import FoundationModel, to_download

__all__ = ["FoundationModel", "to_download"]
