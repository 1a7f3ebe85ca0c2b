"""Errors in OpenAI's format: an HTTP status, and a body with a type and a code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from fastlora.pool.reader import UnsupportedAdapterError
from fastlora.serve.engine_request import ClosedOrCanceledError, QueueFullError
from fastlora.serve.keys import AdminKeyRequiredError
from fastlora.validation import (
    AdapterNotFoundError,
    AdapterStateError,
    AdapterTooLargeError,
    CheckpointError,
    ConfigError,
    FastLoraError,
    PoolClosedError,
    PoolFullError,
)

_RETRY_SECONDS = 1
# HTTP status, OpenAI error type, and code of each class of errors. Subclasses are first.
_STATUS: tuple[tuple[type[FastLoraError], int, str, str | None], ...] = (
    (AdapterNotFoundError, 404, "invalid_request_error", "model_not_found"),
    (AdminKeyRequiredError, 403, "invalid_request_error", "admin_key_required"),
    (QueueFullError, 429, "rate_limit_error", "queue_full"),
    (ClosedOrCanceledError, 503, "server_error", "shutting_down"),
    (PoolClosedError, 503, "server_error", "shutting_down"),
    (AdapterTooLargeError, 422, "invalid_request_error", "adapter_too_large"),
    (UnsupportedAdapterError, 422, "invalid_request_error", "adapter_unsupported"),
    (CheckpointError, 422, "invalid_request_error", "adapter_damaged"),
    (PoolFullError, 422, "invalid_request_error", "adapter_too_large"),
    (AdapterStateError, 400, "invalid_request_error", None),
    (ConfigError, 400, "invalid_request_error", None),
)
# Messages that replace pydantic's, by pydantic's type of the error.
_MESSAGES = {
    "extra_forbidden": "is not supported",
    "model_attributes_type": "expected a JSON object",
}


class AsciiJSONResponse(Response):
    """A JSON response that uses only ASCII.

    A message may quote a name that UTF-8 cannot encode.
    """

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


def add_exception_handlers(app: FastAPI) -> None:
    """Add the server's exception handlers to an application.

    The handlers report errors to clients in OpenAI's format.
    """
    app.add_exception_handler(FastLoraError, _on_fastlora_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(Exception, _on_internal_error)


def to_status_and_body(error: FastLoraError) -> tuple[int, dict[str, Any]]:
    """Return the HTTP status and the body for an error.

    The body is in OpenAI's format.
    """
    for kind, status, name, code in _STATUS:
        if isinstance(error, kind):
            return status, openai_error_body(str(error), name, code)
    return 500, openai_error_body(str(error), "server_error", None)


def openai_error_body(
    message: str, kind: str, code: str | None, param: str | None = None
) -> dict[str, Any]:
    """Return the JSON body of an error response in OpenAI's format."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def _on_fastlora_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, FastLoraError)
    status, body = to_status_and_body(error)
    headers = {"Retry-After": str(_RETRY_SECONDS)} if status in (429, 503) else None
    return AsciiJSONResponse(body, status, headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return AsciiJSONResponse(
        openai_error_body(str(error.detail), kind, None), error.status_code, error.headers
    )


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    name, message = _field_and_message(error)
    return AsciiJSONResponse(openai_error_body(message, "invalid_request_error", None, name), 400)


def _field_and_message(error: RequestValidationError) -> tuple[str | None, str]:
    """Return the name of the invalid field and an error message.

    The name is None if the request body as a whole is invalid.
    """
    details = error.errors()
    first = details[0]
    if first["type"] == "json_invalid":
        position, reason = first["loc"][-1], first["ctx"]["error"]
        return None, f"the request body is not valid JSON: {reason} at position {position}"
    if isinstance(error.body, bytes):
        return None, (
            "the request body is not declared as JSON; send the header "
            "Content-Type: application/json"
        )
    fields = [_field_path(detail, error.body) for detail in details]
    start = fields[0]
    # If a field may have several types, each type has an error. Choose the error of the type that
    # fits the largest part of the value.
    field, detail = max(
        (pair for pair in zip(fields, details, strict=True) if pair[0][: len(start)] == start),
        key=lambda pair: (len(pair[0]), [part for part in pair[0] if isinstance(part, int)]),
    )
    what = _MESSAGES.get(detail["type"], detail["msg"])
    name = ".".join(map(str, field)) or None
    return name, f"{name}: {what}" if name else f"invalid request body: {what}"


def _field_path(detail: Mapping[str, Any], body: Any) -> list[str | int]:
    """Return the path to an invalid field in the request body.

    If a field can have several types, the location that pydantic reports also contains the name of
    a type. The path leaves this name out.
    """
    path: list[str | int] = []
    value = body
    for part in detail["loc"][1:]:
        if isinstance(value, list) and isinstance(part, int):
            value = value[part]
        elif isinstance(value, dict) and (part in value or detail["type"] == "missing"):
            value = value.get(part)
        else:
            continue
        path.append(part)
    return path


async def _on_internal_error(request: Request, error: Exception) -> Response:
    return AsciiJSONResponse(
        openai_error_body("the server failed to process this request", "server_error", None), 500
    )
