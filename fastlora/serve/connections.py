"""Limit the number of connections and their waiting times, which uvicorn leaves to a proxy.

A connection that waits for its client has a deadline. Once the maximum number of connections is
open, each new connection replaces a connection that waits for its client.
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
_OTHER_FILES = 64  # files other than connections: the model, adapters being read, pipes
_LEAST = 8
_SMALL = 256  # bytes; h11 needs longer to find a smaller chunk than to copy it, about 20 us
_MOST_SMALL = 2048  # maximum number of small chunks in a body
_QUEUE = 1024  # connections; the kernel drops further ones, and clients retry after a second
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class AwaitedEventKind(enum.Enum):
    """A kind of event that a connection can wait for."""

    HEADERS = enum.auto()  # of the first request, or the rest of the headers of a later one
    BODY = enum.auto()
    REQUEST = enum.auto()  # the next request
    READER = enum.auto()  # the client has to read what was sent


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits on a server's connections, such as timeouts and the maximum number of connections.

    The limits apply to the number of open connections, to the time that each connection waits for
    its client, and to the backlog. A connection is closed if its client misses a deadline.

    Attributes:
        max_connections: Maximum number of open connections.
        header_seconds: Time from the start of a connection, or of a later request, to the end of
            the headers.
        body_seconds: Time from the end of the headers to the end of the body.
        idle_seconds: Time until the next request, and until the client reads when buffers are full.
        backlog: Number of connections that are accepted at a time.
    """

    max_connections: int = 1024
    header_seconds: float = 10.0
    body_seconds: float = 60.0
    idle_seconds: float = 60.0
    backlog: int = 128

    def timeout_for(self, waiting: AwaitedEventKind) -> float:
        """Return the maximum time, in seconds, that a connection may wait for an event."""
        if waiting is AwaitedEventKind.HEADERS:
            return self.header_seconds
        return self.body_seconds if waiting is AwaitedEventKind.BODY else self.idle_seconds


class OpenConnections:
    """The open connections of a server.

    Their number is limited.

    Attributes:
        waiting: Dict that maps each event to the connections that wait for it, with the longest
            wait first. HEADERS and BODY share a queue.
        ending: Whether the server has stopped accepting connections.
    """

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self.open = 0
        self.ending = False
        self._unfinished: dict[DeadlineProtocol, None] = {}
        self._idle: dict[DeadlineProtocol, None] = {}
        self._unread: dict[DeadlineProtocol, None] = {}
        self.waiting = {
            AwaitedEventKind.HEADERS: self._unfinished,
            AwaitedEventKind.BODY: self._unfinished,
            AwaitedEventKind.REQUEST: self._idle,
            AwaitedEventKind.READER: self._unread,
        }

    def create_protocol(self, **given: Any) -> DeadlineProtocol:
        """Create the protocol object for a new connection.

        uvicorn calls this method.
        """
        return DeadlineProtocol(self, **given)

    def make_room_for_connection(self) -> bool:
        """Make room for a new connection if necessary, and return whether there is room.

        If the server is full, that is, if the maximum number of connections is open, a connection
        is closed to make room. Only a connection that waits for its client can be closed.
        Connections with unfinished requests are closed before connections that are between two
        requests, because the clients of the latter have been served. A quarter of the connections
        is reserved for unfinished requests, so that connections between two requests do not keep
        new clients out. There is no room if no connection can be closed or if the server is
        shutting down.
        """
        if self.ending:
            return False
        if self.open < self.limits.max_connections:
            return True
        _log.warning(
            "%d connections are open; new ones close those that are waiting",
            self.limits.max_connections,
        )
        queues = [self._unfinished, self._idle, self._unread]
        if len(self._unfinished) <= self.limits.max_connections // 4:
            queues = [self._idle, self._unfinished, self._unread]
        longest = next((next(iter(queue)) for queue in queues if queue), None)
        if longest is not None:
            longest.abort()
        return longest is not None


class DeadlineProtocol(H11Protocol):
    """An asyncio protocol for HTTP that enforces deadlines on its connection.

    The protocol closes the connection when the client misses a deadline. The class extends
    uvicorn's protocol. A deadline applies while a connection waits for its client.
    """

    def __init__(self, every: OpenConnections, **given: Any) -> None:
        super().__init__(**given)
        self._every, self._counted = every, False
        limiter = SmallChunkLimiter(self.conn.next_event, self.abort)
        self.conn.next_event = limiter.next_event  # type: ignore
        self._deadline = ClientDeadlineTimer(self, every)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._counted = self._every.make_room_for_connection()
        if self._counted:
            self._every.open += 1
        else:
            transport.write(_BUSY)
            transport.close()
        self._update_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_deadline()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_deadline()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._update_deadline()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._update_deadline()

    def shutdown(self) -> None:
        # An incomplete request cannot finish.
        if self._deadline.waits is AwaitedEventKind.BODY:
            self.abort()
        else:
            super().shutdown()

    def abort(self) -> None:
        """Abort the connection.

        The connection is closed immediately, without waiting for the client to read the remaining
        data.
        """
        self._leave()
        self.transport.abort()

    def _update_deadline(self) -> None:
        self._deadline.restart_if_event_changed(self._waits_for())

    def _waits_for(self) -> AwaitedEventKind | None:
        if self.transport.is_closing() or self.flow.write_paused:
            return AwaitedEventKind.READER
        if self.conn.their_state is h11.IDLE:
            is_between = self.cycle is not None and not self.conn.trailing_data[0]
            return AwaitedEventKind.REQUEST if is_between else AwaitedEventKind.HEADERS
        return AwaitedEventKind.BODY if self.conn.their_state is h11.SEND_BODY else None

    def _leave(self) -> None:
        self._deadline.restart_if_event_changed(None)
        self._every.open -= self._counted
        self._counted = False


