"""Deadlines of connections and their cap, with a small application under the server's protocol."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from fastlora.commands import serve
from fastlora.validation import ConfigError

pytest.importorskip("uvicorn", reason="the server needs it")

from starlette.exceptions import HTTPException

from fastlora.serve.app import AppSettings
from fastlora.serve.connections import (
    ConnectionLimits,
    OpenConnections,
    limits_for_descriptors,
    raise_descriptor_limit,
)
from fastlora.serve.middleware import KeyAndSizeMiddleware


class Uncounted:
    """Metrics that count nothing."""

    def count_response(self, scope: Any, status: int) -> None:
        pass


SHORT = ConnectionLimits(
    max_connections=8, header_seconds=0.4, body_seconds=0.8, idle_seconds=0.6, backlog=2
)
HEAD = b"POST /%s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the body; ``/stream`` sends 20 events in 2 s, ``/flood`` more than fits."""
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message["body"], message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/stream":
        for _ in range(20):
            await send({"type": "http.response.body", "body": b"event\n", "more_body": True})
            await asyncio.sleep(0.1)
    elif scope["path"] == "/flood":
        for _ in range(64):
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
    await send({"type": "http.response.body", "body": body})


@contextlib.contextmanager
def listening(limits: ConnectionLimits, drain: int = 1) -> Iterator[tuple[str, int]]:
    """Serves `app` as the program does; yields its address."""
    bound = socket.create_server(("127.0.0.1", 0))
    server = serve.make_uvicorn_server(
        app, serve.parse_args(["tiny", "--drain", str(drain)]), limits
    )
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    try:
        yield bound.getsockname()[:2]
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    """A server with short deadlines and room for eight connections."""
    with listening(SHORT) as found:
        yield found


def answer(connection: socket.socket, path: bytes = b"x", body: bytes = b"hi") -> bytes:
    """Sends a request and reads its answer, which is chunked."""
    connection.settimeout(10)
    connection.sendall(HEAD % (path, len(body)) + body)
    return read_answer(connection)


def read_answer(connection: socket.socket) -> bytes:
    """Reads a whole answer, which is chunked and can come in one part or in several."""
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        part = connection.recv(1 << 16)
        assert part, data
        data += part
    return data


def seconds_open(connection: socket.socket, *, drip: bytes = b"") -> float:
    """Seconds until the server closes a connection on which a byte comes every 0.05 s."""
    connection.settimeout(0.05)
    start = time.monotonic()
    while time.monotonic() - start < 5:
        try:
            if drip:
                connection.sendall(drip)
            if not connection.recv(1 << 16):
                break
        except TimeoutError:
            continue
        except OSError:  # reset
            break
    return time.monotonic() - start


@pytest.mark.parametrize(
    ("sent", "drip", "seconds"),
    [
        (b"", b"", 0.4),
        (b"POST /x HTTP/1.1\r\nX: ", b"a", 0.4),
        (HEAD % (b"x", 1000), b"", 0.8),
        (HEAD % (b"x", 1000), b"a", 0.8),
        (HEAD % (b"x", 2) + b"hi", b"", 0.6),
        (HEAD % (b"x", 2) + b"hi" + b"POST /x", b"", 0.4),
    ],
    ids=["silent", "slow headers", "no body", "slow body", "idle", "pipelined half"],
)
def test_a_client_that_is_waited_for_is_closed(
    address: tuple[str, int], sent: bytes, drip: bytes, seconds: float
) -> None:
    """E1: no connection stays open forever without a request, however slowly bytes come."""
    with socket.create_connection(address) as connection:
        connection.sendall(sent)
        assert seconds * 0.9 <= seconds_open(connection, drip=drip) < seconds + 2


def test_a_long_answer_to_a_silent_client_survives(address: tuple[str, int]) -> None:
    """E1: a stream five times as long as the header deadline, then the next request."""
    with socket.create_connection(address) as connection:
        start = time.monotonic()
        assert answer(connection, b"stream").count(b"event") == 20
        assert time.monotonic() - start > 4 * SHORT.header_seconds
        time.sleep(SHORT.header_seconds)  # idle, and not yet too long
        assert answer(connection).endswith(b"hi\r\n0\r\n\r\n")


