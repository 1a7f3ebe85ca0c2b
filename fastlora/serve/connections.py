"""Deadlines and a cap for connections: what uvicorn leaves to a proxy.

A connection that waits for its client has a deadline. When as many connections are open as may be,
a new one takes the place of the one that has waited longest for its client.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastlora.validation import ConfigError

_log = logging.getLogger("fastlora.serve")
_OTHER_FILES = 64  # than connections: the model's, adapters that are being read, pipes
_LEAST = 8
_SMALL = 256  # bytes of a chunk that takes h11 longer to find than to copy, some 20 us
_MOST_SMALL = 2048  # such chunks in a body
_QUEUE = 1024  # the kernel drops connections beyond it, and their clients try again after a second
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class Waiting(enum.Enum):
    """What a connection waits for."""

    HEADERS = enum.auto()  # of the first request, or the rest of those of a later one
    BODY = enum.auto()
    REQUEST = enum.auto()  # the next one
    READER = enum.auto()  # the client is to read what was sent


@dataclass(frozen=True)
class Limits:
    """Bounds of connections; what uses up a bound is closed.

    Attributes:
        most: Connections that are open at once.
        header_seconds: From a connection's or a request's first byte to the end of the headers.
        body_seconds: From there to the end of the body.
        idle_seconds: Until the next request, and until the client reads when buffers are full.
        backlog: Connections that are accepted at a time.
    """

    most: int = 1024
    header_seconds: float = 10.0
    body_seconds: float = 60.0
    idle_seconds: float = 60.0
    backlog: int = 128

    def seconds(self, waiting: Waiting) -> float:
        """Returns how long a connection may wait for its client."""
        if waiting is Waiting.HEADERS:
            return self.header_seconds
        return self.body_seconds if waiting is Waiting.BODY else self.idle_seconds


class Connections:
    """The open connections of a server, and which one has to make room.

    Attributes:
        waiting: Connections in the order of their waiting, by what they wait for.
        ending: The server takes no connection any more.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.open = 0
        self.ending = False
        self._unfinished: dict[Connection, None] = {}
        self._idle: dict[Connection, None] = {}
        self._unread: dict[Connection, None] = {}
        self.waiting = {
            Waiting.HEADERS: self._unfinished,
            Waiting.BODY: self._unfinished,
            Waiting.REQUEST: self._idle,
            Waiting.READER: self._unread,
        }

    def protocol(self, **given: Any) -> Connection:
        """Returns the protocol of a new connection, for uvicorn's ``http``."""
        return Connection(self, **given)

    def make_room(self) -> bool:
        """Closes a connection if no other one fits; returns whether one fits now.

        Unfinished requests go before idle connections, since a client with an idle connection has
        been served. A quarter of the connections is left to unfinished requests, so that
        idle connections do not keep new clients out.
        """
        if self.ending:
            return False
        if self.open < self.limits.most:
            return True
        _log.warning("%d connections are open; new ones close those that wait", self.limits.most)
        queues = [self._unfinished, self._idle, self._unread]
        if len(self._unfinished) <= self.limits.most // 4:
            queues = [self._idle, self._unfinished, self._unread]
        longest = next((next(iter(queue)) for queue in queues if queue), None)
        if longest is not None:
            longest.end()
        return longest is not None


class Connection(H11Protocol):
    """uvicorn's protocol, with a deadline whenever the connection waits for its client."""

    def __init__(self, every: Connections, **given: Any) -> None:
        super().__init__(**given)
        self._every, self._counted = every, False
        self.conn.next_event = ChunkCount(self.conn.next_event, self.end).next  # type: ignore
        self._deadline = Deadline(self, every)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._counted = self._every.make_room()
        if self._counted:
            self._every.open += 1
        else:
            transport.write(_BUSY)
            transport.close()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._look()

    def shutdown(self) -> None:
        if self._deadline.waits is Waiting.BODY:  # no request yet that could end
            self.end()
        else:
            super().shutdown()

    def end(self) -> None:
        """Closes the connection without waiting for the client to read."""
        self._leave()
        self.transport.abort()

    def _look(self) -> None:
        self._deadline.wait_for(self._waits_for())

    def _waits_for(self) -> Waiting | None:
        if self.transport.is_closing() or self.flow.write_paused:
            return Waiting.READER
        if self.conn.their_state is h11.IDLE:
            is_between = self.cycle is not None and not self.conn.trailing_data[0]
            return Waiting.REQUEST if is_between else Waiting.HEADERS
        return Waiting.BODY if self.conn.their_state is h11.SEND_BODY else None

    def _leave(self) -> None:
        self._deadline.wait_for(None)
        self._every.open -= self._counted
        self._counted = False


