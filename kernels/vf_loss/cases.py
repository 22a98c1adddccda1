import torch

from kernels.testing.cases import Case, Cost, Draw, nbytes, strided

PUBLISHED = (0.25, 0.5)  # margins of the paper's last training stage
FULL_PRECISION = frozenset({torch.float64, torch.float32})


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _case(
    name: str,
    samples: int,
    channels: int,
    height: int,
    width: int,
    margins=PUBLISHED,
    *,
    features=None,
    layout=lambda x: x,
    production=False,
    few=False,
) -> Case:
    """`features` is the dtype of `f` where it is not that of `z`; `few` directions where there are many positions."""
    shape = (samples, channels, height, width)
    vectors = _few_directions if production or few else _any_directions

    def make(draw: Draw) -> dict:
        z, f = vectors(draw, shape), vectors(draw, shape)
        return _arguments(layout(z.to(draw.dtype)), layout(f.to(features or draw.dtype)), margins)

    return Case(name, make, production)


def _arguments(z: torch.Tensor, f: torch.Tensor, margins: tuple[float, float]) -> dict:
    return {"z": z, "f": f, "distmat_margin": margins[0], "cos_margin": margins[1]}


def _any_directions(draw: Draw, shape: tuple[int, ...]) -> torch.Tensor:
    """Vectors whose cosines are spread over most of [−1, 1], every other one of them 1e-3 long."""
    samples, channels, height, width = shape
    values = draw.rows(samples, height, width, channels, dtype=torch.float32)
    common = draw.normal(samples, 1, 1, channels, dtype=torch.float32)
    ratio = values.norm(dim=-1, keepdim=True) / common.norm(dim=-1, keepdim=True)
    return (values + 0.5 * ratio * common).movedim(-1, 1)


def _few_directions(draw: Draw, shape: tuple[int, ...]) -> torch.Tensor:
    """Vectors of eight directions and any length.

    With millions of different cosines some fall within rounding of a kink, where the gradient jumps and two correct
    results differ; with 36 they do not.
    """
    samples, channels, height, width = shape
    directions = draw.normal(8, channels, dtype=torch.float32) + draw.normal(1, channels, dtype=torch.float32)
    which = draw.integers(8, samples, height, width)
    lengths = draw.uniform(samples, height, width, 1, low=0.1, high=2.0, dtype=torch.float32)
    return (directions[which] * lengths).movedim(-1, 1).contiguous()


def _below_the_floors(draw: Draw) -> dict:
    """Some norms lie between the floors, 1e-12 and 1e-8: they are scaled up in one term and not in the other."""
    return _scaled_down(draw, 1e-10)


def _below_both_floors(draw: Draw) -> dict:
    return _scaled_down(draw, 1e-13)


def _scaled_down(draw: Draw, scale: float) -> dict:
    z, f = draw.normal(2, 6, 2, 3), draw.normal(2, 6, 2, 3)
    z[:, :, 0] *= scale
    f[:, :, :, 1] *= scale
    return _arguments(z, f, (0.1, 0.0))


CASES = (
    _case("one_position", 2, 5, 1, 1),
    _case("two_channels", 1, 2, 2, 3, (0.1, 0.2)),
    _case("odd", 3, 7, 3, 5),
    _case("no_margins", 2, 24, 4, 4, (0.0, 0.0)),
    _case("more_positions_than_channels", 1, 3, 5, 7, (0.1, 0.3)),
    _case("more_channels_than_positions", 2, 100, 2, 3, (0.1, 0.3)),
    _case("float32_features", 2, 12, 3, 3, features=torch.float32),
    _case("float16_features", 2, 11, 3, 4, features=torch.float16, layout=_channels_last),
    _case("channels_last", 2, 12, 3, 4, layout=_channels_last),
    _case("strided", 2, 9, 3, 4, layout=strided),
    Case("below_the_floors", _below_the_floors, dtypes=FULL_PRECISION),
    Case("below_both_floors", _below_both_floors, dtypes=FULL_PRECISION),
    _case("tiles", 1, 20, 17, 16, few=True),
    _case("tiles_channels_last", 1, 70, 9, 9, (0.11, 0.1), few=True, layout=_channels_last),
    _case("dinov2_large", 32, 1024, 16, 16, production=True),
    _case("dinov2_large_no_margins", 8, 1024, 16, 16, (0.0, 0.0), production=True),
    _case("mae_base", 8, 768, 16, 16, production=True),
    _case("mae_base_channels_last", 8, 768, 16, 16, layout=_channels_last, production=True),
    _case("latent_width", 16, 32, 16, 16, production=True),
)


def cost(z, f, distmat_margin=0.0, cos_margin=0.0) -> Cost:
    samples, channels, height, width = z.shape
    product = 2 * samples * (height * width) ** 2 * channels
    return Cost(
        forward_bytes=nbytes(z, f),
        # The features are frozen in training: their gradient is not counted.
        backward_bytes=nbytes(z, f) + nbytes(z),
        forward_flops=2 * product,
        backward_flops=product,
    )
