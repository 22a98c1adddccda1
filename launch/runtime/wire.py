"""Messages between processes: JSON objects, one a line, over a socket that never blocks."""

import json
import socket
import time
from contextlib import suppress
from typing import Any

FINISH_TIMEOUT = 0.5  # seconds
LONGEST = 1 << 24  # bytes of a message, or of messages that wait: the members of 10,000 processes take 4 MB


class Wire:
    """One end of a connection. `quiet`: seconds since the other end was heard, as the owner counts them."""

    def __init__(self, connection: socket.socket):
        self.socket, self.quiet = connection, 0.0
        connection.setblocking(False)
        self._coming, self._going = b"", b""

    def send(self, message: dict[str, Any]) -> None:
        """Hand a message to the system. What it has no room for follows with the next one; an end that is gone, or has
        read nothing for a million messages, is for `receive` to find."""
        self._going += json.dumps(message).encode() + b"\n"
        try:
            self._going = self._going[self.socket.send(self._going) :]
        except BlockingIOError:
            self._going = self._going[-LONGEST:]
        except OSError:
            self._going = b""

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come; None where the other end is gone, or what came is no message."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self.quiet = 0.0
        *lines, self._coming = (self._coming + data).split(b"\n")
        if len(self._coming) > LONGEST:
            return None
        try:
            return [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError):
            return None

    def finish(self) -> None:
        """Close, once the other end has read everything or `FINISH_TIMEOUT` is over.

        Closed with something unread, a connection is reset, and what was sent last may be lost.
        """
        with suppress(OSError):
            self.socket.settimeout(FINISH_TIMEOUT)
            self.socket.sendall(self._going)
            self.socket.shutdown(socket.SHUT_WR)
            end = time.monotonic() + FINISH_TIMEOUT
            while self.socket.recv(1 << 16) and time.monotonic() < end:
                pass
        self.socket.close()
