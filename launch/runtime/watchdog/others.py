"""The watchdogs of all processes but the main one: they report to its watchdog, and take its place where it is lost."""

import json
import socket
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace

from launch.runtime import exit_status
from launch.runtime.watchdog.base import Watchdog
from launch.runtime.watchdog.member import DIED, SILENT, Member
from launch.runtime.wire import Wire

CONNECT_TIMEOUT = 20.0  # seconds that the main process's machine has to answer
PROBE_TIMEOUT = 2.0  # seconds that the watchdog of a lower rank has to answer
LINGER = 4.0  # seconds that a watchdog which spoke in place of the main one's still answers others


class PeerWatchdog(Watchdog):
    """See `Watchdog`. Messages to the main process's: `{}` (a beat), `member`, `claim`, `lost`, and `left`."""

    def __init__(self, *args):
        super().__init__(*args)
        self._main: Wire | None = None  # None once the main process has left in order
        self._members: list[Member] = []
        self._why_lost = ""  # of the main process
        self._heard = ""  # why another one has lost it, and may have killed it by now
        self._speaks: bool | None = None  # whether this one speaks in its place, once that is known

    def wires(self) -> list[Wire]:
        return [self._main] if self._main is not None else []

    def start(self) -> None:
        where = (self.settings.address, self.settings.port)
        try:
            connection = socket.create_connection(where, timeout=CONNECT_TIMEOUT)
        except OSError as e:
            self.give_up(f"{self.own} cannot reach the watchdog of rank 0 at {where[0]}:{where[1]} ({e})")
            return
        local = connection.getsockname()[0].removeprefix("::ffff:")
        here = local.startswith("127.") or local == "::1"  # the main process's machine
        self.own = replace(self.own, address=self.settings.address if here else local)
        self._main = Wire(connection)
        self._main.send({"token": self.settings.token, "member": asdict(self.own)})
        self.watch(self._main, self._from_main, lambda: self._main_lost(DIED))

    def introduced(self, wire: Wire, message: dict) -> None:
        """Another asks whether this one answers: then this one speaks, or one below it."""
        if message.get("token") == self.settings.token:
            wire.send({"here": self.settings.rank})
            self._heard = self._heard or str(message.get("lost", ""))
        self.unwatch(wire)
        wire.finish()

    def _from_main(self, message: dict) -> None:
        if "members" in message:
            self.met, self._members = True, [Member(**member) for member in message["members"]]
            self.process.send({"met": True})
        if "granted" in message:
            self.process.send(message)
        if "leave" in message:
            self._forget_main()
            self.order(message["leave"], message["reason"], record=message["record"])
            if message[
                "lost"
            ]:  # not rank 0, whose watchdog has sent this: it sees to its process, and has others to tell
                self._members[message["lost"]].kill()
        if "left" in message:
            self._forget_main()

    def _forget_main(self) -> None:
        if self._main is not None:
            self.forget(self._main)
            self._main = None

    def lost(self, member: Member, why: str) -> None:
        if self._main is not None:
            self._main.send({"lost": why})
        elif not self.ending:
            self.speak(f"{member} {why}")

    def claim(self, rank: int) -> None:
        if self._main is not None:
            self._main.send({"claim": True})
        else:  # the main process has left in order, or it is lost, and that is the error to say
            self.process.send({"granted": not self.ending})

    def left(self, status: int, reason: str) -> None:
        if self._main is not None:
            self._main.send({"left": status, "in_order": False, "reason": reason})

    def part(self) -> None:
        self._main = None

    def tick(self, now: float) -> None:
        if self._main is not None and self.met and self._main.quiet > self.settings.timeout:
            self._main_lost(SILENT.format(self.settings.timeout))
        if self._speaks is not None and self._why_lost:
            main, self._why_lost, reason = self._members[0], "", f"{self._members[0]} {self._why_lost}"
            if self._speaks:
                self.speak(reason)
            self.order(exit_status.LOST_PEER, reason, record=self._speaks, after=LINGER if self._speaks else 0.0)
            main.kill()

    def _main_lost(self, why: str) -> None:
        if self._main is None:
            return
        self._forget_main()
        if not self._members:
            self.give_up(f"rank 0 {why}")
        elif not self.ending:
            self.ending, self._why_lost = True, self._heard or why
            lower = self._members[1 : self.settings.rank]
            threading.Thread(target=self._ask_lower, args=[lower], daemon=True).start()

    def _ask_lower(self, lower: Sequence[Member]) -> None:
        self._speaks = not answers(lower, self.settings.token, self._why_lost)


def answers(members: Sequence[Member], token: str, why: str) -> bool:
    """Whether the watchdog of any of these processes answers. Of a machine that does not, one is tried.

    why: the main process is lost, which it is told.
    """
    message = json.dumps({"token": token, "lost": why}).encode() + b"\n"
    silent = set()
    for member in members:
        if member.host in silent:
            continue
        try:
            with socket.create_connection((member.address, member.port), timeout=PROBE_TIMEOUT) as connection:
                connection.settimeout(PROBE_TIMEOUT)
                connection.sendall(message)
                if connection.recv(64):
                    return True
        except TimeoutError:
            silent.add(member.host)
        except OSError:
            pass
    return False
