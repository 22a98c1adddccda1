"""Random numbers that depend on a seed and a place (step, epoch, index, purpose) only, so in any order and process.

The mixing function is splitmix64 (Steele, Lea and Flood, OOPSLA 2014, doi 10.1145/2660193.2660195).
"""

import torch

_MASK = 2**64 - 1

# Purposes: numbers for one are independent of those for another.
INITIAL_WEIGHTS, POSTERIOR_NOISE, CROP, EXTRACTION_NOISE = range(4)


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def mix(*words: int) -> int:
    """A 64-bit hash of integers in their order: each is mixed in on top of the hash of those before it."""
    state = 0
    for word in words:
        state = _splitmix64(state ^ _splitmix64(word & _MASK))
    return state


def generator(*words: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on `device` seeded by the hash of `words`."""
    return torch.Generator(device).manual_seed(mix(*words) >> 1)  # the sign bit is not the generator's
