"""`LoadingApp`, which answers requests while the model of a server is loaded."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI

from fastlora.serve.exception_handlers import AsciiJSONResponse, openai_error_body

_RETRY_SECONDS = 5
_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


class LoadingApp:
    """An ASGI application that answers requests while the server's model is loading.

    Another application serves the model. Until that application is ready, each request gets status
    503 with a ``Retry-After`` header, and ``/health`` reports that the server is loading. After
    that, requests are forwarded to that application.

    Attributes:
        on_startup: Function that is called once the event loop runs, before requests are accepted.
    """

    def __init__(self) -> None:
        self.on_startup: Callable[[], None] | None = None
        self._app: FastAPI | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lifespan = contextlib.AsyncExitStack()
        self._stopped = False

    def start_app_and_forward_requests(self, loaded_app: FastAPI) -> None:
        """Start a loaded application, and forward all further requests to it.

        Call this in another thread, once the event loop runs. The server shuts the application
        down.
        """
        if self._loop is None:
            raise RuntimeError("the server has not started yet")
        asyncio.run_coroutine_threadsafe(
            self._start_app_and_forward_requests(loaded_app), self._loop
        ).result()

    async def _start_app_and_forward_requests(self, app: FastAPI) -> None:
        if self._stopped:
            raise RuntimeError("the server has stopped")
        await self._lifespan.enter_async_context(app.router.lifespan_context(app))
        self._app = app

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """Handle the start and the end of the server, or a request."""
        if scope["type"] == "lifespan":
            await self._handle_lifespan(receive, send)
        elif self._app is not None:
            await self._app(scope, receive, send)
        else:
            await _loading_response(scope["path"])(scope, receive, send)

    async def _handle_lifespan(self, receive: _Receive, send: _Send) -> None:
        await receive()
        self._loop = asyncio.get_running_loop()
        if self.on_startup is not None:
            self.on_startup()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._stopped = True
        await self._lifespan.aclose()
        await send({"type": "lifespan.shutdown.complete"})


def _loading_response(path: str) -> AsciiJSONResponse:
    body: dict[str, Any] = {"status": "loading"}
    if path != "/health":
        message = "the server is loading its model; try again later"
        body = openai_error_body(message, "server_error", "loading")
    return AsciiJSONResponse(body, 503, {"Retry-After": str(_RETRY_SECONDS)})
