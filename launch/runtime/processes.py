"""The processes of a run: their rendezvous, and collectives on host values."""

import itertools
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from launch.runtime import exit_status
from launch.runtime.launcher import LaunchEnvironment, LaunchError, launch_environment

log = logging.getLogger(__name__)
RENDEZVOUS_TIMEOUT = timedelta(minutes=10)  # that the first process waits for the last
ANNOUNCE_TIMEOUT = 3.0  # seconds in which the others learn that a process failed before it met them
ANNOUNCE_PATIENCE = 60.0  # seconds in which the process of rank 0, which is told first, may still come
hurry = threading.Event()  # set where this process is not to wait for it any more
_meeting = False  # whether this process has begun to meet the others, or to tell them that it will not
_FAILED, _ARRIVED, _TOLD = "launch/failed", "launch/arrived", "launch/told"
HOSTNAME_TIMEOUT = 60.0  # seconds that a name may take to become known

Result = TypeVar("Result")


class PeerFailedError(LaunchError):
    """Another process of the run failed, with `status`, before all had met; it has said why."""

    def __init__(self, status: int, reason: str):
        super().__init__(f"another process of the run failed: {reason}")
        self.status_of_peer = status


class NoMeetingError(LaunchError):
    """Another process of the run did not come: one that was killed as it started, say."""

    exit_status = exit_status.LOST_PEER


class PortInUseError(LaunchError):
    """The port of the run's meeting is another's."""

    exit_status = exit_status.IN_USE


@dataclass(frozen=True)
class Processes:
    """The process group as one of its processes sees it."""

    rank: int
    world_size: int
    device: torch.device

    # Host-side agreement must not wait for the GPU, so it has a group of its own.
    host_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_max(self, value: int) -> int:
        """The largest of all processes' values."""
        if self.world_size == 1:
            return value
        votes = torch.tensor(value)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.host_group)
        return int(votes)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return bool(self.all_reduce_max(int(flag)))

    def broadcast(self, value):
        """The main process's value (any picklable), on every process."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def all_gather(self, value) -> list:
        """Every process's value (any picklable), by rank, on every process."""
        box = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(box, value, group=self.host_group)
        return box

    def raise_on_all(self, error: Exception | None) -> None:
        """Raise the main process's error, where it met one, on every process; it is the main one that says it."""
        error = self.broadcast(error)
        if error is not None:
            error.reported_by_main = True
            raise error

    def on_main(self, function: Callable[[], Result]) -> Result:
        """What `function` returns on the main process, which alone calls it, on every process; it raises on all."""
        result = error = None
        if self.is_main:
            try:
                result = function()
            except Exception as e:
                error = e
        self.raise_on_all(error)
        return self.broadcast(result)

    def barrier(self) -> None:
        """Wait for all processes."""
        self.any(False)


def local_gpu(env: LaunchEnvironment | None) -> int:
    """The index of this process's GPU; raises LaunchError where this machine has no such GPU."""
    index, count = env.local_rank if env else 0, torch.cuda.device_count()
    if index >= count:
        raise LaunchError(
            f"LOCAL_RANK is {index}, but this process sees {count} GPUs (CUDA_VISIBLE_DEVICES "
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}): start one process per GPU"
        )
    return index


def rendezvous(env: LaunchEnvironment) -> dist.Store:
    """The store at which the run's processes have met; raises LaunchError where they do not."""
    where = f"{env.address}:{env.port} (MASTER_ADDR, MASTER_PORT)"
    global _meeting
    _meeting = True
    _await_hostname(env.address)
    try:
        if _launcher_has_store():
            store, *_ = next(dist.rendezvous("env://", env.rank, env.world_size, timeout=RENDEZVOUS_TIMEOUT))
            return store
        store = _store(env, RENDEZVOUS_TIMEOUT)
        _await_all(store, env)
    except PeerFailedError:
        raise
    except (dist.DistError, RuntimeError, ValueError) as e:
        text = str(e).splitlines()[0]
        kind: type[LaunchError] = NoMeetingError
        if "EADDRINUSE" in text:
            kind = PortInUseError
            reason = (
                "the port is in use, by another run or one that is just ending; give another MASTER_PORT "
                "(an option of launchers: --master_port)"
            )
        elif env.rank == 0 and "waiting for clients" in text:
            reason = f"not all of WORLD_SIZE {env.world_size} processes have come within {RENDEZVOUS_TIMEOUT}: {text}"
        else:
            reason = f"no meeting with the process of rank 0 within {RENDEZVOUS_TIMEOUT} ({text})"
        raise kind(f"{where}: {reason}") from None
    return store


