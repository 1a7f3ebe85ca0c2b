"""A request to the engine, the pieces of its answer, and counters over all requests."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastlora.pool import Lease
from fastlora.serve.adapters import Version
from fastlora.serve.sampling import Sampling
from fastlora.serve.text import AnswerText
from fastlora.validation import FastLoraError


class QueueFullError(FastLoraError):
    """Too many requests are waiting. The client should try again later."""


class ClosedError(FastLoraError):
    """The server is shutting down, or has ended a request before its answer was complete."""


class FailedError(FastLoraError):
    """The server failed while it processed a request."""


def told(error: Exception) -> FastLoraError:
    """Convert an exception to an error for clients, which hides details of internal errors."""
    if isinstance(error, FastLoraError):
        return error
    return FailedError(f"the server failed to process this request ({type(error).__name__})")


@dataclass(frozen=True)
class Piece:
    """A part of an answer, or the error that ends it.

    Attributes:
        text: The next part of the text.
        reason: Reason why the answer has ended, ``"stop"`` or ``"length"``; None before its end.
        tokens: Number of tokens in the answer so far.
        error: Error that made the request fail, or None. No piece follows an error.
    """

    text: str = ""
    reason: str | None = None
    tokens: int = 0
    error: FastLoraError | None = None


@dataclass(eq=False)
class Job:
    """A request to the engine.

    The index of a running request in the batch is its row in the key-value cache.

    Attributes:
        prompt: Tokens of the prompt.
        version: Version of the adapter, or None for the base model.
        sampling: Sampling settings, with a number as ``max_tokens``.
        hear: Function that is called with each `Piece` in the engine's thread. It must not block.
        text: Decoder of the answer.
        lease: Lease that keeps the adapter on the device while the request runs.
        tokens: Tokens of the answer so far.
        done: Number of cached positions in the row of the request.
        came: Time of arrival, from `time.monotonic`.
        passed: Number of later requests that started earlier because their adapters fit and the
            adapter of this request did not.
        cancelled: Whether no client waits for the answer.
        ended: Whether the last piece has been sent.
    """

    prompt: list[int]
    version: Version | None
    sampling: Sampling
    hear: Callable[[Piece], None]
    text: AnswerText
    lease: Lease | None = None
    tokens: list[int] = field(default_factory=list)
    done: int = 0
    came: float = field(default_factory=time.monotonic)
    passed: int = 0
    cancelled: bool = False
    ended: bool = False

    def __post_init__(self) -> None:
        self.generator = self.sampling.generator()

    @property
    def pooled(self) -> str | None:
        """Name of the adapter in the pool, or None for the base model."""
        return None if self.version is None else self.version.name

    def say(self, piece: Piece) -> None:
        """Send a piece to the client."""
        try:
            self.hear(piece)
        except Exception:  # the client is gone
            self.cancelled = True


def _counts(what: str, start: float = 0) -> Any:
    return field(default=start, metadata={"what": what})


@dataclass
class EngineStats:
    """Counters of an engine, each exported as a metric. Times are in wall-clock seconds."""

    requests: int = _counts("Accepted requests.")
    requests_finished: int = _counts("Completed requests.")
    requests_failed: int = _counts("Failed requests.")
    requests_cancelled: int = _counts("Requests canceled because the client disconnected.")
    requests_refused: int = _counts("Requests rejected because the queue was full.")
    prompt_tokens: int = _counts("Processed prompt tokens.")
    answer_tokens: int = _counts("Generated tokens.")
    forwards: int = _counts("Forward passes of the model.")
    forward_rows: int = _counts("Requests in these forward passes, in total.")
    forward_seconds: float = _counts("Seconds spent in these forward passes.", 0.0)
    first_tokens: int = _counts("Requests that received a first token.")
    first_token_seconds: float = _counts("Seconds until the first token, in total.", 0.0)
