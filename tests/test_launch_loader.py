"""A step's samples depend on the step alone; readers end however reading ends."""

import errno
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice

import pytest
import torch

from common.seeds import generator
from launch.runtime import read_ahead
from launch.training.loader import BatchSplit, SampleOrder, micro_batches
from tests.children import alive, all_ended
from vavae.data import UnreadableImage


class Numbers:
    def __init__(self, count: int):
        self.count = count

    def __len__(self):
        return self.count

    def batch(self, epochs, indices):
        return {"epoch": epochs, "index": indices}


class Threaded(Numbers):
    """Notes who asks for what; fails where `broken` says."""

    threaded = True

    def __init__(self, count: int, broken: int | None = None):
        super().__init__(count)
        self.asked, self.threads, self.broken = [], set(), broken

    def batch(self, epochs, indices, *, pin_memory):
        self.threads.add(threading.current_thread().name)
        self.asked.append(pin_memory)
        if self.broken in indices.tolist():
            raise IndexError(f"sample {self.broken} is broken")
        return super().batch(epochs, indices)


def stream(count=10, batch=4, seed=3):
    return SampleOrder(count, batch, seed)


def test_every_epoch_is_a_permutation_and_none_is_dropped():
    order = stream(count=10, batch=4)
    pairs = [order.slice(step, 0, 4) for step in range(1, 11)]  # 40 positions: four whole epochs
    epochs, indices = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    permutations = [indices[epochs == e].tolist() for e in range(4)]
    assert all(sorted(p) == list(range(10)) for p in permutations)
    assert len({tuple(p) for p in permutations}) == 4


def test_an_epoch_is_torchs_permutation_made_once(monkeypatch):
    """The order is part of a run's identity: a checkpoint goes on with it. Steps may come in any order."""
    made, randperm = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **k: made.append(n) or randperm(n, **k))
    order = stream(count=10, batch=4, seed=3)
    got = {step: order.slice(step, 0, 4)[1] for step in (3, 1, 5, 2, 4)}  # both epochs meet in step 3
    assert len(made) == 2
    want = torch.cat([randperm(10, generator=generator(3, epoch)) for epoch in (0, 1)])
    assert torch.equal(torch.cat([got[step] for step in range(1, 6)]), want)


def test_the_seed_changes_the_order_and_nothing_else_does():
    first = stream(count=100, batch=50).slice(1, 0, 50)[1]
    later = stream(count=100, batch=50)
    for step in (9, 2, 5):
        later.slice(step, 0, 50)
    assert torch.equal(first, later.slice(1, 0, 50)[1])
    assert not torch.equal(first, stream(count=100, batch=50, seed=4).slice(1, 0, 50)[1])


@pytest.mark.parametrize(("world_size", "micro"), [(1, 12), (1, 3), (2, 6), (2, 2), (4, 1)])
def test_the_global_batch_does_not_depend_on_how_it_is_cut(world_size, micro):
    split = BatchSplit(12, world_size, micro)
    order = SampleOrder(50, 12, 0)
    parts = [order.slice(4, *split.bounds(m, r))[1] for m in range(split.accumulation) for r in range(world_size)]
    assert torch.equal(torch.cat(parts), SampleOrder(50, 12, 0).slice(4, 0, 12)[1])


def test_an_indivisible_batch_is_refused():
    with pytest.raises(ValueError, match="global_batch_size 10 is not a multiple of 2 processes × micro_batch_size 3"):
        BatchSplit(10, 2, 3)


def test_a_batch_of_several_epochs_goes_on_where_the_last_one_ended():
    order = stream(count=3, batch=8)
    epochs, indices = (torch.cat(parts) for parts in zip(*(order.slice(s, 0, 8) for s in (1, 2, 3)), strict=True))
    assert epochs.tolist() == [e for e in range(8) for _ in range(3)]
    assert all(sorted(indices[epochs == e].tolist()) == [0, 1, 2] for e in range(8))
    for start, stop in ((0, 0), (2, 3), (1, 8)):
        for part, whole in zip(order.slice(2, start, stop), (epochs, indices), strict=True):
            assert part.dtype == torch.int64 and torch.equal(part, whole[8 + start : 8 + stop])


