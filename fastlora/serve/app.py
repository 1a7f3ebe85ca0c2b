"""The HTTP side: OpenAI's endpoints, vLLM's for adapters, health and metrics."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastlora.serve.adapters import ServedAdapters
from fastlora.serve.engine import (
    ClosedError,
    Engine,
    Job,
    Piece,
    QueueFullError,
)
from fastlora.serve.metrics import Metrics
from fastlora.serve.prompts import Prompts
from fastlora.serve.protocol import (
    ChatBody,
    CompletionBody,
    GenerationBody,
    LoadBody,
    UnloadBody,
    check_text,
)
from fastlora.serve.sampling import Sampling
from fastlora.validation import (
    AdapterNotFoundError,
    AdapterStateError,
    CheckpointError,
    ConfigError,
    FastLoraError,
    PoolFullError,
)

_log = logging.getLogger("fastlora.serve")
_OPEN = ("/health",)  # without the key
_COMPLETION_TOKENS = 16  # OpenAI's, where a completion names none
_RETRY_SECONDS = 1
_CLOSED_BY_CLIENT = 499
# The status, OpenAI's type and the code of what the engine refuses.
_STATUS: tuple[tuple[type[FastLoraError], int, str, str | None], ...] = (
    (AdapterNotFoundError, 404, "invalid_request_error", "model_not_found"),
    (QueueFullError, 429, "rate_limit_error", "queue_full"),
    (ClosedError, 503, "server_error", "shutting_down"),
    (CheckpointError, 422, "invalid_request_error", "adapter_damaged"),
    (PoolFullError, 422, "invalid_request_error", "adapter_too_large"),
    (AdapterStateError, 400, "invalid_request_error", None),
    (ConfigError, 400, "invalid_request_error", None),
)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Settings:
    """What the HTTP side is told.

    Attributes:
        base: The base model's name; clients may say ``base`` too.
        api_key: What clients must send; None for a server that asks for none.
        most_bytes: Of a request's body.
        watch_seconds: Between two looks into the folder of adapters; 0 for none.
    """

    base: str
    api_key: str | None = None
    most_bytes: int = 1 << 20
    watch_seconds: float = 2.0


class _JSON(Response):
    """JSON in ASCII: a message may quote a name that no encoding has."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


def make_app(
    engine: Engine, adapters: ServedAdapters, prompts: Prompts, settings: Settings
) -> FastAPI:
    """Returns the application; the engine ends with it.

    Args:
        engine: Runs requests.
        adapters: Those that the engine has.
        prompts: Makes tokens of requests.
        settings: See `Settings`.
    """
    return _Server(engine, adapters, prompts, settings).app


