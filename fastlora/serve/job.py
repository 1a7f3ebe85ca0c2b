"""A request to the engine, what its owner hears of it, and what became of all of them."""

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
    """As many requests wait as may; the client is to come again later."""


class ClosedError(FastLoraError):
    """The server is ending and takes no more requests."""


class FailedError(FastLoraError):
    """The server could not go on with a request."""


def told(error: Exception) -> FastLoraError:
    """Returns what a request's owner is told of an error; a fault of ours says its kind only."""
    if isinstance(error, FastLoraError):
        return error
    return FailedError(f"the server failed at this request ({type(error).__name__})")


@dataclass(frozen=True)
class Piece:
    """What a request's owner hears of it.

    Attributes:
        text: The next part of the answer.
        reason: Why the answer is at its end: ``stop`` or ``length``; None while it is not.
        tokens: Tokens of the answer so far.
        error: Why it failed; nothing follows.
    """

    text: str = ""
    reason: str | None = None
    tokens: int = 0
    error: FastLoraError | None = None


@dataclass(eq=False)
class Job:
    """A request; while it runs, its place in the batch is its row.

    Attributes:
        prompt: Its tokens.
        version: Its adapter, or None for the base model.
        sampling: How tokens are chosen; ``max_tokens`` is a number by now.
        hear: Called with each `Piece`, in the engine's thread; must not block.
        text: Makes text of its tokens.
        lease: Keeps its adapter on the device while it runs.
        tokens: Those of the answer so far.
        done: Positions of its row that are in the cache.
        came: When, by `time.monotonic`.
        passed: How many later requests went before it because their adapters fit and its did not.
        cancelled: Nobody listens any more.
        ended: Its owner has heard the last piece.
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
        """Its adapter's name in the pool."""
        return None if self.version is None else self.version.name

    def say(self, piece: Piece) -> None:
        """Lets its owner hear a piece."""
        try:
            self.hear(piece)
        except Exception:  # its owner is gone
            self.cancelled = True


def _counts(what: str, start: float = 0) -> Any:
    return field(default=start, metadata={"what": what})


@dataclass
class EngineStats:
    """What an engine has done, a field a counter of the metrics' page; seconds are the wall's."""

    requests: int = _counts("Requests that were taken.")
    requests_finished: int = _counts("Requests that came to their end.")
    requests_failed: int = _counts("Requests that failed.")
    requests_cancelled: int = _counts("Requests that nobody listened to any more.")
    requests_refused: int = _counts("Requests that the queue had no place for.")
    prompt_tokens: int = _counts("Tokens of prompts that were read.")
    answer_tokens: int = _counts("Tokens that were made.")
    forwards: int = _counts("Forwards of the model.")
    forward_rows: int = _counts("Requests in these forwards.")
    forward_seconds: float = _counts("Seconds in these forwards.", 0.0)
    first_tokens: int = _counts("Requests that had a first token.")
    first_token_seconds: float = _counts("Seconds until those.", 0.0)
