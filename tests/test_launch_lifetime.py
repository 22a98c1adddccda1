"""How a process takes signals: kept for a loop to see, passed on, or ending it at once."""

import multiprocessing
import os
import signal
import threading
import time

import pytest

import launch.__main__ as program
from launch.runtime import exit_status, lifetime
from launch.runtime.lifetime import StopRequest
from tests.children import exit_code

_fork = multiprocessing.get_context("fork")


class Clock:
    """Of the thread that reads signals, in place of `time`: the second signal comes `pause` seconds after the first."""

    def __init__(self, pause: float):
        self.times, self.first, self.second = iter([0.0, pause]), threading.Event(), threading.Event()

    def monotonic(self) -> float:
        (self.second if self.first.is_set() else self.first).set()
        return next(self.times)

    def then_send(self, number: int) -> None:
        """Have a signal come once the first one has been read."""
        threading.Thread(target=lambda: self.first.wait(60) and os.kill(os.getpid(), number)).start()


def _get(numbers, pause: float, blocked: bool, at_once: bool = False) -> None:
    """Get two signals in a process that would go on after the first, and blocks its main thread after it or not."""
    lifetime.time = clock = Clock(pause)
    with StopRequest(lambda number: os._exit(exit_status.of_signal(number)), at_once=at_once) as stop:
        try:
            os.kill(os.getpid(), numbers[0])
            assert clock.first.wait(60)
            time.sleep(0.01)
            assert not at_once
        except KeyboardInterrupt:
            assert at_once
        clock.then_send(numbers[1])
        if blocked:
            _hold_main_thread()
        assert clock.second.wait(60)
        assert stop.number == numbers[0]
    assert all(signal.getsignal(number) is signal.SIG_IGN for number in lifetime.STOP_SIGNALS)  # it is leaving
    os._exit(7)


def _hold_main_thread() -> None:
    """As in a collective: Python's handlers do not run."""
    signal.pthread_sigmask(signal.SIG_BLOCK, lifetime.STOP_SIGNALS)  # they reach other threads
    time.sleep(60)


@pytest.mark.parametrize(
    ("numbers", "pause", "at_once", "status"),
    [
        ((signal.SIGINT, signal.SIGINT), 0.1, False, 7),
        ((signal.SIGINT, signal.SIGINT), 0.8, False, 130),
        ((signal.SIGTERM, signal.SIGINT), 0.8, False, 130),
        ((signal.SIGUSR1, signal.SIGTERM), 0.8, False, 7),
        ((signal.SIGTERM, signal.SIGTERM), 0.8, False, 7),
        ((signal.SIGINT, signal.SIGINT), 0.1, True, 7),  # KeyboardInterrupt once
    ],
)
def test_a_second_ctrl_c_ends_at_once_and_copies_do_not(numbers, pause, at_once, status):
    assert exit_code(_fork.Process(target=_get, args=(numbers, pause, False, at_once))) == status


@pytest.mark.parametrize("at_once", [False, True])
def test_a_second_ctrl_c_ends_a_process_whose_main_thread_waits_for_ever(at_once):
    process, begin = _fork.Process(target=_get, args=((signal.SIGINT,) * 2, 0.8, True, at_once)), time.monotonic()
    assert exit_code(process) == 130 and time.monotonic() - begin < 30


def _be_blocked(argv: list[str]) -> int:
    """A program that is interrupted in C, and so is what it does then."""
    lifetime.COPY_SECONDS = 0.0
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    except KeyboardInterrupt:
        threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
        _hold_main_thread()
    return 7


def _run_blocked() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever tests before this one have left
    program.main = _be_blocked
    program.run([])


def test_a_second_ctrl_c_ends_a_program_that_trains_nothing():
    begin = time.monotonic()
    assert exit_code(_fork.Process(target=_run_blocked)) == 130 and time.monotonic() - begin < 30


def test_a_block_that_an_exception_ends_leaves_signals_as_they_were():
    """And the signal that it kept may come again, for whoever is next."""
    got, number = [], signal.SIGUSR1
    former = signal.signal(number, lambda *args: got.append(args[0]))
    try:
        before = [signal.getsignal(each) for each in lifetime.STOP_SIGNALS]
        with pytest.raises(KeyError), (stop := StopRequest(os._exit)):
            signal.raise_signal(number)
            assert stop.number == number
            raise KeyError
        assert [signal.getsignal(each) for each in lifetime.STOP_SIGNALS] == before and not got
        stop.pass_on()
        assert got == [number]
    finally:
        signal.signal(number, former)


@pytest.mark.parametrize(
    ("numbers", "agreed"),
    [
        ((None, None), None),
        ((None, signal.SIGTERM), signal.SIGTERM),
        ((signal.SIGUSR1, signal.SIGTERM), signal.SIGUSR1),
        ((signal.SIGTERM, signal.SIGINT), signal.SIGINT),
    ],
)
def test_processes_agree_on_the_signal_of_a_person_first(numbers, agreed):
    stops = [StopRequest(os._exit) for _ in numbers]
    votes = []
    for stop, number in zip(stops, numbers, strict=True):
        stop.number = number
        stop.agree(lambda vote: votes.append(vote) or vote)
    for stop, number in zip(stops, numbers, strict=True):
        stop.number = number
        assert stop.agree(lambda vote: max(votes)) == agreed and stop.number == agreed