class _Server:
    def __init__(
        self, engine: Engine, adapters: ServedAdapters, prompts: Prompts, settings: Settings
    ) -> None:
        self.engine, self.adapters, self.prompts = engine, adapters, prompts
        self.settings = settings
        self.metrics = Metrics(engine, adapters)
        self.since = int(time.time())
        app = FastAPI(
            title="fastlora serve",
            docs_url=None,  # the page would load scripts from elsewhere
            redoc_url=None,
            lifespan=self._lifespan,
            default_response_class=_JSON,
        )
        app.add_exception_handler(FastLoraError, _on_our_error)
        app.add_exception_handler(HTTPException, _on_http_error)
        app.add_exception_handler(RequestValidationError, _on_wrong_body)
        app.add_exception_handler(Exception, _on_fault)
        app.add_middleware(_Gate, settings=settings, metrics=self.metrics)
        for method, path, call in (
            ("GET", "/health", self.health),
            ("GET", "/metrics", self.show_metrics),
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{name}", self.one_model),
            ("POST", "/v1/completions", self.completions),
            ("POST", "/v1/chat/completions", self.chat_completions),
            ("POST", "/v1/load_lora_adapter", self.load),
            ("POST", "/v1/unload_lora_adapter", self.unload),
        ):
            app.add_api_route(path, call, methods=[method], response_model=None)
        self.app = app

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        watch = asyncio.create_task(self._watch()) if self.settings.watch_seconds else None
        try:
            yield
        finally:
            if watch is not None:
                watch.cancel()
            # Connections have ended by now; what is left has nobody who listens.
            await asyncio.to_thread(self.engine.close, 0.0)

    async def _watch(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self.adapters.scan)
            except Exception:  # a folder that is gone may come back
                _log.exception("looking into the folder of adapters failed")
            await asyncio.sleep(self.settings.watch_seconds)

    # ------------------------------------------------------------------------------ small endpoints

    async def health(self) -> Response:
        """Says whether requests are taken."""
        if not self.engine.alive or self.engine.closing:
            return _JSON({"status": "shutting down"}, 503)
        return _JSON({"status": "ok"})

    async def show_metrics(self) -> Response:
        """Prometheus's text format."""
        return Response(self.metrics.text(), media_type=self.metrics.media_type)

    async def models(self) -> Response:
        """The base model and the adapters that can be used."""
        names = [self.settings.base, *self.adapters.names]
        return _JSON({"object": "list", "data": [self._model(name) for name in names]})

    async def one_model(self, name: str) -> Response:
        """One of them."""
        if not self._is_base(name) and name not in self.adapters.names:
            raise AdapterNotFoundError(f"the model {name!r} does not exist")
        return _JSON(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        base = self._is_base(name)
        return {
            "id": name,
            "object": "model",
            "created": self.since,
            "owned_by": "fastlora",
            "parent": None if base else self.settings.base,
            "max_model_len": self.engine.length,
        }

    def _is_base(self, name: str) -> bool:
        return name in ("base", self.settings.base)

    async def load(self, body: LoadBody) -> Response:
        """Loads an adapter from below the server's folder."""
        check_text("lora_name", body.lora_name)
        check_text("lora_path", body.lora_path)
        try:
            await asyncio.to_thread(
                self.adapters.load, body.lora_name, body.lora_path, replace=body.load_inplace
            )
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(self, body: UnloadBody) -> Response:
        """Forgets an adapter; requests that run end with it."""
        await asyncio.to_thread(self.adapters.unload, body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    # --------------------------------------------------------------------------------- answers

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """Goes on with a text."""
        sampling = body.sampling(body.max_tokens or _COMPLETION_TOKENS)
        given = body.one_prompt()
        if isinstance(given, str):
            check_text("prompt", given)
            tokens = await asyncio.to_thread(self.prompts.of_text, given)
        else:
            tokens = self.prompts.of_tokens(given)
        return await self._answer(body, request, tokens, sampling, _Completion)

    async def chat_completions(self, body: ChatBody, request: Request) -> Response:
        """Answers a conversation."""
        if body.max_tokens and body.max_completion_tokens:
            raise ConfigError("max_tokens and max_completion_tokens are one setting; send one")
        sampling = body.sampling(body.max_tokens or body.max_completion_tokens)
        messages = [message.as_dict() for message in body.messages]
        tokens = await asyncio.to_thread(self.prompts.of_messages, messages)
        return await self._answer(body, request, tokens, sampling, _ChatCompletion)

    async def _answer(
        self,
        body: GenerationBody,
        request: Request,
        tokens: list[int],
        sampling: Sampling,
        form: type[_Form],
    ) -> Response:
        if body.stream_options is not None and not body.stream:
            raise ConfigError("stream_options is only for stream=true")
        adapter = None if self._is_base(body.model) else body.model
        answer = _Answer(self.engine, tokens, adapter, sampling)
        shape = form(body.model, len(tokens))
        ended = False
        try:
            # The first piece before the status: what fails at once has a status of its own.
            first = await _unless_gone(request, answer.next())
            if first is None:
                return Response(status_code=_CLOSED_BY_CLIENT)
            if body.stream:
                usage = body.stream_options is not None and body.stream_options.include_usage
                response = _Stream(answer, shape.stream(answer, first, usage))
                ended = True  # by the stream from here on
                return response
            pieces = [first]
            while pieces[-1].reason is None:
                piece = await _unless_gone(request, answer.next())
                if piece is None:
                    return Response(status_code=_CLOSED_BY_CLIENT)
                pieces.append(piece)
            text = "".join(piece.text for piece in pieces)
            return _JSON(shape.whole(text, pieces[-1]))
        finally:
            if not ended:
                answer.cancel()


class _Answer:
    """An answer that is being made, for the event loop.

    Raises what `Engine.submit` does.
    """

    def __init__(
        self, engine: Engine, tokens: list[int], adapter: str | None, sampling: Sampling
    ) -> None:
        loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self._engine = engine

        def hear(piece: Piece) -> None:
            loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        self._job: Job = engine.submit(tokens, adapter, sampling, hear)

    async def next(self) -> Piece:
        """Returns the next piece; raises what the request failed with."""
        piece = await self._pieces.get()
        if piece.error is not None:
            raise piece.error
        return piece

    def cancel(self) -> None:
        """Nobody listens any more."""
        self._engine.cancel(self._job)


class _Stream(StreamingResponse):
    """Server-sent events; the request ends when the client does."""

    def __init__(self, answer: _Answer, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


class _Form(abc.ABC):
    """The shape of an answer's JSON."""

    prefix, kind, chunk_kind = "", "", ""

    def __init__(self, model: str, prompt_tokens: int) -> None:
        self._id, self._created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())
        self._model, self._prompt_tokens = model, prompt_tokens

    def whole(self, text: str, last: Piece) -> dict[str, Any]:
        """Returns an answer in one."""
        choice = self._choice(text, last.reason)
        return {**self._head(self.kind), "choices": [choice], "usage": self._usage(last)}

    async def stream(self, answer: _Answer, first: Piece, usage: bool) -> AsyncIterator[str]:
        """Yields the events of a stream."""
        piece = first
        try:
            for opening in self._openings():
                yield self._event([opening], usage)
            while True:
                if piece.text or piece.reason:
                    yield self._event([self._part(piece.text, piece.reason)], usage)
                if piece.reason is not None:
                    break
                piece = await answer.next()
        except FastLoraError as error:  # the status has been sent
            yield f"data: {json.dumps(_error_of(error)[1])}\n\n"
        else:
            if usage:
                head = self._head(self.chunk_kind)
                yield _event({**head, "choices": [], "usage": self._usage(piece)})
        yield "data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], usage: bool) -> str:
        counts = {"usage": None} if usage else {}
        return _event({**self._head(self.chunk_kind), "choices": choices, **counts})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _usage(self, last: Piece) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": last.tokens,
            "total_tokens": self._prompt_tokens + last.tokens,
        }

    @abc.abstractmethod
    def _choice(self, text: str, reason: str | None) -> dict[str, Any]:
        """Returns the choice of a whole answer."""

    @abc.abstractmethod
    def _part(self, text: str, reason: str | None) -> dict[str, Any]:
        """Returns the choice of one event."""

    def _openings(self) -> list[dict[str, Any]]:
        return []


class _Completion(_Form):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _choice(self, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}

    _part = _choice


class _ChatCompletion(_Form):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _choice(self, text: str, reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}

    def _part(self, text: str, reason: str | None) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}

    def _openings(self) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


