import torch

from kernels.testing.cases import Case, Cost, Draw, nbytes, strided


def _case(
    name: str,
    numbers: int,
    *,
    step=3,
    weight_decay=0.1,
    betas=(0.9, 0.95),
    ema_decay=0.9,
    copied=True,
    skip=False,
    offset=0,
    gaps=False,
    production=False,
) -> Case:
    """The dtype of the case is that of `grad`, and of the states where that is wider than float32.

    With an `offset` the gradient and the states begin that many elements after a multiple of 16 bytes, as parts of a
    larger buffer may; with `gaps` those of the gradient do not follow one another in memory.
    """

    def make(draw: Draw) -> dict:
        state_dtype = torch.float64 if draw.dtype == torch.float64 else torch.float32
        scalar = torch.zeros((), device=draw.device)
        grad = draw.normal(numbers + offset, mean=0.1)[offset:]
        if skip:
            grad[::2] = float("nan")
        return {
            "param": draw.normal(numbers, dtype=state_dtype),
            "grad": strided(grad) if gaps else grad,
            "exp_avg": draw.normal(numbers + 2 * offset, std=0.3, dtype=state_dtype)[2 * offset :],
            "exp_avg_sq": draw.normal(numbers, dtype=state_dtype).square_(),
            "ema": draw.normal(numbers, dtype=state_dtype),
            "step": scalar + step,
            "lr": scalar + 1e-2,
            "betas": betas,
            "eps": 1e-4,  # large enough to be seen
            "weight_decay": weight_decay,
            "ema_decay": ema_decay,
            "grad_scale": scalar + 0.37,
            "skip": scalar.bool() ^ skip,
            "bf16_param": draw.normal(numbers, dtype=torch.bfloat16) if copied else None,
        }

    return Case(name, make, production)


CASES = (
    _case("one_number", 1),
    _case("first_step", 37, step=1, betas=(0.9, 0.999)),
    _case("no_copy", 129, copied=False),
    _case("no_decay", 1000, weight_decay=0.0, ema_decay=0.9999),
    _case("late", 4099, step=50_000),
    _case("no_momentum", 65, betas=(0.0, 0.9)),
    _case("skipped", 131, skip=True),
    _case("skipped_blocks", 2500, skip=True),
    _case("whole_blocks", 3072, ema_decay=0.3),
    _case("unaligned", 2051, offset=1),
    _case("gradient_with_gaps", 300, gaps=True),
    _case("XL_eighth", 675_256_736 // 8, weight_decay=0.0, ema_decay=0.9999, production=True),
    _case("XL_eighth_no_copy", 675_256_736 // 8, weight_decay=0.0, ema_decay=0.9999, copied=False, production=True),
    _case("ragged", 1_000_003, production=True),
    _case("ragged_unaligned", 1_000_003, offset=1, production=True),
)


def cost(param, grad, exp_avg, exp_avg_sq, ema, *, bf16_param=None, **numbers) -> Cost:
    return Cost(forward_bytes=nbytes(grad) + 2 * nbytes(param, exp_avg, exp_avg_sq, ema) + nbytes(bf16_param))
