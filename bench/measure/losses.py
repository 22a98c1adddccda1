"""Checks of the first losses of training steps. Needs no torch, as `bench.triage` checks with it too."""

from collections.abc import Mapping

#: Whose first loss those of the same objective are compared with.
LOSS_BASELINES = ("plain-eager", "plain-compile", "plain-meanflow")
#: How far the loss of the first step may be from the plain model's in float32: bfloat16 keeps 8 bits.
LOSS_TOLERANCE = 0.02


def wrong_losses(losses: Mapping[str, float | None]) -> dict[str, str]:
    """Variant → what is wrong with its first loss, next to the plain model's; the trainer draws noise of its own.

    losses: of variants of one objective.
    """
    plain = next((losses[name] for name in LOSS_BASELINES if losses.get(name) is not None), None)
    if plain is None:
        return {}
    return {
        name: f"the first loss is {loss:.5f}, the plain model's {plain:.5f}"
        for name, loss in losses.items()
        if loss is not None and not abs(loss - plain) <= LOSS_TOLERANCE * abs(plain)
    }
