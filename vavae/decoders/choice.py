"""Which decoder serves `data.decoder` on a device and, for `auto`, why it was chosen. Imports none of them."""

import importlib.util
from functools import cache

import torch

NAMES = ("dali", "torchvision", "pil")


def lacking(name: str, device: torch.device | str = "cpu") -> str:
    """Why a decoder cannot serve on a device here; empty where it can. For a GPU it decodes an image to find out."""
    if name == "dali" and not _dali_is_installed():
        return "nvidia-dali-cuda130 is not installed: pip install 'lightningdit[dali]'"
    return _does_not_decode(name, str(device)) if name != "pil" and torch.device(device).type == "cuda" else ""


def _dali_is_installed() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even its parent
        return False


@cache
def _does_not_decode(name: str, device: str) -> str:
    from vavae.decoders.probe import decode_an_image  # imports torchvision: seconds of its own

    try:
        decode_an_image(name, device)
    except Exception as error:  # whatever a library raises that does not load, or not on this driver
        return f"it does not decode on {device}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""


def choose_decoder(
    asked: str, device: torch.device | str, *, crop: str = "random", cached: bool = False
) -> tuple[str, str]:
    """The name of the decoder that serves `data.decoder` on a device, and why it was chosen.

    Args:
        asked: a decoder's name, or `auto`.
        crop, cached: `data.crop`, `data.cache`.

    Raises ValueError where the one asked for cannot serve.
    """
    if asked != "auto":
        if why := lacking(asked, device):
            raise ValueError(f"data.decoder is {asked}, but {why}; or leave the choice to data.decoder auto")
        return asked, "asked for"
    if crop == "published_eval":
        return "pil", "data.crop published_eval is Pillow's alone"
    if cached:
        return "pil", "data.cache keeps what Pillow scaled"
    if torch.device(device).type != "cuda":
        return "torchvision", "the fastest without a GPU"
    dali, torchvision = (lacking(name, device) for name in ("dali", "torchvision"))
    if not dali:
        return "dali", "decodes on the GPU"
    if not torchvision:
        return "torchvision", f"decodes on the GPU; dali: {dali}"
    return "pil", f"dali: {dali}; torchvision: {torchvision}"
