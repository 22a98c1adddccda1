"""The watchdog of the main process, to which those of all others connect: it judges, speaks, and has all leave."""

import secrets
import time
from dataclasses import asdict
from functools import partial

from launch.runtime import exit_status
from launch.runtime.watchdog.base import Watchdog
from launch.runtime.watchdog.member import DIED, SILENT, Member
from launch.runtime.wire import Wire

CLAIM_DELAY = 0.3  # seconds that others wait for the main process to say an error that all of them may have met


class MainWatchdog(Watchdog):
    """See `Watchdog`. Messages to others: `{}` (a beat), `members`, `granted`, `leave`, and `left`."""

    def __init__(self, *args):
        super().__init__(*args)
        self.token = secrets.token_hex(16)
        self._members, self._peers = {0: self.own}, dict[int, Wire]()
        self._claims: dict[int, float] = {}  # rank → when it may be granted

    def wires(self) -> list[Wire]:
        return list(self._peers.values())

    def start(self) -> None:
        self.process.send({"port": self.own.port, "token": self.token})

    def introduced(self, wire: Wire, message: dict) -> None:
        if message.get("token") != self.token or "member" not in message:
            self.forget(wire)
            return
        member = Member(**message["member"])
        if member.rank in self._members:  # of another run, which found this one's store at a port that both were given
            self.forget(wire)
            return
        self._members[member.rank], self._peers[member.rank] = member, wire
        self.watch(wire, partial(self._from_peer, member), partial(self._peer_gone, member))
        if len(self._members) == self.settings.world_size:
            self.met = True
            everyone = [asdict(self._members[rank]) for rank in sorted(self._members)]
            for peer in self._peers.values():
                peer.quiet = 0.0
                peer.send({"members": everyone})
            self.process.send({"met": True})

    def _from_peer(self, member: Member, message: dict) -> None:
        if "claim" in message:
            self.claim(member.rank)
        if "lost" in message:
            self._peers.pop(member.rank, None)
            self.lost(member, message["lost"])
        if "left" in message:
            self.forget(self._peers.pop(member.rank))
            if not message["in_order"]:
                self._end(message["left"], message["reason"])

    def _peer_gone(self, member: Member) -> None:
        if self._peers.pop(member.rank, None) is not None:
            self.lost(member, DIED)

    def lost(self, member: Member, why: str) -> None:
        if not self.ending:
            self.speak(f"{member} {why}")
            self._end(exit_status.LOST_PEER, f"{member} {why}", member)

    def left(self, status: int, reason: str) -> None:
        self._end(status, reason, self.own)

    def part(self) -> None:
        self._peers = {}

    def _end(self, status: int, reason: str, gone: Member | None = None) -> None:
        """Have all leave but `gone`, which is lost or has left."""
        if self.ending:
            return
        self.ending = True
        lost = gone.rank if gone is not None and status == exit_status.LOST_PEER else None
        writer = min(self._peers, default=None) if lost == 0 else None
        for rank, wire in self._peers.items():
            wire.send({"leave": status, "reason": reason, "lost": lost, "record": rank == writer})
        if gone is not self.own:
            self.order(status, reason, record=True)
            if gone is not None:
                gone.kill()

    def give_up(self, reason: str) -> None:
        self.speak(reason)
        self._end(exit_status.LOST_PEER, reason)

    def claim(self, rank: int) -> None:
        self._claims[rank] = time.monotonic() + (CLAIM_DELAY if rank else 0.0)

    def tick(self, now: float) -> None:
        silent = [rank for rank, wire in self._peers.items() if wire.quiet > self.settings.timeout]
        if silent and self.met:
            self.lost(self._members[silent[0]], SILENT.format(self.settings.timeout))
        settled = self.spoken or self.ending
        if self._claims and (settled or min(self._claims.values()) <= now):
            winner = None if settled else min(self._claims)
            for rank in self._claims:
                wire = self._peers.get(rank) if rank else self.process
                if wire is not None:
                    wire.send({"granted": rank == winner})
            self._claims, self.spoken = {}, True