async def _unless_gone(request: Request, wanted: Awaitable[_T]) -> _T | None:
    """Waits for something, or until the client is gone; then returns None."""
    task = asyncio.ensure_future(wanted)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# ----------------------------------------------------------------------------------------- refusals


def _error_of(error: FastLoraError) -> tuple[int, dict[str, Any]]:
    """Returns an error's status and its body in OpenAI's form."""
    for kind, status, name, code in _STATUS:
        if isinstance(error, kind):
            return status, _error(str(error), name, code)
    return 500, _error(str(error), "server_error", None)


def _error(message: str, kind: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def _on_our_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, FastLoraError)
    status, body = _error_of(error)
    headers = {"Retry-After": str(_RETRY_SECONDS)} if status in (429, 503) else None
    return _JSON(body, status, headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = _error(str(error.detail), "invalid_request_error", None)
    return _JSON(body, error.status_code, error.headers)


async def _on_wrong_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    name = ".".join(place) or None
    what = "is not supported" if first["type"] == "extra_forbidden" else first["msg"]
    message = f"{name}: {what}" if name else f"the body is wrong: {what}"
    return _JSON(_error(message, "invalid_request_error", None, name), 400)


async def _on_fault(request: Request, error: Exception) -> Response:
    return _JSON(_error("the server failed at this request", "server_error", None), 500)


class _Gate:
    """Asks for the key, bounds the body, and counts answers; closest to the wire."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        most, read = self._settings.most_bytes, 0
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
            body = _error(message, "invalid_request_error", "invalid_api_key")
            await _JSON(body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, noted)
        elif length.isdigit() and int(length[:19]) > most:
            body = _error(too_long, "invalid_request_error", None)
            await _JSON(body, 413, {"Connection": "close"})(scope, receive, noted)
        else:
            await self._app(scope, counted, noted)

    def _may(self, scope: Scope, given: bytes) -> bool:
        key = self._settings.api_key
        if key is None or scope["path"] in _OPEN:
            return True
        return hmac.compare_digest(given, f"Bearer {key}".encode())
