"""One small image through a decoder: whether its library loads and decodes on a device."""

import torch
from torchvision.io import encode_jpeg

from vavae.decoders.decoder import Crop
from vavae.decoders.make import make_decoder

SIZE = 32


class _OneFile:
    def __init__(self):
        self._content = encode_jpeg(torch.full((3, SIZE, SIZE), 100, dtype=torch.uint8)).numpy().tobytes()

    def name(self, index: int) -> str:
        return "a test image"

    def read(self, index: int) -> bytes:
        return self._content


def decode_an_image(name: str, device: torch.device | str) -> None:
    """Raise what the decoder raises, or RuntimeError where it leaves the image to Pillow."""
    decoder = make_decoder(name, Crop("center", SIZE, rotate=False), threads=1, device=device)
    ((pixels, by_pillow),) = decoder.squares(_OneFile(), [0], [0])
    if by_pillow or not isinstance(pixels, torch.Tensor):
        raise RuntimeError("it decodes no JPEG file")
    if pixels.is_cuda:
        torch.cuda.synchronize(pixels.device)
