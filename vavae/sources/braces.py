"""Names written with braces, as shells expand them: `train-{000..137}.tar`, `{a,b}.tar`."""

import re
from itertools import product

MAX_NAMES = 1_000_000
_RANGE = re.compile(r"(-?[0-9]{1,18})\.\.(-?[0-9]{1,18})(?:\.\.([0-9]{1,18}))?")
_BRACES = re.compile(r"\{([^{}]*)\}")


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern stands for, in its order; of several braces the last one changes fastest.

    Braces hold a list, `{a,b}`, or a range of numbers, `{first..last}` or `{first..last..step}`, whose zeros in front
    are kept; not one another.

    Raises ValueError, naming the pattern, for other braces, or more than a million names.
    """
    pieces: list[list[str]] = []
    count, end = 1, 0
    for found in _BRACES.finditer(pattern):
        choices = _choices(found[1], pattern)
        count *= len(choices)
        if count > MAX_NAMES:
            raise _too_many(pattern)
        pieces += [[pattern[end : found.start()]], choices]
        end = found.end()
    pieces.append([pattern[end:]])
    if any(brace in piece for (piece, *_) in pieces[::2] for brace in "{}"):
        raise ValueError(f"{pattern}: a brace has no partner, or braces hold others; wanted are such as {{000..137}}")
    return ["".join(parts) for parts in product(*pieces)]


def _choices(inside: str, pattern: str) -> list[str]:
    if (found := _RANGE.fullmatch(inside)) is None:
        if "," not in inside:
            raise ValueError(
                f"{pattern}: {{{inside}}} is neither a range such as {{000..137}} nor a list such as {{a,b}}"
            )
        return inside.split(",")
    first, last = int(found[1]), int(found[2])
    step = int(found[3] or 1)
    if step == 0:
        raise ValueError(f"{pattern}: {{{inside}}} has a step of 0; allowed are steps from 1")
    if abs(last - first) // step >= MAX_NAMES:
        raise _too_many(pattern)
    padded = any(len(text.lstrip("-")) > 1 and text.lstrip("-").startswith("0") for text in found.group(1, 2))
    width = max(len(found[1]), len(found[2])) if padded else 0
    numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    return [f"{number:0{width}d}" for number in numbers]


def _too_many(pattern: str) -> ValueError:
    return ValueError(f"{pattern} stands for more than {MAX_NAMES:,} names")