class Deadline:
    """Closes a connection that waits for its client too long.

    Attributes:
        waits: What the connection waits for; None while its client waits for the server.
    """

    def __init__(self, connection: Connection, every: Connections) -> None:
        self._connection, self._every = connection, every
        self.waits: Waiting | None = None
        self._timer: asyncio.TimerHandle | None = None

    def wait_for(self, waits: Waiting | None) -> None:
        """Starts anew where the connection waits for something else now."""
        if waits is self.waits:
            return
        if self.waits is not None and self._timer is not None:
            del self._every.waiting[self.waits][self._connection]
            self._timer.cancel()
        self.waits = waits
        if waits is not None:
            self._every.waiting[waits][self._connection] = None
            seconds = self._every.limits.seconds(waits)
            self._timer = self._connection.loop.call_later(seconds, self._connection.end)


class ChunkCount:
    """Ends a connection that sends a request's body in too many small chunks.

    Args:
        parsed: Returns what h11 has parsed next.
        end: Closes the connection.
    """

    def __init__(self, parsed: Callable[[], Any], end: Callable[[], None]) -> None:
        self._parsed, self._end = parsed, end
        self._small = 0

    def next(self) -> Any:
        """Returns what h11 has parsed next; once the connection has ended, that it needs data."""
        event = self._parsed()
        if isinstance(event, h11.Request):
            self._small = 0
        elif isinstance(event, h11.Data) and event.chunk_start and len(event.data) < _SMALL:
            self._small += 1
            if self._small > _MOST_SMALL:
                self._end()
                return h11.NEED_DATA
        return event


class ConnectionServer(uvicorn.Server):
    """uvicorn's server, where more connections queue in the kernel than are accepted at a time.

    What was accepted as the server began to end is closed; uvicorn would wait for its deadline.
    """

    def __init__(self, config: uvicorn.Config, connections: Connections) -> None:
        super().__init__(config)
        self._connections = connections

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(_QUEUE)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._connections.ending = True
        await super().shutdown(sockets)


def raise_descriptor_limit() -> int | None:
    """Raises this process's limit of open files as far as the system allows.

    Returns:
        The limit; None where there is none.
    """
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS has a lower limit that it does not tell
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return None if soft == resource.RLIM_INFINITY else soft


def limits_within(descriptors: int | None, most: int | None, **seconds: Any) -> Limits:
    """Returns limits with which a server never runs out of descriptors.

    asyncio accepts as many connections at a time as the backlog, and the server closes those over
    the cap a few turns of its loop later. A backlog of a quarter of the cap leaves a client these
    turns to be read, and half of the descriptors are left for what is accepted meanwhile.

    Args:
        descriptors: As `raise_descriptor_limit` returns.
        most: Connections that the user wants to be open at once; None for as many as fit, at most
            those of `Limits`.
        seconds: Deadlines, as in `Limits`.

    Raises:
        ConfigError: The descriptors are too few.
    """
    own = Limits(**seconds)
    room = own.most if descriptors is None else (descriptors - _OTHER_FILES) // 2
    if descriptors is not None and room < (most or _LEAST):
        least = most or _LEAST
        raise ConfigError(
            f"{least} connections need a limit of {2 * least + _OTHER_FILES} open files, and the "
            f"system allows {descriptors} (ulimit -Hn)"
        )
    most = most or min(room, own.most)
    return replace(own, most=most, backlog=max(1, min(own.backlog, most // 4)))
