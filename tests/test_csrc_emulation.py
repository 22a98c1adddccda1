"""The emulation finds each kind of mistake in a kernel, names where it is, and lets the same kernel without it pass."""

import pytest
import torch

from kernels.testing import emulation
from tests.emulated import ORDERS, SOURCES, emulated, under

pytestmark = pytest.mark.skipif(bool(emulation.reasons()), reason="; ".join(emulation.reasons()))
NEXT = (torch.arange(64) + 1.0) % 64
#: Kernel → what it puts out where it is right.
RIGHT = {
    "write_read": NEXT,
    "read_write": torch.cat([NEXT, NEXT + 100]),
    "within_warp": (torch.arange(32) ^ 1).float(),
    "shuffle_for_barrier": (torch.arange(32) ^ 1).float(),
    "shuffle_mask": torch.tensor([16.0] * 16 + [1.0] * 16),
    "shuffle_outside": torch.cat([torch.arange(16) ^ 8, torch.arange(16, 32)]).float(),
    "diverged_shuffle": (torch.arange(32) ^ 1).float(),
    "early_return": torch.arange(63.0, -1, -1),
    "two_barriers": torch.ones(64),
    "past_the_end": torch.arange(64.0),
    "dynamic_past_the_end": torch.arange(64.0),
    "vector_past_the_end": torch.arange(0.0, 65, 4),
    "misaligned": torch.arange(0.0, 64, 4),
    "unwaited_copy": torch.arange(32.0),
    "all_write": torch.ones(1),
    "blocks_write": torch.ones(2),
}
#: Kernel → what the error says, and which of its words.
REPORTED = {
    "shuffle_mask": ("waits for lanes that never come: 16 17", "names lane"),
    "shuffle_outside": ("reads lane", "not in its mask"),
    "diverged_shuffle": ("while lane", "waits in __shfl_xor_sync"),
    "early_return": ("returned before a barrier that others wait at",),
    "two_barriers": ("waits at another barrier",),
    "past_the_end": ("shared memory out of bounds: elements 64 to 64 of 64", "thread (63, 0, 0)"),
    "dynamic_past_the_end": ("more dynamic shared memory taken than the launch has",),
    "misaligned": ("load from a misaligned address",),
}
#: Kernels whose results are wrong in one order of the threads or another.
WRONG = ("write_read", "read_write", "within_warp", "unwaited_copy")
#: Kernels whose results may be right in every order, and yet threads race.
RACES = ("write_read", "read_write", "within_warp", "shuffle_for_barrier", "all_write", "blocks_write")


def run(name: str, wrong: bool, order: str = "shuffled", seed: int = 0) -> torch.Tensor:
    source, out = torch.arange(128.0), torch.full_like(RIGHT[name], torch.nan)
    library = emulated("mistakes")
    library.set_order(order, seed)
    library(name, wrong, source, out)
    return out


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", RIGHT)
def test_without_the_mistake_nothing_is_found(name, order):
    assert torch.equal(run(name, wrong=False, order=order), RIGHT[name])


@pytest.mark.parametrize("name", REPORTED)
def test_the_mistake_is_reported_with_its_place(name):
    for order in ORDERS:
        with pytest.raises(RuntimeError) as error:
            run(name, wrong=True, order=order)
        message = str(error.value)
        assert any(words in message for words in REPORTED[name]), message
        assert message.startswith(f"{name}: ") and "block (0, 0, 0), thread (" in message, message
        assert "mistakes.cu:" in message, message
    run(name, wrong=False)  # a launch that failed leaves nothing behind


@pytest.mark.parametrize("name", WRONG)
def test_the_mistake_shows_in_the_results_of_some_order(name):
    assert any(not torch.equal(run(name, wrong=True, order=order), RIGHT[name]) for order in ORDERS)


def test_orders():
    """A missing barrier shows when a thread runs before the one it reads from, in one order and not in another."""
    assert torch.equal(run("write_read", True, "descending")[:-1], NEXT[:-1])
    assert run("write_read", True, "ascending").isnan().sum() == 63, "shared memory starts as NaN"
    some = [run("write_read", True, "shuffled", seed) for seed in (1, 1, 2)]
    assert torch.equal(some[0].isnan(), some[1].isnan()) and not torch.equal(some[0].isnan(), some[2].isnan())


#: Runs kernels of a library, named by words such as "write_read:wrong", without torch, whose import takes long under a
#: sanitizer. The 65 numbers that go in lie in memory of their own, which the sanitizer knows the end of.
PROGRAM = """
import ctypes, sys
library, libc = ctypes.CDLL(sys.argv[1]), ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
inputs, out = (ctypes.c_void_p(libc.malloc(size)) for size in (65 * 4, 4096))
for word in sys.argv[2:]:
    name, _, kind = word.partition(":")
    print("kernel", word, file=sys.stderr, flush=True)
    getattr(library, "run_" + name)(kind == "wrong", inputs, out)
"""


def findings(mode: str, *words: str, halt: bool) -> dict[str, str]:
    """What the sanitizer says about each run that is reached."""
    path = emulation.library([SOURCES / "mistakes.cu"], mode)
    done = under(mode, "-c", PROGRAM, str(path), *words, halt=halt)
    return dict(part.partition("\n")[::2] for part in done.stderr.split("kernel ")[1:])


def test_thread_sanitizer_finds_every_race():
    kinds = ("right", "wrong")
    found = findings("thread", *(f"{name}:{kind}" for name in RACES for kind in kinds), halt=False)
    for name in RACES:
        right, wrong = (found[f"{name}:{kind}"] for kind in kinds)
        assert "data race" not in right, right[:2000]
        assert "data race" in wrong and "mistakes.cu" in wrong, f"{name}: nothing found"


def test_address_sanitizer_finds_a_vector_beyond_the_end():
    name = "vector_past_the_end"
    assert torch.equal(run(name, wrong=True)[:-1], RIGHT[name][:-1]), "the plain build does not see it"
    found = findings("address", f"{name}:right", f"{name}:wrong", halt=True)
    assert "AddressSanitizer" not in found[f"{name}:right"]
    assert "heap-buffer-overflow" in found[f"{name}:wrong"] and "mistakes.cu" in found[f"{name}:wrong"]


@pytest.mark.parametrize("mode", ["address", "thread"])
def test_ops_are_clean(mode):
    """The small cases of every op that has CUDA kernels, forward and backward."""
    import kernels

    names = [name for name, op in kernels.OPS.items() if "emulated" in op.backends]
    done = under(mode, "-m", "tests.sanitized_ops", *names, halt=True)
    assert done.returncode == 0, done.stderr[-4000:]
    counts = dict(line.split() for line in done.stdout.splitlines())
    assert set(counts) == set(names) and all(int(count) for count in counts.values()), counts
