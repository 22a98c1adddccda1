from kernels.rope_attention.cases import CASES as PRIMAL
from kernels.rope_attention.cases import EPS, FULL_PRECISION, make_case
from kernels.testing.cases import Cost, nbytes, with_tangents

#: More rows than the op's own: one or two of them decide the error of the tangent, and it is that of their scores.
PEAKED = make_case("peaked", 1, 12, 4, 16, norm=False, std=8.0, dtypes=FULL_PRECISION)
CASES = with_tangents(
    (*(case for case in PRIMAL if case.id != PEAKED.id), PEAKED),
    ("qkv",),
    production=("B", "XL", "XL_bias", "XL_norm", "XL_1024_tokens", "XL_1024_tokens_norm", "XL_ragged", "width_128"),
)


def cost(qkv, qkv_tangent, cos, sin, q_weight=None, k_weight=None, eps=EPS, *, bias=None) -> Cost:
    samples, tokens, _, heads, width = qkv.shape
    result = nbytes(qkv) // 3
    gradients = nbytes(q_weight, k_weight, bias)
    constants = nbytes(cos, sin) + gradients
    product = 2 * samples * heads * tokens * tokens * width
    return Cost(
        forward_bytes=nbytes(qkv, qkv_tangent) + 2 * result + constants,
        backward_bytes=nbytes(qkv) + 2 * result + nbytes(qkv) + constants + gradients,
        # Two for the result, four for the tangent: q_t·kᵀ, q·k_tᵀ, P_t·v, P·v_t.
        forward_flops=6 * product,
        backward_flops=5 * product,
    )
