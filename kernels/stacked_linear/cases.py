import torch

from kernels.testing.cases import Case, Cost, Draw, nbytes, strided


def _case(
    name: str, layers: int, samples: int, width: int, outputs: int, flat: bool, layout=lambda x: x, production=False
):
    """`flat`: the layers lie behind one another in one buffer, as ZeRO has them; else in memory of their own."""

    def make(draw: Draw) -> dict:
        size = outputs * width
        # Numbers of other parameters, on either side of a layer's bias.
        buffer = draw.normal(layers, size + outputs + 16, std=0.5)
        weights = [layout(row[:size].view(outputs, width)) for row in buffer]
        biases = [row[size + 8 : size + 8 + outputs] for row in buffer]
        if not flat:
            weights, biases = [torch.clone(t) for t in weights], [torch.clone(t) for t in biases]
        return {"x": layout(draw.normal(samples, width, mean=0.2)), "weights": weights, "biases": biases}

    return Case(name, make, production)


CASES = (
    _case("one_layer", 1, 3, 8, 12, flat=True),
    _case("odd", 3, 5, 7, 11, flat=False),
    _case("odd_flat", 3, 5, 7, 11, flat=True),
    _case("one_sample", 4, 1, 16, 24, flat=True),
    _case("strided", 3, 5, 8, 12, flat=False, layout=strided),
    _case("many", 12, 6, 24, 36, flat=True),
    _case("B", 12, 128, 768, 6 * 768, flat=True, production=True),
    _case("L", 24, 128, 1024, 6 * 1024, flat=True, production=True),
    _case("XL", 28, 128, 1152, 6 * 1152, flat=True, production=True),
    _case("XL_apart", 28, 128, 1152, 6 * 1152, flat=False, production=True),
)


def cost(x, weights, biases) -> Cost:
    result = len(weights) * len(x) * weights[0].shape[0] * x.element_size()
    flops = 2 * x.numel() * weights[0].shape[0] * len(weights)
    return Cost(
        forward_bytes=nbytes(x, *weights, *biases) + result,
        backward_bytes=result + 2 * nbytes(x, *weights) + nbytes(*biases),
        forward_flops=flops,
        backward_flops=2 * flops,
    )
