"""What every request passes first: the key, the bound of its body, and the count of answers."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastlora.serve.keys import Caller, Keys
from fastlora.serve.metrics import Metrics
from fastlora.serve.refusals import JSON, error_body

_OPEN = ("/health",)  # without a key


class Gate:
    """Stands before an application; `Settings` in `app` says what its arguments are.

    It leaves in ``request.state.caller`` who sent a request.
    """

    def __init__(self, app: ASGIApp, keys: Keys, most_bytes: int, metrics: Metrics) -> None:
        self._app, self._keys = app, keys
        self._most_bytes, self._metrics = most_bytes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        most, read = self._most_bytes, 0
        too_long = f"the body has more than {most} bytes"

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise HTTPException(413, too_long)
            return message

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.answered(scope, message["status"])
            await send(message)

        caller = self._keys.caller(headers.get(b"authorization", b""))
        scope.setdefault("state", {})["caller"] = caller
        length = headers.get(b"content-length", b"0")
        if caller is Caller.STRANGER and scope["path"] not in _OPEN:
            message = "wrong or missing API key; send Authorization: Bearer KEY"
            body = error_body(message, "invalid_request_error", "invalid_api_key")
            await JSON(body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, noted)
        elif length.isdigit() and int(length[:19]) > most:
            body = error_body(too_long, "invalid_request_error", None)
            await JSON(body, 413)(scope, receive, noted)
        else:
            await self._app(scope, counted, noted)