class ClientDeadlineTimer:
    """A timer that closes a connection when the client misses a deadline.

    The timer runs while the connection waits for the client.

    Attributes:
        waits: The event that the connection waits for; None while the client waits for the server.
    """

    def __init__(self, connection: DeadlineProtocol, every: OpenConnections) -> None:
        self._connection, self._every = connection, every
        self.waits: AwaitedEventKind | None = None
        self._timer: asyncio.TimerHandle | None = None

    def restart_if_event_changed(self, waits: AwaitedEventKind | None) -> None:
        """Reset the deadline if the connection is now waiting for a different event."""
        if waits is self.waits:
            return
        if self.waits is not None and self._timer is not None:
            del self._every.waiting[self.waits][self._connection]
            self._timer.cancel()
        self.waits = waits
        if waits is not None:
            self._every.waiting[waits][self._connection] = None
            seconds = self._every.limits.timeout_for(waits)
            self._timer = self._connection.loop.call_later(seconds, self._connection.abort)


class SmallChunkLimiter:
    """Limits the number of small chunks in the body of a request.

    Small chunks are slow to parse. If the body has too many small chunks, the connection is closed.

    Args:
        parsed: Function that returns the next event that h11 has parsed.
        end: Function that closes the connection.
    """

    def __init__(self, parsed: Callable[[], Any], end: Callable[[], None]) -> None:
        self._parsed, self._end = parsed, end
        self._small = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Return the next event of the connection.

        The event is the next one that h11 has parsed. The method does not wait for data. It returns
        `h11.NEED_DATA` if h11 needs more data, or if this call has closed the connection because of
        too many small chunks.
        """
        event = self._parsed()
        if isinstance(event, h11.Request):
            self._small = 0
        elif isinstance(event, h11.Data) and event.chunk_start and len(event.data) < _SMALL:
            self._small += 1
            if self._small > _MOST_SMALL:
                self._end()
                return h11.NEED_DATA
        return event


class LongBacklogServer(uvicorn.Server):
    """A server that allows a long backlog of pending connections.

    It is uvicorn's server, with a kernel queue that is longer than the number of connections that
    are accepted at a time. Connections accepted just before the server shuts down are closed;
    uvicorn would wait for their deadlines.
    """

    def __init__(self, config: uvicorn.Config, connections: OpenConnections) -> None:
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
    """Raise the process's limit on file descriptors, and return the new limit.

    The limit on open files is raised as far as the system allows.

    Returns:
        The new limit, or None if the number of open files is unlimited or if the system has no such
        limit, as on Windows.
    """
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS has a lower limit that it does not state
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return None if soft == resource.RLIM_INFINITY else soft


def limits_for_descriptors(
    descriptors: int | None, max_connections: int | None, **seconds: Any
) -> ConnectionLimits:
    """Return connection limits that fit the number of available file descriptors.

    The limits prevent a server from running out of file descriptors. Open connections use at most
    half of the descriptors. The other half is reserved for connections over the maximum: asyncio
    accepts up to ``backlog`` connections at a time, and the server closes those over the maximum
    only a few event loop iterations later. The backlog is at most a quarter of the maximum, so that
    the server has these iterations to read from a new client before newer connections replace it.

    Args:
        descriptors: Limit on open files, from `raise_descriptor_limit`.
        max_connections: Maximum number of open connections. None uses as many as fit, up to
            the default of `ConnectionLimits`.
        seconds: Deadlines, as in `ConnectionLimits`.

    Raises:
        ConfigError: The limit on open files is too low.
    """
    own = ConnectionLimits(**seconds)
    room = own.max_connections if descriptors is None else (descriptors - _OTHER_FILES) // 2
    if descriptors is not None and room < (max_connections or _LEAST):
        least = max_connections or _LEAST
        raise ConfigError(
            f"{least} connections require an open-file limit of {2 * least + _OTHER_FILES}, but "
            f"the system allows only {descriptors} (ulimit -Hn)"
        )
    max_connections = max_connections or min(room, own.max_connections)
    return replace(
        own, max_connections=max_connections, backlog=max(1, min(own.backlog, max_connections // 4))
    )
