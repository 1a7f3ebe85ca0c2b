"""Check the key and the body size of every request, and count the responses."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastlora.serve.exception_handlers import AsciiJSONResponse, openai_error_body
from fastlora.serve.keys import ApiKeys, CallerRole
from fastlora.serve.metrics import PrometheusMetrics

_OPEN = ("/health",)  # paths that need no key
_SMALL_BODY = 1 << 16  # bytes; bodies up to this size do not count toward the total
_RETRY = {"Retry-After": "1"}


class KeyAndSizeMiddleware:
    """ASGI middleware that checks the API key and the body size of each request.

    The middleware stores the `CallerRole` of a request in ``request.state.caller``. `AppSettings`
    in `app` describes the arguments.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys,
        max_body_bytes: int,
        max_pending_body_bytes: int,
        metrics: PrometheusMetrics,
    ) -> None:
        self._app, self._keys, self._metrics = app, keys, metrics
        self._max_body_bytes = max_body_bytes
        self._max_pending_body_bytes = max(max_body_bytes, max_pending_body_bytes)
        self._reading = 0  # bytes of unfinished bodies, except small ones

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        most, read, held = self._max_body_bytes, 0, 0
        too_long = f"the request body has more than {most} bytes"

        def hold(size: int) -> None:
            nonlocal held
            self._reading += size - held
            held = size

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise HTTPException(413, too_long)
            hold(read if read > _SMALL_BODY and message.get("more_body", False) else 0)
            if held and self._reading > self._max_pending_body_bytes:
                text = "too many large requests are being received; try again later"
                raise HTTPException(503, text, _RETRY)
            return message

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.count_response(scope, message["status"])
            await send(message)

        caller = self._keys.identify_caller(headers.get(b"authorization", b""))
        scope.setdefault("state", {})["caller"] = caller
        length = headers.get(b"content-length", b"0")
        if caller is CallerRole.STRANGER and scope["path"] not in _OPEN:
            message = "invalid or missing API key; send the header Authorization: Bearer KEY"
            body = openai_error_body(message, "invalid_request_error", "invalid_api_key")
            await AsciiJSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})(
                scope, receive, noted
            )
        elif length.isdigit() and int(length[:19]) > most:
            body = openai_error_body(too_long, "invalid_request_error", None)
            await AsciiJSONResponse(body, 413)(scope, receive, noted)
        else:
            try:
                await self._app(scope, counted, noted)
            finally:
                hold(0)