def _launcher_has_store() -> bool:
    """Whether the store is torchrun's, which ends all processes itself where one fails."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store(env: LaunchEnvironment, timeout: timedelta) -> dist.TCPStore:
    return dist.TCPStore(env.address, env.port, None, env.rank == 0, timeout, wait_for_workers=False, multi_tenant=True)


def _await_all(store: dist.Store, env: LaunchEnvironment) -> None:
    """Wait until all processes have come; raises PeerFailedError where one says that it has failed."""
    end, pause = time.monotonic() + RENDEZVOUS_TIMEOUT.total_seconds(), 0.01
    come = store.add(_ARRIVED, 1)
    while come < env.world_size:
        if store.check([_FAILED]):
            status, reason = json.loads(store.get(_FAILED))
            store.add(_TOLD, 1)
            if env.rank == 0:  # it has the store
                _until_told(store, env.world_size - 1)
            raise PeerFailedError(status, reason)
        if time.monotonic() > end:
            raise dist.DistError(f"waiting for clients: {come} of {env.world_size} are here")
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
        come = store.add(_ARRIVED, 0)


def _until_told(store: dist.Store, others: int) -> None:
    end = time.monotonic() + ANNOUNCE_TIMEOUT
    while store.add(_TOLD, 0) < others and time.monotonic() < end:
        time.sleep(0.05)


def announce_failure(status: int, reason: str) -> None:
    """Tell the processes that wait for this one, if they do, that it fails before it meets them."""
    global _meeting
    with suppress(Exception):  # the environment may be what is wrong, and nobody may wait
        env = launch_environment()
        if env is None or env.world_size == 1 or _meeting or _launcher_has_store():
            return
        _meeting = True
        if env.rank and not _comes(env):
            return
        store = _store(env, timedelta(seconds=ANNOUNCE_TIMEOUT))
        store.set(_FAILED, json.dumps([status, reason]))
        store.add(_TOLD, 1 if env.rank else 0)
        if env.rank == 0:
            _until_told(store, env.world_size - 1)


def _comes(env: LaunchEnvironment) -> bool:
    """Whether the process of rank 0 listens, which it may begin to later than this one failed."""
    end = time.monotonic() + ANNOUNCE_PATIENCE
    while time.monotonic() < end:
        try:
            socket.create_connection((env.address, env.port), timeout=1.0).close()
            return True
        except socket.gaierror:  # the address may be what is wrong
            return False
        except OSError:
            if hurry.wait(0.5):
                return False
    return False


def _await_hostname(address: str) -> None:
    """Wait until the name of a machine is known, which on clusters it may become late; raises LaunchError if never."""
    end = time.monotonic() + HOSTNAME_TIMEOUT
    for attempt in itertools.count():
        try:
            socket.getaddrinfo(address, None)
            return
        except (OSError, UnicodeError) as e:
            if time.monotonic() > end:
                raise LaunchError(
                    f"MASTER_ADDR is {address!r}, a name that does not resolve here ({e}): a launcher "
                    "(deepspeed, torchrun) sets it to the name of the machine of rank 0"
                ) from None
            if attempt == 0:
                log.warning(
                    "MASTER_ADDR is %r, which is not known here yet: waiting up to %.0f s for it",
                    address,
                    HOSTNAME_TIMEOUT,
                )
            time.sleep(1)
