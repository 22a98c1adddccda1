"""A step's samples depend on the step alone."""

import pytest
import torch

from launch.loader import SampleOrder, Split, micro_batches


class Numbers:
    def __init__(self, count: int):
        self.count = count

    def __len__(self):
        return self.count

    def batch(self, epochs, indices):
        return {"epoch": epochs, "index": indices}


def stream(count=10, batch=4, seed=3):
    return SampleOrder(count, batch, seed)


def test_every_epoch_is_a_permutation_and_none_is_dropped():
    order = stream(count=10, batch=4)
    pairs = [order.slice(step, 0, 4) for step in range(1, 11)]  # 40 positions: four whole epochs
    epochs, indices = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    permutations = [indices[epochs == e].tolist() for e in range(4)]
    assert all(sorted(p) == list(range(10)) for p in permutations)
    assert len({tuple(p) for p in permutations}) == 4


def test_the_seed_changes_the_order_and_nothing_else_does():
    first = stream(count=100, batch=50).slice(1, 0, 50)[1]
    later = stream(count=100, batch=50)
    for step in (9, 2, 5):
        later.slice(step, 0, 50)
    assert torch.equal(first, later.slice(1, 0, 50)[1])
    assert not torch.equal(first, stream(count=100, batch=50, seed=4).slice(1, 0, 50)[1])


@pytest.mark.parametrize(("world_size", "micro"), [(1, 12), (1, 3), (2, 6), (2, 2), (4, 1)])
def test_the_global_batch_does_not_depend_on_how_it_is_cut(world_size, micro):
    split = Split(12, world_size, micro)
    order = SampleOrder(50, 12, 0)
    parts = [order.slice(4, *split.bounds(m, r))[1] for m in range(split.accumulation) for r in range(world_size)]
    assert torch.equal(torch.cat(parts), SampleOrder(50, 12, 0).slice(4, 0, 12)[1])


def test_an_indivisible_batch_is_refused():
    with pytest.raises(ValueError, match="global_batch_size 10 is not a multiple of 2 processes × micro_batch_size 3"):
        Split(10, 2, 3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_starting_late_gives_the_same_batches(num_workers):
    split = Split(4, 2, 1)

    def run(first):
        order = SampleOrder(10, 4, 1)
        batches = micro_batches(Numbers(10), order, split, 1, first_step=first, last_step=9, num_workers=num_workers,
                                pin_memory=False)
        return [b["index"].tolist() for b in batches]

    whole = run(1)
    assert len(whole) == 9 * split.accumulation
    assert run(4) == whole[3 * split.accumulation :]
