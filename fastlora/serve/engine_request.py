"""A request to the engine, the chunks of its answer, and counters over all requests."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastlora.pool import Lease
from fastlora.serve.adapters import AdapterVersion
from fastlora.serve.detokenizer import IncrementalDetokenizer
from fastlora.serve.sampling import SamplingParams
from fastlora.validation import FastLoraError


class QueueFullError(FastLoraError):
    """Too many requests are waiting.

    The client should try again later.
    """


class ClosedOrCanceledError(FastLoraError):
    """The engine is closed, or the request was canceled."""


class RequestFailedError(FastLoraError):
    """A request failed while it was processed.

    The cause is a failure of the server.
    """


def to_client_error(error: Exception) -> FastLoraError:
    """Convert an exception to a `FastLoraError` that can be shown to the client.

    A `FastLoraError` is returned unchanged. Any other exception is converted to a
    `RequestFailedError`, which hides internal details.
    """
    if isinstance(error, FastLoraError):
        return error
    return RequestFailedError(f"the server failed to process this request ({type(error).__name__})")


@dataclass(frozen=True)
class AnswerChunk:
    """A chunk of an answer.

    A chunk contains the next part of the answer's text, or an error. The last chunk has a finish
    reason or an error.

    Attributes:
        text: The next part of the text.
        finish_reason: ``"stop"`` or ``"length"`` at the end of the answer; None before.
        tokens: Number of tokens in the answer so far.
        error: Error that made the request fail, or None. No chunk follows an error.
    """

    text: str = ""
    finish_reason: str | None = None
    tokens: int = 0
    error: FastLoraError | None = None


@dataclass(eq=False)
class EngineRequest:
    """A request to the engine.

    The index of a running request in the batch is its row in the key-value cache.

    Attributes:
        prompt: Tokens of the prompt.
        version: Version of the adapter, or None for the base model.
        sampling: Sampling settings, with a number as ``max_tokens``.
        on_chunk: Function that is called with each chunk in the engine's thread. It must not block.
        detokenizer: Decoder of the answer.
        lease: Lease that keeps the adapter on the device while the request runs.
        tokens: Tokens of the answer so far.
        done: Number of cached positions in the row of the request.
        arrival_time: Time of arrival, from `time.monotonic`.
        overtaken: Number of later requests that started earlier because their adapters fit and the
            adapter of this request did not.
        canceled: Whether no client waits for the answer.
        ended: Whether the last chunk has been sent.
    """

    prompt: list[int]
    version: AdapterVersion | None
    sampling: SamplingParams
    on_chunk: Callable[[AnswerChunk], None]
    detokenizer: IncrementalDetokenizer
    lease: Lease | None = None
    tokens: list[int] = field(default_factory=list)
    done: int = 0
    arrival_time: float = field(default_factory=time.monotonic)
    overtaken: int = 0
    canceled: bool = False
    ended: bool = False

    def __post_init__(self) -> None:
        self.generator = self.sampling.make_generator()

    @property
    def pool_adapter_name(self) -> str | None:
        """Name of the adapter in the pool.

        The name is None if the request uses the base model.
        """
        return None if self.version is None else self.version.name

    def emit(self, chunk: AnswerChunk) -> None:
        """Send a chunk of the answer to the request's consumer.

        The chunk is passed to the callback ``on_chunk``. If the callback raises an exception, the
        request is canceled.
        """
        try:
            self.on_chunk(chunk)
        except Exception:  # the client is gone
            self.canceled = True


def _counter(what: str, start: float = 0) -> Any:
    return field(default=start, metadata={"what": what})


@dataclass
class EngineCounters:
    """Engine-wide counters, totaled over all requests, such as the number of generated tokens.

    The counters cover requests, tokens, and forward passes. Each field is exported as a metric.
    Times are wall-clock times in seconds.
    """

    requests: int = _counter("Accepted requests.")
    requests_finished: int = _counter("Completed requests.")
    requests_failed: int = _counter("Failed requests.")
    requests_cancelled: int = _counter("Requests canceled because the client disconnected.")
    requests_refused: int = _counter("Requests rejected because the queue was full.")
    prompt_tokens: int = _counter("Processed prompt tokens.")
    answer_tokens: int = _counter("Generated tokens.")
    forwards: int = _counter("Forward passes of the model.")
    forward_rows: int = _counter("Requests in these forward passes, in total.")
    forward_seconds: float = _counter("Seconds spent in these forward passes.", 0.0)
    first_tokens: int = _counter("Requests that received a first token.")
    first_token_seconds: float = _counter("Seconds until the first token, in total.", 0.0)
