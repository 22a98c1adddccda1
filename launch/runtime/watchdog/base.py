"""What the watchdogs of all processes do: look after their own process, beat, and have it leave."""

import os
import selectors
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from launch.runtime import exit_status, process_table
from launch.runtime.lifetime import EXIT_TIMEOUT
from launch.runtime.watchdog.member import DIED, STOPPED, Member, Settings
from launch.runtime.wire import Wire

TICK = 0.25  # seconds between looks at the own process
MEETING_TIMEOUT = 120.0  # seconds that watchdogs wait for each other at the start
LEAVE_GRACE = 10.0  # seconds after which a process that was told to leave is killed
LEFT_GRACE = EXIT_TIMEOUT + LEAVE_GRACE  # the same of one that said that it leaves
INTRODUCTION = 10.0  # seconds that whoever connects has to say who it is


class Watchdog(ABC):
    """Watch one process of a run until it leaves.

    Messages to the process: `port` and `token` (of the main one's watchdog), `met`, `granted` (whether it is to say the
    error it met), `leave` (the status to leave with, `reason`, and whether to `record` it). From it: `claim` (it met an
    error), `left` (the status it leaves with, `in_order` where all agreed on that, else its `reason`).

    Args:
        process: the connection to the process.
        say: prints the one message of a run that ends as a process was lost.
    """

    def __init__(self, settings: Settings, process: Wire, say: Callable[[str], None]):
        self.settings, self.process, self._say = settings, process, say
        self.listener = _listen(settings.world_size + 16)
        self.own = Member.of(settings, self.listener.getsockname()[1])
        self.met, self._meet_until = False, time.monotonic() + MEETING_TIMEOUT
        self.ending = False  # all are told to leave
        self.spoken = False  # the one message was said, here or by a process that was granted it
        self._selector, self._done = selectors.DefaultSelector(), False
        self._left = False  # the process has said that it leaves
        self._handlers: dict[Wire, tuple[Callable[[dict], None], Callable[[], None]]] = {}
        self._strangers: dict[Wire, float] = {}  # seconds since they connected
        self._order: dict[str, Any] = {}
        self._order_at = self._kill_at = float("inf")
        self._stopped, self._last, self._next_beat = 0.0, time.monotonic(), 0.0

    # --- of the main process's watchdog, and of the others

    @abstractmethod
    def wires(self) -> list[Wire]:
        """The connections to other watchdogs."""

    @abstractmethod
    def start(self) -> None:
        """Begin to meet the other watchdogs."""

    @abstractmethod
    def lost(self, member: Member, why: str) -> None:
        """A process is lost: see that it is said once, and that all leave."""

    @abstractmethod
    def claim(self, rank: int) -> None:
        """A process asks whether it is the one to say an error."""

    @abstractmethod
    def left(self, status: int, reason: str) -> None:
        """The own process leaves with an error: have the others leave."""

    @abstractmethod
    def part(self) -> None:
        """Forget the connections of `wires`, which are closed: the own process has left."""

    @abstractmethod
    def introduced(self, wire: Wire, message: dict) -> None:
        """The first message of a watchdog that has connected to this one."""

    @abstractmethod
    def tick(self, now: float) -> None:
        """What is due."""

    # --- the loop

    def run(self) -> None:
        """Watch until the process has left."""
        self.watch(self.process, self._from_process, self._process_gone)
        with suppress(AttributeError, OSError):  # no Linux of the last years: the connection tells, too
            handle = os.pidfd_open(self.settings.pid)
            self._selector.register(handle, selectors.EVENT_READ, self._process_gone)
        self._selector.register(self.listener, selectors.EVENT_READ, self._accept)
        self.start()
        while not self._done:
            for key, _ in self._selector.select(TICK):
                if not self._done:
                    key.data()
            self._tick()
        for wire in self.wires():
            wire.finish()

    def watch(self, wire: Wire, on_message: Callable[[dict], None], on_close: Callable[[], None]) -> None:
        """Have what comes over a connection from now on handled so, also what came together with the last message."""
        if wire not in self._handlers:
            self._selector.register(wire.socket, selectors.EVENT_READ, partial(self._read, wire))
        self._handlers[wire] = on_message, on_close

    def _read(self, wire: Wire) -> None:
        messages = wire.receive()
        for message in messages or ():
            if wire in self._handlers:  # no message before this one had it forgotten
                self._handlers[wire][0](message)
        if messages is None and wire in self._handlers:
            _, on_close = self._handlers[wire]
            self.forget(wire)
            on_close()

    def unwatch(self, wire: Wire) -> None:
        """Hear no more of a connection; it stays open."""
        self._handlers.pop(wire, None)
        self._strangers.pop(wire, None)
        with suppress(KeyError, ValueError):
            self._selector.unregister(wire.socket)

    def forget(self, wire: Wire) -> None:
        """Close a connection."""
        self.unwatch(wire)
        wire.socket.close()

    def _tick(self) -> None:
        # Time in which this process did not run either (a suspended terminal, a machine that slept) is no silence.
        now, former = time.monotonic(), self._last
        elapsed, self._last = min(now - former, 4 * TICK, self.settings.timeout / 4), now
        if now >= self._next_beat:
            self._next_beat = now + min(1.0, self.settings.timeout / 4)
            for wire in self.wires():
                wire.send({})
        for wire in self.wires():
            wire.quiet += elapsed
        self._dismiss_strangers(elapsed)
        self._look_at_process(elapsed)
        if not self.met and now > self._meet_until and not self.ending and not self._left:
            self.give_up(f"{self.own}: not all processes of the run have met within {MEETING_TIMEOUT:g} s")
        self.tick(now)
        if now >= self._order_at:
            self.process.send(self._order)
            self._order_at, self._kill_at = float("inf"), now + LEAVE_GRACE
        if now >= self._kill_at:
            self.own.kill_process()
            self._done = True

    def _accept(self) -> None:
        try:
            wire = Wire(self.listener.accept()[0])
        except OSError:  # gone again, or no descriptor is free: then the listener stays ready, at once
            time.sleep(TICK)
            return
        self._strangers[wire] = 0.0
        self.watch(wire, partial(self._introduce, wire), lambda: None)

    def _introduce(self, wire: Wire, message: dict) -> None:
        self._strangers.pop(wire, None)
        self.introduced(wire, message)

    def _dismiss_strangers(self, elapsed: float) -> None:
        for wire in list(self._strangers):
            self._strangers[wire] += elapsed
            if self._strangers[wire] > INTRODUCTION:
                self.forget(wire)

    # --- the own process

    def _from_process(self, message: dict) -> None:
        if "claim" in message:
            self.claim(self.settings.rank)
        if "left" in message:
            if message["in_order"]:
                for wire in self.wires():
                    wire.send(message)
            else:
                self.left(message["left"], message["reason"])
            self._see_off()

    def _see_off(self) -> None:
        """The process leaves, and the others know: see that it does. Where what blocks holds Python's lock, the
        process's own timer cannot."""
        if self._left:
            return
        self._left, self._kill_at = True, time.monotonic() + LEFT_GRACE
        for wire in self.wires():
            self.unwatch(wire)
            wire.finish()
        self.part()
        self._selector.unregister(self.listener)
        self.listener.close()

    def _process_gone(self) -> None:
        if self.process in self._handlers:  # what it said last may have come together with its end
            self._read(self.process)
        if not self._order and not self._left and not self._done:
            self.lost(self.own, DIED)
        self._done = True

    def _look_at_process(self, elapsed: float) -> None:
        self._stopped = self._stopped + elapsed if process_table.is_stopped(self.settings.pid) else 0.0
        if self._stopped > self.settings.timeout and not self._done:
            if not self._left:
                self.lost(self.own, STOPPED.format(self.settings.timeout))
            self.own.kill_process()
            self._done = True

    def speak(self, reason: str) -> None:
        """Print the one message."""
        if not self.spoken:
            self._say(f"error: {reason}; all processes of this run end with status {exit_status.LOST_PEER}")
        self.spoken = True

    def order(self, status: int, reason: str, *, record: bool, after: float = 0.0) -> None:
        """Have the own process leave, in `after` seconds."""
        self.ending = True
        if not self._order:
            self._order = {"leave": status, "reason": reason, "record": record}
            self._order_at = time.monotonic() + after

    def give_up(self, reason: str) -> None:
        """End where the watchdogs cannot do their work."""
        self.speak(reason)
        self.order(exit_status.LOST_PEER, reason, record=self.settings.rank == 0)


def _listen(backlog: int) -> socket.socket:
    """A server's socket on a port of the system's choice, by IPv6 and IPv4 where there are both."""
    try:
        server = socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    except (OSError, ValueError):
        server = socket.create_server(("", 0), backlog=backlog)
    server.setblocking(False)
    return server