@pytest.mark.parametrize("kind", [Numbers, Threaded])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_starting_late_gives_the_same_batches(num_workers, kind):
    split = BatchSplit(4, 2, 1)

    def run(first):
        order = SampleOrder(10, 4, 1)
        batches = micro_batches(
            kind(10), order, split, 1, first_step=first, last_step=9, num_workers=num_workers, pin_memory=False
        )
        return [b["index"].tolist() for b in batches]

    whole = run(1)
    order, keys = SampleOrder(10, 4, 1), [(step, micro) for step in range(1, 10) for micro in (0, 1)]
    assert whole == [order.slice(step, *split.bounds(micro, 1))[1].tolist() for step, micro in keys]
    assert run(4) == whole[3 * split.accumulation :]


def read(data, num_workers, pin_memory=False):
    order = SampleOrder(len(data), 2, 1)
    return micro_batches(
        data,
        order,
        BatchSplit(2, 1, 2),
        0,
        first_step=1,
        last_step=1000,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )


@pytest.mark.parametrize("pin_memory", [False, True])
def test_threads_read_two_batches_each_ahead(pin_memory):
    data = Threaded(100)
    batches = read(data, 3, pin_memory)
    next(batches)
    for coming in batches.gi_frame.f_locals["coming"]:
        coming.result()
    assert data.asked == [pin_memory] * 7
    assert all(name.startswith("loader") for name in data.threads)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("loader")]


def test_what_nobody_waits_for_is_not_begun(monkeypatch):
    """At the end two threads are held in a batch each; two more batches wait for them."""
    data, gate, shutdown = Threaded(100), threading.Event(), ThreadPoolExecutor.shutdown
    first = SampleOrder(100, 2, 1).slice(1, 0, 2)[1]
    plain = data.batch
    data.batch = lambda e, i, **k: (torch.equal(i, first) or gate.wait()) and plain(e, i, **k)

    def then_open(pool, wait=True, cancel_futures=False):
        shutdown(pool, wait=False, cancel_futures=cancel_futures)
        gate.set()
        shutdown(pool)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", then_open)
    batches = read(data, 2)
    next(batches)
    batches.close()
    assert len(data.asked) <= 1 + 2


def test_one_thread_reads_ahead_where_none_is_asked_for():
    data = Threaded(100)
    batches = read(data, 0)
    next(batches)
    for coming in batches.gi_frame.f_locals["coming"]:
        coming.result()
    assert len(data.asked) == 3 and len(data.threads) == 1 and data.threads != {threading.current_thread().name}


def test_readers_take_no_more_than_a_core_each_and_leave_the_others_to_the_step():
    class Counts(Threaded):
        def batch(self, epochs, indices, *, pin_memory):
            return {"threads": torch.get_num_threads()}

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert [batch["threads"] for batch in islice(read(Counts(100), 2), 6)] == [1] * 6
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class Broken(Numbers):
    """Reads in processes; fails at the sample `broken`."""

    def __init__(self, count: int, broken: int, error: Exception | None = None):
        super().__init__(count)
        self.broken, self.error = broken, error or IndexError(f"sample {broken} is broken")

    def batch(self, epochs, indices):
        if self.broken in indices.tolist():
            raise self.error
        return super().batch(epochs, indices)


@pytest.mark.parametrize("kind", [Broken, Threaded])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_arrives_with_the_batch_it_belongs_to(num_workers, kind):
    _, order = SampleOrder(10, 10, 1).slice(1, 0, 10)
    batches = read(kind(10, broken=int(order[5])), num_workers)
    assert [next(batches)["index"].tolist() for _ in range(2)] == order[:4].view(2, 2).tolist()
    with pytest.raises(IndexError, match=f"sample {int(order[5])} is broken"):
        next(batches)
    assert not multiprocessing.active_children()


class Unpicklable(ValueError):
    def __init__(self, file: str, line: int):
        super().__init__(f"{file}, line {line}")


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (UnreadableImage("a/b.png is no image"), UnreadableImage, "a/b.png is no image"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), OSError, "[Errno 28] No space left on device: 'x'"),
        (KeyError("image"), KeyError, "'image'"),
    ],
    ids=["image", "disk", "key"],
)
def test_a_process_hands_on_the_very_error(error, kind, text):
    with pytest.raises(kind) as raised:
        next(read(Broken(2, 0, error), 1))
    assert type(raised.value) is kind and str(raised.value) == text
    assert "in batch" in raised.value.__notes__[0], "and where it was raised, for whom a traceback is for"


