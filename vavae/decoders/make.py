"""Decoders by their names."""

import torch

from vavae.decoders.decoder import Crop, Decoder
from vavae.decoders.pil import PilDecoder
from vavae.decoders.torchvision_decoder import TorchvisionDecoder


def make_decoder(name: str, crop: Crop, *, threads: int, device: torch.device | str, cache: bool = False) -> Decoder:
    """A decoder by its name; `threads`, `device` are for those that are `threaded`, `cache` for Pillow's."""
    if name == "pil":
        return PilDecoder(crop, cache=cache)
    if name == "torchvision":
        return TorchvisionDecoder(crop, threads=threads, device=device)
    try:
        from vavae.decoders.dali_decoder import DaliDecoder  # whose package may be absent
    except ImportError as e:
        raise ValueError(f"data.decoder is dali, but its package does not load: {e}") from None
    return DaliDecoder(crop, threads=threads, device=device)
