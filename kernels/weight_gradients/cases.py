from kernels.testing.cases import Case, Cost, Draw, nbytes, strided


def _case(name: str, tokens: tuple[int, ...], *widths: tuple[int, int], layout=lambda x: x, production=False) -> Case:
    """`widths`: those of each layer's result and input."""

    def make(draw: Draw) -> dict:
        return {
            "d_outputs": [layout(draw.normal(*tokens, out)) for out, _ in widths],
            "inputs": [layout(draw.normal(*tokens, inner, mean=0.2)) for _, inner in widths],
        }

    return Case(name, make, production)


def _block(width: int, hidden: int) -> tuple[tuple[int, int], ...]:
    """The layers of a transformer block: qkv, proj, w12, w3."""
    return (3 * width, width), (width, width), (2 * hidden, width), (width, hidden)


CASES = (
    _case("one_layer", (16,), (8, 8)),
    _case("odd", (37,), (5, 7), (3, 9)),
    _case("last_tiles", (70,), (136, 24), (40, 200)),
    _case("block", (2, 50), *_block(72, 192)),
    _case("one_token", (1,), (16, 32), (24, 8)),
    _case("many_tokens", (2100,), (24, 40), (8, 16)),  # their sum is cut in parts
    _case("strided", (3, 11), (16, 8), (8, 24), layout=strided),
    _case("transposed", (48,), (16, 8), (8, 24), layout=lambda x: x.t().contiguous().t()),
    _case("B", (128, 256), *_block(768, 2048), production=True),
    _case("L", (128, 256), *_block(1024, 2730), production=True),
    _case("XL", (128, 256), *_block(1152, 3072), production=True),
)


def cost(d_outputs, inputs) -> Cost:
    pairs = list(zip(d_outputs, inputs, strict=True))
    results = sum(d.shape[-1] * x.shape[-1] * d.element_size() for d, x in pairs)
    flops = sum(2 * d.numel() * x.shape[-1] for d, x in pairs)
    return Cost(forward_bytes=nbytes(*d_outputs, *inputs) + results, forward_flops=flops)
