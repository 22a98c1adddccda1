import torch

from kernels.cases import Case, Cost, Draw, nbytes, strided

EPS = 1e-6


def _case(name: str, samples: int, tokens: int, heads: int, width: int, *, rope=True, norm=True, std=1.5, small=None,
          layout=lambda x: x, production=False) -> Case:
    """`std` is that of queries, keys and values; `small` the dtype of the weights where it is not that of `qkv`."""

    def make(draw: Draw) -> dict:
        qkv = draw.normal(samples, tokens, 3, heads, width, std=std, mean=0.2, dtype=torch.float32)
        if norm:
            qkv[:, 1::2, :2] *= 1e-3  # the eps of the norm decides these rows
        cos, sin = draw.angles(tokens, width) if rope else (None, None)
        q_weight, k_weight = (draw.normal(width, mean=1.0, std=0.3, dtype=small) if norm else None for _ in "qk")
        return {"qkv": layout(qkv.to(draw.dtype)), "cos": cos, "sin": sin, "q_weight": q_weight, "k_weight": k_weight,
                "eps": EPS}

    return Case(name, make, production)


def _heads_first(qkv: torch.Tensor) -> torch.Tensor:
    """The same values, laid out in memory as `[3, B, heads, N, d]`."""
    return qkv.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4)


CASES = (
    _case("one_token", 2, 1, 2, 8, norm=False),
    _case("two_wide", 1, 3, 1, 2),
    _case("odd", 2, 5, 3, 10),
    _case("odd_no_norm", 2, 5, 3, 10, norm=False),
    _case("norm_only", 2, 7, 2, 8, rope=False),
    _case("plain_odd_width", 1, 6, 2, 7, rope=False, norm=False),
    _case("peaked", 1, 9, 2, 16, norm=False, std=12.0),  # exp overflows unless the row's maximum is taken off
    _case("strided", 2, 5, 2, 12, layout=strided),
    _case("heads_first", 2, 5, 2, 12, layout=_heads_first),
    _case("float32_weights", 2, 6, 2, 12, small=torch.float32),
    _case("width_64", 1, 33, 2, 64, norm=False),
    _case("width_72", 1, 37, 2, 72),
    _case("B", 32, 256, 12, 64, norm=False, production=True),
    _case("L", 32, 256, 16, 64, norm=False, production=True),
    _case("XL", 128, 256, 16, 72, norm=False, production=True),
    _case("XL_norm", 32, 256, 16, 72, production=True),
    _case("1p6B", 16, 256, 28, 64, norm=False, production=True),
    _case("XL_64_tokens", 64, 64, 16, 72, norm=False, production=True),
    _case("XL_1024_tokens", 4, 1024, 16, 72, norm=False, production=True),
    _case("XL_ragged", 4, 250, 16, 72, production=True),
)


def cost(qkv, cos, sin, q_weight=None, k_weight=None, eps=EPS) -> Cost:
    samples, tokens, _, heads, width = qkv.shape
    result = nbytes(qkv) // 3
    constants = nbytes(cos, sin, q_weight, k_weight)
    product = 2 * samples * heads * tokens * tokens * width
    return Cost(
        forward_bytes=nbytes(qkv) + result + constants,
        # Read: qkv, the result and its gradient. Written: the gradient of qkv.
        backward_bytes=nbytes(qkv) + 2 * result + nbytes(qkv) + constants + nbytes(q_weight, k_weight),
        forward_flops=2 * product,
        backward_flops=5 * product,
    )
