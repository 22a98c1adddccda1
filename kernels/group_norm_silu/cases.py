import torch

from kernels.testing.cases import Case, Cost, Draw, nbytes, strided

EPS = 1e-6


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _case(
    name: str, *shape: int, groups: int, mean=0.5, drift=0.0, small=None, layout=_channels_last, production=False
) -> Case:
    """`drift` is how much the mean rises over the rows; `small` the dtype of weight and bias where not that of `x`."""

    def make(draw: Draw) -> dict:
        x = draw.normal(*shape, mean=mean, std=1.5, dtype=torch.float32)
        if drift:
            x += torch.linspace(0, drift, shape[2], device=x.device)[:, None]
        x.unflatten(1, (groups, -1))[:, 1::2] *= 1e-3  # the eps decides these groups
        return {
            "x": layout(x.to(draw.dtype)),
            "weight": draw.normal(shape[1], mean=1.0, std=0.3, dtype=small),
            "bias": draw.normal(shape[1], mean=0.2, std=0.3, dtype=small),
            "groups": groups,
            "eps": EPS,
        }

    return Case(name, make, production)


CASES = (
    _case("one_position", 2, 6, 1, 1, groups=2),
    _case("one_group", 1, 5, 3, 2, groups=1),
    _case("odd", 2, 15, 3, 5, groups=3),
    _case("contiguous", 2, 8, 4, 3, groups=4, layout=torch.Tensor.contiguous),
    _case("strided", 2, 6, 3, 5, groups=3, layout=strided),
    _case("large_mean", 2, 8, 5, 4, groups=2, mean=20.0),
    _case("float32_weights", 2, 8, 4, 4, groups=2, small=torch.float32),
    _case("many_groups", 1, 64, 4, 4, groups=32),
    _case("long_samples", 2, 20, 25, 26, groups=5, mean=3.0, drift=2.0),
    _case("long_samples_contiguous", 1, 6, 47, 50, groups=3, drift=9.0, layout=torch.Tensor.contiguous),
    _case("f16_256", 8, 128, 256, 256, groups=32, small=torch.float32, production=True),
    _case("f16_128", 8, 128, 128, 128, groups=32, small=torch.float32, production=True),
    _case("f16_64", 8, 256, 64, 64, groups=32, small=torch.float32, production=True),
    _case("f16_64_contiguous", 8, 256, 64, 64, groups=32, layout=torch.Tensor.contiguous, production=True),
    _case("f16_32", 8, 256, 32, 32, groups=32, production=True),
    _case("f16_16", 8, 512, 16, 16, groups=32, production=True),
)


def cost(x, weight, bias, groups=32, eps=EPS) -> Cost:
    inputs = nbytes(x, weight, bias)
    return Cost(forward_bytes=inputs + nbytes(x), backward_bytes=nbytes(x) + 2 * inputs)