def test_a_client_that_does_not_read_is_closed(address: tuple[str, int]) -> None:
    """E1: an answer that fits in no buffer holds its connection for the idle deadline only."""
    with socket.create_connection(address) as connection:
        connection.sendall(HEAD % (b"flood", 0))
        time.sleep(SHORT.idle_seconds + 1)
        assert seconds_open(connection) < 5
        with pytest.raises(OSError, match="reset|Broken pipe"):
            for _ in range(3):
                connection.sendall(b"x")
                time.sleep(0.05)


def test_idle_connections_make_room() -> None:
    """E1: 40 silent sockets at a cap of 8 stop neither new clients nor one that is connected."""
    limits = replace(SHORT, header_seconds=30, idle_seconds=30)
    with listening(limits) as address, contextlib.ExitStack() as stack:
        own = stack.enter_context(socket.create_connection(address))
        assert b"hi" in answer(own)
        busy = stack.enter_context(socket.create_connection(address))
        busy.sendall(HEAD % (b"stream", 0))
        silent = [stack.enter_context(socket.create_connection(address)) for _ in range(40)]
        for _ in range(5):
            with socket.create_connection(address) as new:
                assert b"hi" in answer(new)
        assert b"hi" in answer(own)
        closed = 0
        for connection in silent:
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):  # still open
                closed += connection.recv(1) == b""
        assert closed >= 40 - limits.max_connections
        busy.settimeout(5)
        assert b"event" in busy.recv(1 << 16)


def test_unfinished_requests_and_idle_connections_make_room_for_each_other() -> None:
    """E1: neither slow bodies nor connections that were served once keep a new client out."""
    limits = replace(SHORT, max_connections=12, body_seconds=30, idle_seconds=30)
    with listening(limits) as address, contextlib.ExitStack() as stack:
        own = stack.enter_context(socket.create_connection(address))
        assert b"hi" in answer(own)
        for _ in range(20):
            slow = stack.enter_context(socket.create_connection(address))
            slow.sendall(HEAD % (b"x", 1000))
            time.sleep(0.02)
        assert b"hi" in answer(own)
        for _ in range(20):
            served = stack.enter_context(socket.create_connection(address))
            assert b"hi" in answer(served)
        for _ in range(3):
            half = stack.enter_context(socket.create_connection(address))
            half.sendall(HEAD % (b"x", 4) + b"hi")
            others = [stack.enter_context(socket.create_connection(address)) for _ in range(2)]
            time.sleep(0.05)
            half.sendall(b"hi")
            assert b"hihi" in read_answer(half)
            assert len(others) == 2


def test_a_full_server_says_so() -> None:
    """E1: where every connection has an answer under way, a new one gets status 503."""
    with listening(replace(SHORT, max_connections=2)) as address, contextlib.ExitStack() as stack:
        for _ in range(2):
            busy = stack.enter_context(socket.create_connection(address))
            busy.sendall(HEAD % (b"stream", 0))
            assert b"200" in busy.recv(1 << 16)
        with socket.create_connection(address) as new:
            new.settimeout(5)
            assert new.recv(1 << 16).startswith(b"HTTP/1.1 503 ")
            assert new.recv(1) == b""


def test_unfinished_requests_do_not_delay_the_end() -> None:
    """E1: a body that never ends is no request that the server waits for; an answer is one."""
    limits = replace(SHORT, body_seconds=30, header_seconds=30)
    with contextlib.ExitStack() as stack:
        with listening(limits, drain=20) as address:
            busy = stack.enter_context(socket.create_connection(address))
            busy.sendall(HEAD % (b"stream", 0))
            for sent in (b"", b"POST /x", HEAD % (b"x", 1000)):
                stack.enter_context(socket.create_connection(address)).sendall(sent)
            assert b"200" in busy.recv(1 << 16)
            start = time.monotonic()
        assert time.monotonic() - start < 10
        busy.settimeout(5)
        assert b"".join(iter(lambda: busy.recv(1 << 16), b"")).endswith(b"0\r\n\r\n")


