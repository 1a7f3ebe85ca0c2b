"""What every request passes first: the key, the bound of its body, and the count of answers."""

from __future__ import annotations

import hmac

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastlora.serve.metrics import Metrics
from fastlora.serve.refusals import JSON, error_body

_OPEN = ("/health",)  # without the key


class Gate:
    """Stands before an application; `Settings` in `app` says what its arguments are."""

    def __init__(
        self, app: ASGIApp, api_key: str | None, most_bytes: int, metrics: Metrics
    ) -> None:
        self._app, self._key = app, api_key
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

        length = headers.get(b"content-length", b"0")
        if not self._may(scope, headers.get(b"authorization", b"")):
            message = "wrong or missing API key; send Authorization: Bearer KEY"
            body = error_body(message, "invalid_request_error", "invalid_api_key")
            await JSON(body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, noted)
        elif length.isdigit() and int(length[:19]) > most:
            body = error_body(too_long, "invalid_request_error", None)
            await JSON(body, 413, {"Connection": "close"})(scope, receive, noted)
        else:
            await self._app(scope, counted, noted)

    def _may(self, scope: Scope, given: bytes) -> bool:
        if self._key is None or scope["path"] in _OPEN:
            return True
        return hmac.compare_digest(given, f"Bearer {self._key}".encode())
