"""Random numbers from a seed and a place (step, epoch, index): equal places give equal numbers, in any order.

The mixing function is splitmix64 (Steele, Lea and Flood, OOPSLA 2014, doi 10.1145/2660193.2660195).
"""

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = x + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mix(*words) -> np.ndarray:
    """A 64-bit hash of integers or integer arrays (broadcast together), taken in order → uint64 array.

    Each word passes through splitmix64 on top of the hash of those before it, so (1, 2) and (2, 1) differ.
    """
    state = np.zeros((), np.uint64)
    for word in words:
        # int64 first: negative values wrap instead of failing.
        state = _splitmix64(state ^ _splitmix64(np.asarray(word).astype(np.int64).astype(np.uint64)))
    return state


def torch_seed(*words: int) -> int:
    """The hash of `words` as `manual_seed` takes it: 63 bits, without a sign."""
    return int(mix(*words)) >> 1


def generator(*words: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on `device`, seeded with the hash of `words`."""
    return torch.Generator(device).manual_seed(torch_seed(*words))
