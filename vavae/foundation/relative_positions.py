"""Relative positions of SAM, gathered once instead of in each pass.

timm gathers them in each attention by an index that it makes on the CPU: under CUDA a copy that the device waits for,
and an end to CUDA graphs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn


class RelativePositions(nn.Module):
    """Stands where timm's attention looks for a parameter [L, C]; whatever the index, it gives [size, size, C].

    timm's index is that of `size` queries and keys too. Row q and column k hold the position q − k + size − 1 of the
    parameter, interpolated to 2·size − 1 positions where it has another number, as timm does it.
    """

    gathered: torch.Tensor

    def __init__(self, parameter: nn.Parameter, size: int):
        super().__init__()
        self.parameter = parameter
        length = 2 * size - 1
        self.shape = (length, parameter.shape[1])
        table = parameter.detach()
        if len(table) != length:
            table = F.interpolate(table.T[None], size=length, mode="linear")[0].T  # [length, C]
        position = torch.arange(size, device=table.device)
        gathered = table[position[:, None] - position[None] + size - 1]  # [size, size, C]
        self.register_buffer("gathered", gathered, persistent=False)

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        return self.gathered

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        # Under the parameter's own name, so that a file has timm's layout.
        destination[prefix.removesuffix(".")] = self.parameter if keep_vars else self.parameter.detach()


def gather_relative_positions(model: nn.Module, feature_grid: int) -> None:
    """Do so in every attention of a SAM whose weights are final; leaves other models alone."""
    if not isinstance(model, VisionTransformerSAM):
        return
    block: Any
    for block in model.blocks:
        for name in ("rel_pos_h", "rel_pos_w"):
            if isinstance(parameter := getattr(block.attn, name, None), nn.Parameter):
                delattr(block.attn, name)
                setattr(block.attn, name, RelativePositions(parameter, block.window_size or feature_grid))
