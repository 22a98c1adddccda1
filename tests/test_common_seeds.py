"""Random numbers from seeds: the hash is pinned, since published runs and checkpoints are repeated by it."""

import numpy as np
import pytest
import torch

from common.seeds import generator, mix, torch_seed


@pytest.mark.parametrize(
    "words, value",
    [
        ((), 0),
        ((0,), 0xA706DD2F4D197E6F),
        ((3, 2), 0x735514E0DF7E7D12),
        ((1, 2, 3), 0x882D1ACC8D6C3B48),
        ((-1, 2**40 + 5), 0x34B6485CA3537997),
    ],
)
def test_the_hash_is_pinned(words, value):
    assert int(mix(*words)) == value and torch_seed(*words) == value >> 1
    assert generator(*words).initial_seed() == value >> 1


def test_words_count_in_their_order_and_arrays_are_hashed_element_by_element():
    assert mix(1, 2) != mix(2, 1) and mix(0) != mix(0, 0) and mix(-1) != mix(1)
    assert np.array_equal(mix(3, np.arange(4)), [mix(3, i) for i in range(4)])
    assert torch.equal(torch.rand(3, generator=generator(1, 2)), torch.rand(3, generator=generator(1, 2)))