def test_small_chunks_hold_nobody_up(address: tuple[str, int]) -> None:
    """E1: h11 takes 20 us for a chunk, so a body of such chunks would occupy the server."""
    head = b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with contextlib.ExitStack() as stack:
        own, *small = (stack.enter_context(socket.create_connection(address)) for _ in range(4))
        assert b"hi" in answer(own)
        for connection in small:
            connection.sendall(head)
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                connection.send(b"1\r\na\r\n" * 100_000)
        start = time.monotonic()
        assert b"hi" in answer(own)
        assert time.monotonic() - start < 0.7
        for connection in small:
            assert seconds_open(connection) < SHORT.body_seconds
        usual = stack.enter_context(socket.create_connection(address))
        usual.sendall(head + (b"400\r\n" + bytes(1024) + b"\r\n") * 200 + b"0\r\n\r\n")
        usual.settimeout(5)
        data = b""
        while len(data) < 200 * 1024:
            data += usual.recv(1 << 20)
        assert data.startswith(b"HTTP/1.1 200")


def test_answers_are_sent_at_once() -> None:
    """asyncio turns Nagle's algorithm off only where a socket names its protocol."""
    with (
        serve._listening_socket("127.0.0.1", 0) as bound,
        socket.create_connection(bound.getsockname()),
    ):
        accepted, _ = bound.accept()
        with accepted:
            assert accepted.proto == socket.IPPROTO_TCP


def test_a_server_that_ends_takes_no_connection() -> None:
    """E1: asyncio may have accepted one that uvicorn does not know of yet."""
    connections = OpenConnections(SHORT)
    assert connections.make_room_for_connection()
    connections.ending = True
    assert not connections.make_room_for_connection()


def test_limits_leave_descriptors() -> None:
    """E1: connections, and those that are accepted while others are closed, fit in the limit."""
    for descriptors in (80, 256, 1024, 20_000, 1 << 20):
        limits = limits_for_descriptors(descriptors, None)
        assert limits.max_connections + 4 * limits.backlog <= descriptors - 64
        assert limits.max_connections >= 8 and 4 * limits.backlog <= limits.max_connections
    assert limits_for_descriptors(256, None).max_connections == 96
    assert limits_for_descriptors(None, None) == ConnectionLimits()
    assert limits_for_descriptors(20_000, 5000, header_seconds=1.0).max_connections == 5000
    with pytest.raises(ConfigError, match="5000 connections require an open-file limit of 10064"):
        limits_for_descriptors(1024, 5000)
    with pytest.raises(ConfigError, match="8 connections require an open-file limit of 80"):
        limits_for_descriptors(70, None)


def test_the_limit_of_open_files_is_raised() -> None:
    """E1: to the hard limit."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (500, before[1]))
        raised = raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
        assert raised == (None if before[1] == resource.RLIM_INFINITY else before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_bodies_that_are_being_read_are_bounded_together() -> None:
    """A large body that does not fit is refused; small ones, and what follows, are not."""
    settings = AppSettings(
        base="tiny", max_body_bytes=1 << 20, max_pending_body_bytes=(1 << 20) + (1 << 18)
    )
    gate = KeyAndSizeMiddleware(
        app,
        settings.keys,
        settings.max_body_bytes,
        settings.max_pending_body_bytes,
        metrics=Uncounted(),
    )

    async def ask(*parts: bytes, held: asyncio.Event | None = None) -> int:
        statuses, left = [], list(parts)

        async def receive() -> dict[str, Any]:
            if held is not None and len(left) == 1:
                await held.wait()
            part = left.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(left)}

        async def send(message: dict[str, Any]) -> None:
            statuses.append(message.get("status"))

        try:
            await gate({"type": "http", "path": "/", "headers": []}, receive, send)
        except HTTPException as error:
            assert error.headers == {"Retry-After": "1"}
            return error.status_code
        return statuses[0]

    async def traffic() -> None:
        part, release = bytes(1 << 19), asyncio.Event()
        slow = [asyncio.create_task(ask(part, part, held=release)) for _ in range(2)]
        await asyncio.sleep(0.01)
        for large in (b"", part):
            assert await ask(part, b"") == 503
            assert await ask(bytes(1 << 16), b"") == 200
            assert await ask(part + large) == 200  # came whole: nothing waits for it
        release.set()
        assert await asyncio.gather(*slow) == [200, 200]
        assert await ask(part, part) == 200

    asyncio.run(traffic())