def test_an_error_that_cannot_travel_is_told():
    with pytest.raises(RuntimeError, match=r"(?s)in batch.*Unpicklable: labels\.txt, line 3"):
        next(read(Broken(2, 0, Unpicklable("labels.txt", 3)), 1))


class Stuck(Numbers):
    """Reads of a file that never ends, from the second batch on; says which process reads."""

    def __init__(self, count: int = 100):
        super().__init__(count)
        self.reading = multiprocessing.get_context("fork").Semaphore(0)

    def batch(self, epochs, indices):
        if int(indices[0]) != int(SampleOrder(self.count, 2, 1).slice(1, 0, 1)[1]):
            self.reading.release()
            time.sleep(600)
        return {"reader": torch.tensor(os.getpid())}


def test_processes_that_are_reading_end_with_the_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(read_ahead, "SHARED_MEMORY", tmp_path)
    data, others = Stuck(), tmp_path / f"torch_{os.getpid()}_1_1"
    with pytest.raises(ZeroDivisionError), closing(read(data, 2)) as batches:
        reader = int(next(batches)["reader"])
        data.reading.acquire()
        readers = [process.pid for process in multiprocessing.active_children()]
        for path in (others, *(tmp_path / f"torch_{pid}_1_2" for pid in readers)):
            path.touch()  # as torch names memory that a process shares
        raise ZeroDivisionError
    assert reader in readers and len(readers) == 2 and not any(map(alive, readers))
    assert list(tmp_path.iterdir()) == [others]


@pytest.mark.parametrize(("number", "advice"), [(signal.SIGKILL, "memory runs out"), (signal.SIGBUS, "/dev/shm")])
def test_the_death_of_a_process_is_told_where_its_batches_are_asked_for(number, advice):
    batches = read(Numbers(100), 2)
    next(batches)
    victim = multiprocessing.active_children()[0].pid
    os.kill(victim, number)
    said = rf"loader process {victim} \(one of data\.num_workers 2\) was ended by {number.name}: .*{advice}"
    with pytest.raises(ChildProcessError, match=said):
        for _ in batches:
            pass
    assert not multiprocessing.active_children()


def test_a_launchers_signals_leave_processes_reading():
    """It sends them to every process below it, also to those that the last step still needs."""
    with closing(read(Numbers(100), 2)) as batches:
        list(islice(batches, 2))  # one of each
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGTERM)
            os.kill(process.pid, signal.SIGINT)
        assert len(list(islice(batches, 20))) == 20


def die_reading(data: Stuck, told) -> None:
    batches = read(data, 1)
    told.put(int(next(batches)["reader"]))
    data.reading.acquire()
    time.sleep(0.1)  # for the queue's thread
    os.kill(os.getpid(), signal.SIGKILL)


def test_processes_end_with_the_one_they_read_for():
    """Even while they read: nothing else would tell them."""
    context, data = multiprocessing.get_context("fork"), Stuck()
    told = context.Queue()
    parent = context.Process(target=die_reading, args=(data, told))
    parent.start()
    reader = told.get(timeout=60)
    parent.join(timeout=60)
    assert all_ended([reader], within=10) and parent.exitcode == -signal.SIGKILL


def test_a_thread_that_does_not_end_keeps_nobody_waiting(monkeypatch):
    monkeypatch.setattr(read_ahead, "CLOSE_TIMEOUT", 0.1)
    data, gate, first = Threaded(100), threading.Event(), SampleOrder(100, 2, 1).slice(1, 0, 2)[1]
    plain = data.batch
    data.batch = lambda e, i, **k: (torch.equal(i, first) or gate.wait()) and plain(e, i, **k)
    batches = read(data, 2)
    next(batches)
    batches.close()
    assert [t for t in threading.enumerate() if t.name.startswith("loader")], "it is still reading"
    gate.set()
