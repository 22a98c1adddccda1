"""Encoding and decoding passes of tokenizers with random weights, the same for every provider."""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
from bench.workloads.training import seeded
from bench.workloads.variants import TokenizerVariant
from kernels.compile.modes import compiled
from kernels.registry import Ops
from vavae.config import AutoencoderConfig
from vavae.images import to_uint8
from vavae.model import AutoencoderKL

#: Images of a batch whose results are checked.
CHECKED_IMAGES = 2


def set_numerics() -> None:
    """As `start_processes` of the engine sets them: IEEE float32 in convolutions, and the same bits each time."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


def make_tokenizer(config: AutoencoderConfig, ops: Ops, device: torch.device | str) -> AutoencoderKL:
    """The same weights for everybody on a device, float32, not to be trained."""
    with seeded(device):
        return AutoencoderKL(config, ops).to(device).eval().requires_grad_(False)


def draw(shape: tuple[int, ...], device: torch.device | str) -> torch.Tensor:
    """Normal numbers, cut to [-1, 1] so that they may be pixels; the same each time."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device).clamp_(-1, 1)


class Encode:
    """Images [B, 3, S, S] in [-1, 1] → a sample of each posterior, as extraction encodes one image (it does each twice,
    plain and mirrored)."""

    def __init__(self, tokenizer: AutoencoderKL, inputs: torch.Tensor):
        self.tokenizer, self.inputs = tokenizer, inputs
        self.noise = draw(Decode.shape(tokenizer.config, len(inputs), inputs.shape[-1]), inputs.device)

    @staticmethod
    def shape(config: AutoencoderConfig, batch: int, size: int) -> tuple[int, ...]:
        """Of the inputs."""
        return batch, config.in_channels, size, size

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        return self.tokenizer.encode(self.inputs).sample(noise=self.noise)

    @staticmethod
    @torch.no_grad()
    def result(tokenizer: AutoencoderKL, inputs: torch.Tensor) -> torch.Tensor:
        """First results, to be checked."""
        return tokenizer.moments(inputs)


class Decode:
    """Latents [B, C, h, w] → 8-bit images [B, 3, S, S], as samples are decoded."""

    def __init__(self, tokenizer: AutoencoderKL, inputs: torch.Tensor):
        self.tokenizer, self.inputs = tokenizer, inputs

    @staticmethod
    def shape(config: AutoencoderConfig, batch: int, size: int) -> tuple[int, ...]:
        grid = size // config.downsample_ratio
        return batch, config.embed_dim, grid, grid

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        return to_uint8(self.tokenizer.decode(self.inputs))

    @staticmethod
    @torch.no_grad()
    def result(tokenizer: AutoencoderKL, inputs: torch.Tensor) -> torch.Tensor:
        return tokenizer.decode(inputs)


PASSES: dict[str, type[Encode] | type[Decode]] = {"encode": Encode, "decode": Decode}


class PassSetup:
    """State that the providers of a pass share: inputs, and first results of the reference ops to check against.

    Attributes:
        eager: results of the reference ops in the dtype asked for.
        exact: in float64.
        flops: of an image.
        about: further keys of rows.
    """

    def __init__(
        self,
        part: str,
        config: AutoencoderConfig,
        size: int,
        batch: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        set_numerics()
        self._way, self._config, self._dtype = PASSES[part], config, dtype
        self._inputs = draw(self._way.shape(config, batch, size), device)
        tokenizer, few = make_tokenizer(config, kernels.select("reference"), device), self._inputs[:CHECKED_IMAGES]
        self.exact = self._way.result(tokenizer.double(), few)
        tokenizer = make_tokenizer(config, kernels.select("reference"), device).to(dtype)
        self.eager = self._way.result(tokenizer, few)
        self.flops = flops_per_image(config, size)[part]
        self.about: dict[str, str] = {}

    def provider(self, variant: TokenizerVariant) -> tuple[Encode | Decode, torch.Tensor]:
        """A pass to call, and its first results."""
        layout = torch.channels_last if variant.channels_last else torch.contiguous_format
        tokenizer = make_tokenizer(self._config, kernels.select(variant.kernels), self._inputs.device)
        tokenizer.to(self._inputs.device, self._dtype, memory_format=layout)
        for half in (tokenizer.encoder, tokenizer.decoder):
            half.forward = compiled(half.forward, variant.compile, deterministic=variant.ours)
        run = self._way(tokenizer, self._inputs.contiguous(memory_format=layout))
        return run, self._way.result(tokenizer, run.inputs)[:CHECKED_IMAGES]


@cache
def flops_per_image(config: AutoencoderConfig, size: int) -> dict[str, int]:
    """ "encode" and "decode" → FLOPs of an image of size × size pixels, every product and convolution, a multiply-add
    counted as two; nothing is allocated."""
    with torch.device("meta"):
        tokenizer = AutoencoderKL(config, kernels.select("reference"))
        inputs = {name: torch.empty(way.shape(config, 1, size)) for name, way in PASSES.items()}
    return {name: _count(partial(way.result, tokenizer, inputs[name])) for name, way in PASSES.items()}


def _count(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
