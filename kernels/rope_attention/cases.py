import torch

from kernels.registry import FLOATS
from kernels.testing.cases import Case, Cost, Draw, nbytes, strided

EPS = 1e-6
FULL_PRECISION, HALF_PRECISION = frozenset({torch.float32, torch.float64}), frozenset({torch.float16, torch.bfloat16})
#: Of production cases that differ from others in one thing: once is enough.
TRAINED = frozenset({torch.bfloat16})
FLOAT32_TOO = TRAINED | {torch.float32}


def make_case(
    name: str,
    samples: int,
    tokens: int,
    heads: int,
    width: int,
    *,
    rope=True,
    norm=True,
    bias=False,
    std=1.5,
    mean=0.2,
    vector_dtype=None,
    layout=lambda x: x,
    production=False,
    dtypes=FLOATS,
) -> Case:
    """`std`, `mean`: of queries, keys and values; `vector_dtype`: of weights and bias, if not that of `qkv`."""

    def make(draw: Draw) -> dict:
        qkv = draw.normal(samples, tokens, 3, heads, width, std=std, mean=mean, dtype=torch.float32)
        if norm and not bias:  # with one, no row is small
            qkv[:, 1::2, :2] *= 1e-3  # the eps of the norm decides these rows
        cos, sin = draw.angles(tokens, width) if rope else (None, None)
        q_weight, k_weight = (draw.normal(width, mean=1.0, std=0.3, dtype=vector_dtype) if norm else None for _ in "qk")
        vector = draw.normal(3 * heads * width, mean=-0.3, std=0.5, dtype=vector_dtype) if bias else None
        return {
            "qkv": layout(qkv.to(draw.dtype)),
            "cos": cos,
            "sin": sin,
            "q_weight": q_weight,
            "k_weight": k_weight,
            "eps": EPS,
            "bias": vector,
        }

    return Case(name, make, production, dtypes)


def _heads_first(qkv: torch.Tensor) -> torch.Tensor:
    """The same values, laid out in memory as `[3, B, heads, N, d]`."""
    return qkv.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4)


def _negate_queries_of_one_head(qkv: torch.Tensor) -> torch.Tensor:
    """Negate the second head's queries: where all scores are far below 0, a key past the end shows."""
    qkv = qkv.clone()
    qkv[:, :, 0, 1] *= -1
    return qkv


CASES = (
    # The gradients of q and k are 0 here but for the rounding of products: of small numbers, to be below the tolerance.
    make_case("one_token", 2, 1, 2, 8, norm=False, std=0.5),
    make_case("two_wide", 1, 3, 1, 2),
    make_case("bias_norm", 2, 7, 3, 12, bias=True),
    make_case("odd", 2, 5, 3, 10),
    make_case("odd_no_norm", 2, 5, 3, 10, norm=False),
    make_case("norm_only", 2, 7, 2, 8, rope=False),
    make_case("plain_odd_width", 1, 6, 2, 7, rope=False, norm=False),
    # exp overflows unless the row's maximum is subtracted. Scores that large also show the rounding of rotated queries
    # and keys, which tensor cores impose in 16 bits: full precision here, no rotation below (where float32 would show
    # that delta comes from the result).
    make_case("peaked", 1, 9, 2, 16, norm=False, std=8.0, dtypes=FULL_PRECISION),
    make_case(
        "large_scores",
        1,
        9,
        2,
        16,
        rope=False,
        norm=False,
        std=0.5,
        mean=5.0,
        layout=_negate_queries_of_one_head,
        dtypes=HALF_PRECISION,
    ),
    make_case("strided", 2, 5, 2, 12, layout=strided),
    make_case("heads_first", 2, 5, 2, 12, layout=_heads_first),
    make_case("float16_weights", 2, 6, 2, 12, bias=True, vector_dtype=torch.float16, dtypes=FULL_PRECISION),
    make_case("width_64", 1, 33, 2, 64, norm=False),
    make_case("width_72", 1, 37, 2, 72),
    # Tiles of Triton are 16 to 128 rows: several of each kind, the last one with one row, or full.
    make_case("width_80_65_tokens", 1, 65, 1, 80),
    make_case("width_96_128_tokens", 1, 128, 1, 96, norm=False, std=1.0),
    make_case("width_128_two_heads", 1, 20, 2, 128, norm=False),
    make_case(
        "width_88_130_tokens", 1, 130, 1, 88, dtypes=HALF_PRECISION
    ),  # more keys than a CUDA block takes at a time
    # Several samples, heads or tiles: a bias differs in each head, and all samples and tokens add to its gradient.
    make_case("bias", 3, 5, 2, 10, norm=False, bias=True),
    make_case("bias_plain", 2, 6, 2, 7, rope=False, norm=False, bias=True),
    make_case("bias_width_72", 1, 70, 1, 72, norm=False, bias=True),
    make_case("bias_norm_width_64", 1, 33, 2, 64, bias=True),
    make_case("257_tokens", 1, 257, 1, 24, dtypes=HALF_PRECISION),  # one more than may stay in shared memory
    # The bias is that of the projection, which leaves it to the op unless parameters are partitioned.
    make_case("B", 32, 256, 12, 64, norm=False, bias=True, production=True, dtypes=FLOAT32_TOO),
    make_case("L", 32, 256, 16, 64, norm=False, bias=True, production=True, dtypes=TRAINED),
    make_case("XL", 128, 256, 16, 72, norm=False, production=True, dtypes=TRAINED),
    make_case("XL_bias", 128, 256, 16, 72, norm=False, bias=True, production=True),
    make_case("XL_norm", 32, 256, 16, 72, bias=True, production=True, dtypes=FLOAT32_TOO),
    make_case("1p6B", 16, 256, 28, 64, norm=False, bias=True, production=True, dtypes=TRAINED),
    make_case("XL_64_tokens", 64, 64, 16, 72, norm=False, bias=True, production=True, dtypes=TRAINED),
    make_case("XL_1024_tokens", 4, 1024, 16, 72, norm=False, bias=True, production=True, dtypes=FLOAT32_TOO),
    make_case("XL_1024_tokens_norm", 4, 1024, 16, 72, bias=True, production=True, dtypes=TRAINED),
    make_case("XL_ragged", 4, 250, 16, 72, production=True, dtypes=TRAINED),
    make_case("width_96", 4, 256, 12, 96, bias=True, production=True, dtypes=TRAINED),
    make_case("width_128", 4, 256, 9, 128, bias=True, production=True, dtypes=TRAINED),
)


def cost(qkv, cos, sin, q_weight=None, k_weight=None, eps=EPS, *, bias=None) -> Cost:
    samples, tokens, _, heads, width = qkv.shape
    result = nbytes(qkv) // 3
    gradients = nbytes(q_weight, k_weight, bias)
    constants = nbytes(cos, sin) + gradients
    product = 2 * samples * heads * tokens * tokens * width
    return Cost(
        forward_bytes=nbytes(qkv) + result + constants,
        # Read: qkv, the result and its gradient. Written: the gradient of qkv.
        backward_bytes=nbytes(qkv) + 2 * result + nbytes(qkv) + constants + gradients,
        forward_flops=2 * product,
        backward_flops=5 * product,
    )
