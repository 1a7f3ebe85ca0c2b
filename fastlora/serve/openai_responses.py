"""Send an answer to a client, as one JSON body or as server-sent events, in OpenAI's formats."""

from __future__ import annotations

import abc
import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from fastlora.serve.engine import Engine
from fastlora.serve.engine_request import AnswerChunk, EngineRequest
from fastlora.serve.exception_handlers import to_status_and_body
from fastlora.serve.sampling import SamplingParams
from fastlora.validation import FastLoraError

_T = TypeVar("_T")


class AsyncAnswerStream:
    """An asynchronous stream of the chunks of text generated for a request.

    A coroutine reads the chunks while the engine produces them in another thread. A subclass of
    `BaseAnswerFormat` converts the chunks to responses in OpenAI's format. Creating a stream
    submits the request, and may raise the errors of `Engine.submit`.
    """

    def __init__(
        self, engine: Engine, tokens: list[int], adapter: str | None, sampling: SamplingParams
    ) -> None:
        loop = asyncio.get_running_loop()
        self._chunks: asyncio.Queue[AnswerChunk] = asyncio.Queue()
        self._engine = engine

        def on_chunk(chunk: AnswerChunk) -> None:
            loop.call_soon_threadsafe(self._chunks.put_nowait, chunk)

        self._job: EngineRequest = engine.submit(tokens, adapter, sampling, on_chunk)

    async def next_chunk(self) -> AnswerChunk:
        """Return the next chunk.

        Raises the error of the request if the request has failed.
        """
        chunk = await self._chunks.get()
        if chunk.error is not None:
            raise chunk.error
        return chunk

    def cancel(self) -> None:
        """Cancel the request.

        No client is waiting for its answer.
        """
        self._engine.cancel(self._job)


class EventStreamResponse(StreamingResponse):
    """A response that is streamed as server-sent events.

    If the client disconnects, the request is canceled.
    """

    def __init__(self, answer: AsyncAnswerStream, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


class BaseAnswerFormat(abc.ABC):
    """Base class for the formats of answers, which are those of OpenAI-compatible API responses.

    Each subclass formats the answers of one endpoint, such as chat completions. An answer is
    formatted as JSON, either as a complete response or as the events of a streamed response.
    """

    prefix, kind, chunk_kind = "", "", ""

    def __init__(self, model: str, prompt_tokens: int) -> None:
        self._id, self._created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())
        self._model, self._prompt_tokens = model, prompt_tokens

    def full_body(self, text: str, last: AnswerChunk) -> dict[str, Any]:
        """Return the JSON body of a complete response in OpenAI's format.

        The body is that of a non-streaming response. ``text`` is the whole text of the answer,
        and ``last`` is its last chunk.
        """
        choice = self._full_choice(text, last.finish_reason)
        return {**self._head(self.kind), "choices": [choice], "usage": self._usage(last)}

    async def stream_events(
        self, answer: AsyncAnswerStream, first: AnswerChunk, usage: bool
    ) -> AsyncIterator[str]:
        """Yield the server-sent events of a streamed response.

        With ``usage``, the last chunk has the token counts.
        """
        chunk = first
        try:
            for opening in self._openings():
                yield self._event([opening], usage)
            while True:
                if chunk.text or chunk.finish_reason:
                    yield self._event([self._event_choice(chunk.text, chunk.finish_reason)], usage)
                if chunk.finish_reason is not None:
                    break
                chunk = await answer.next_chunk()
        except FastLoraError as error:  # the HTTP status has already been sent
            yield f"data: {json.dumps(to_status_and_body(error)[1])}\n\n"
        else:
            if usage:
                head = self._head(self.chunk_kind)
                yield _event({**head, "choices": [], "usage": self._usage(chunk)})
        yield "data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], usage: bool) -> str:
        counts = {"usage": None} if usage else {}
        return _event({**self._head(self.chunk_kind), "choices": choices, **counts})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _usage(self, last: AnswerChunk) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": last.tokens,
            "total_tokens": self._prompt_tokens + last.tokens,
        }

    @abc.abstractmethod
    def _full_choice(self, text: str, reason: str | None) -> dict[str, Any]:
        """Return the ``choices`` entry of a non-streaming response."""

    @abc.abstractmethod
    def _event_choice(self, text: str, reason: str | None) -> dict[str, Any]:
        """Return the ``choices`` entry of a server-sent event."""

    def _openings(self) -> list[dict[str, Any]]:
        return []


class CompletionFormat(BaseAnswerFormat):
    """The format of answers of the OpenAI-compatible completion endpoint.

    The responses and the events of a streamed response are in JSON.
    """

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _full_choice(self, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}

    _event_choice = _full_choice


class ChatCompletionFormat(BaseAnswerFormat):
    """The format of answers of the OpenAI-compatible chat completion endpoint.

    The responses and the events of a streamed response are in JSON.
    """

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _full_choice(self, text: str, reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}

    def _event_choice(self, text: str, reason: str | None) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}

    def _openings(self) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


async def result_unless_disconnected(request: Request, awaitable: Awaitable[_T]) -> _T | None:
    """Return the result of ``awaitable``, or None if the client disconnects first."""
    task = asyncio.ensure_future(awaitable)
    gone = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
