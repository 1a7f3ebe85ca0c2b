"""Continuous batching: requests join and leave between two tokens, each with its own adapter.

One thread runs the model. A turn of it lets waiting requests in, reads a part of their prompts, and
makes the next token of every request that runs. A batch never holds more adapters than the pool has
slots, since nobody joins whose adapter would not fit beside the others: `AdapterPool.plan` says so.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastlora.pool import AdapterPool, Lease
from fastlora.routing.block import adapters as routed_to
from fastlora.serve.adapters import ServedAdapters, Version
from fastlora.serve.rows import Rows
from fastlora.serve.sampling import Sampling, choose
from fastlora.serve.text import AnswerText
from fastlora.validation import CheckpointError, ConfigError, FastLoraError, PoolFullError

_log = logging.getLogger("fastlora.serve")
# Tokens of prompts in one forward: who already answers waits no longer than for these.
PREFILL_TOKENS = 512


class QueueFullError(FastLoraError):
    """As many requests wait as may; the client is to come again later."""


class ClosedError(FastLoraError):
    """The server is ending and takes no more requests."""


class FailedError(FastLoraError):
    """The server could not go on with a request."""


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
    """A request.

    Attributes:
        prompt: Its tokens.
        version: Its adapter, or None for the base model.
        sampling: How tokens are chosen; ``max_tokens`` is a number by now.
        hear: Called with each `Piece`, in the engine's thread; must not block.
        came: When, by `time.monotonic`.
        first: When its first token was there.
        passed: How many later requests went before it because their adapters fit and its did not.
        cancelled: Nobody listens any more.
    """

    prompt: list[int]
    version: Version | None
    sampling: Sampling
    hear: Callable[[Piece], None]
    came: float = field(default_factory=time.monotonic)
    first: float | None = None
    passed: int = 0
    cancelled: bool = False
    ended: bool = False


@dataclass(eq=False)
class _Running:
    """A request that has a row; its place in the list is the row."""

    job: Job
    lease: Lease | None
    text: AnswerText
    generator: torch.Generator
    done: int = 0  # positions of the row
    tokens: list[int] = field(default_factory=list)

    @property
    def pooled(self) -> str | None:
        return None if self.job.version is None else self.job.version.pooled


@dataclass
class EngineStats:
    """What an engine has done, for metrics; seconds are of the wall."""

    requests: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    forwards: int = 0
    forward_rows: int = 0
    forward_seconds: float = 0.0
    first_token_seconds: float = 0.0
    first_tokens: int = 0


class Engine:
    """Runs requests on one model.

    Args:
        model: A causal language model from transformers, in evaluation mode, that ``adapters.pool``
            was made for.
        tokenizer: Its own; the engine's thread decodes with it, so nobody else may.
        adapters: Versions come from here and go back there.
        rows: How many requests run at once.
        length: Most tokens of prompt and answer together; None for the model's own limit, at most
            2,048.
        most_waiting: How many requests may wait beside those that run.

    Attributes:
        stats: Numbers; written by the engine's thread, and by `submit`.
        length: As given, or found.

    Raises:
        UnsupportedLayerError, ConfigError: As `Rows`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        adapters: ServedAdapters,
        *,
        rows: int = 32,
        length: int | None = None,
        most_waiting: int = 128,
    ) -> None:
        for name, value in (("rows", rows), ("most_waiting", most_waiting)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        self._model, self._tokenizer, self._adapters = model, tokenizer, adapters
        self._pool: AdapterPool = adapters.pool
        self._rows, self._most_rows = Rows(model, rows, length), rows
        self.length, self._most_waiting = self._rows.length, most_waiting
        self._ends = _end_tokens(model, tokenizer)
        self.stats = EngineStats()
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        # Those that answer, then those that have a part of their prompt to read.
        self._running: list[_Running] = []
        self._answering = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="fastlora-engine", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------------------- for any thread

    def submit(
        self,
        prompt: Sequence[int],
        adapter: str | None,
        sampling: Sampling,
        hear: Callable[[Piece], None],
    ) -> Job:
        """Takes a request.

        Args:
            prompt: Tokens.
            adapter: A name, or None for the base model.
            sampling: How tokens are chosen.
            hear: Called with each `Piece` in the engine's thread.

        Raises:
            ConfigError: The prompt is empty, or leaves no room for the answer.
            AdapterNotFoundError: There is no such adapter.
            CheckpointError: It is damaged.
            QueueFullError: Too many wait.
            ClosedError: The engine is ending.
        """
        sampling = self._fitting(prompt, sampling)
        with self._changed:
            if self._closing:
                raise ClosedError("the server is shutting down")
            if len(self._waiting) >= self._most_waiting:
                self.stats.refused += 1
                raise QueueFullError(
                    f"{len(self._waiting)} requests wait already; try again in a moment"
                )
            version = None if adapter is None else self._adapters.take(adapter)
            job = Job(list(prompt), version, sampling, hear)
            self._waiting.append(job)
            self.stats.requests += 1
            self._changed.notify_all()
        if version is not None:
            self._adapters.prepare(version, self._wake)
        return job

    def cancel(self, job: Job) -> None:
        """Ends a request that nobody listens to; its place is free with the next token."""
        job.cancelled = True
        self._wake()

    def close(self, timeout: float | None = None) -> None:
        """Takes no more requests, and waits until those that are there have ended.

        What has not ended when ``timeout`` seconds are over fails with `ClosedError`.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        if self._thread.is_alive():
            with self._changed:
                for job in [*self._waiting, *(own.job for own in self._running)]:
                    job.cancelled = True
                self._changed.notify_all()
            self._thread.join()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have a row."""
        return len(self._running)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    @property
    def closing(self) -> bool:
        """Whether it takes no more requests."""
        return self._closing

    def _fitting(self, prompt: Sequence[int], sampling: Sampling) -> Sampling:
        """Returns the settings with a number of tokens that fits behind the prompt."""
        if not prompt:
            raise ConfigError("the prompt is empty")
        room = self.length - len(prompt)
        if room < (sampling.max_tokens or 1):
            asked = "" if sampling.max_tokens is None else f" and max_tokens={sampling.max_tokens}"
            raise ConfigError(
                f"the prompt has {len(prompt)} tokens{asked}; prompt and answer together may have "
                f"{self.length}"
            )
        most = room if sampling.max_tokens is None else sampling.max_tokens
        return Sampling(most, sampling.temperature, sampling.top_p, sampling.seed, sampling.stop)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # ------------------------------------------------------------------------- the engine's thread

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._running or self._has_work()):
                    if self._closing and not self._waiting:
                        return
                    self._changed.wait()
            try:
                self._turn()
            except Exception as error:  # a fault of ours must not leave requests without an end
                _log.exception("a turn of the engine failed")
                for own in list(self._running):
                    self._fail(own, error)

    def _turn(self) -> None:
        self._sweep()
        self._admit()
        if self._answering < len(self._running):
            self._read_prompts()
        if self._answering:
            self._answer()

    def _has_work(self) -> bool:
        """Whether one that waits can go on, or has to be told of its end."""
        return any(
            job.cancelled or job.version is None or job.version.ready or job.version.error
            for job in self._waiting
        )

    def _sweep(self) -> None:
        """Ends what was cancelled."""
        for own in [own for own in self._running if own.job.cancelled]:
            self._leave(own)
        with self._changed:
            gone = [job for job in self._waiting if job.cancelled]
            for job in gone:
                self._waiting.remove(job)
        for job in gone:
            self._end(job, None)

    def _admit(self) -> None:
        """Gives rows to those that wait, in the order of their coming.

        Who has an adapter that does not fit now is passed by later ones, but by no more of them
        than there are rows.
        """
        blocked: list[Job] = []
        with self._changed:
            waiting = list(self._waiting)
        for job in waiting:
            if len(self._running) == self._most_rows:
                return
            if any(other.passed >= self._most_rows for other in blocked):
                return
            version, lease = job.version, None
            if version is not None:
                if version.error is None and not version.ready:
                    continue
                try:
                    lease = self._leased(version)
                except FastLoraError as error:
                    self._drop_waiting(job, error)
                    continue
                if lease is None:
                    blocked.append(job)
                    continue
            for other in blocked:
                other.passed += 1
            with self._changed:
                self._waiting.remove(job)
                text = AnswerText(self._tokenizer, job.prompt, job.sampling.stop)
                self._running.append(_Running(job, lease, text, job.sampling.generator()))

    def _leased(self, version: Version) -> Lease | None:
        """Returns a lease on an adapter; None where it has to wait for others to leave.

        Raises `CheckpointError` where it is damaged, `PoolFullError` where it never fits.
        """
        if version.error is not None:
            raise CheckpointError(f"adapter {version.name!r} cannot be used: {version.error}")
        held = [own.pooled for own in self._running]
        if len(self._pool.plan([*held, version.pooled])) > 1:
            return None
        try:
            # Where nobody runs, nobody will leave: the pool says whether there can be room.
            return self._pool.lease([version.pooled], timeout=0.0 if any(held) else None)
        except PoolFullError:
            if any(held):
                return None
            raise

    def _read_prompts(self) -> None:
        """Runs a part of the prompts: a part of a long one, or several whole short ones."""
        first = self._answering
        chosen = [self._running[first]]
        long = chosen[0].done or len(chosen[0].job.prompt) > PREFILL_TOKENS
        for own in () if long else self._running[first + 1 :]:
            widest = max(len(other.job.prompt) for other in (*chosen, own))
            if own.done or widest * (len(chosen) + 1) > PREFILL_TOKENS:
                break
            chosen.append(own)
        parts = [own.job.prompt[own.done :][:PREFILL_TOKENS] for own in chosen]
        logits = self._forward(chosen, first, parts)
        if logits is None:
            return
        for own, part in zip(chosen, parts, strict=True):
            own.done += len(part)
            self.stats.prompt_tokens += len(part)
        if chosen[0].done == len(chosen[0].job.prompt):
            self._answering += len(chosen)
            self._choose(chosen, logits)

    def _answer(self) -> None:
        """Makes the next token of all that answer."""
        chosen = self._running[: self._answering]
        logits = self._forward(chosen, 0, [own.tokens[-1:] for own in chosen])
        if logits is None:
            return
        for own in chosen:
            own.done += 1
        self._choose(chosen, logits)

    def _forward(
        self, chosen: Sequence[_Running], first: int, parts: Sequence[Sequence[int]]
    ) -> torch.Tensor | None:
        """Returns the logits ``[n, V]`` of some rows; where the forward fails, so do they."""
        names = [own.pooled for own in chosen]
        start = time.perf_counter()
        try:
            block = routed_to(self._pool, names) if any(names) else contextlib.nullcontext()
            with block:
                logits = self._rows.forward(first, [own.done for own in chosen], parts)
        except Exception as error:  # out of memory, say: others go on
            _log.exception("a forward of %d rows failed", len(chosen))
            for own in chosen:
                self._fail(own, error)
            return None
        self.stats.forwards += 1
        self.stats.forward_rows += len(chosen)
        self.stats.forward_seconds += time.perf_counter() - start
        return logits

    def _choose(self, chosen: Sequence[_Running], logits: torch.Tensor) -> None:
        """Takes the next token of each row, says what is new, and lets go who is at the end."""
        settings = [own.job.sampling for own in chosen]
        tokens = choose(logits, settings, [own.generator for own in chosen])
        for own, token in zip(chosen, tokens, strict=True):
            if token is None:
                self._fail(own, _not_finite(own.job.version))
            else:
                self._take(own, token)

    def _take(self, own: _Running, token: int) -> None:
        job = own.job
        own.tokens.append(token)
        self.stats.answer_tokens += 1
        if job.first is None:
            job.first = time.monotonic()
            self.stats.first_tokens += 1
            self.stats.first_token_seconds += job.first - job.came
        reason, text = None, ""
        if token in self._ends:
            reason = "stop"
        else:
            text = own.text.add(token)
            if not own.text.stopped and len(own.tokens) == job.sampling.max_tokens:
                reason = "length"
        if reason is not None:
            text += own.text.end()
        if own.text.stopped:
            reason = "stop"
        if text or reason:
            self._say(job, Piece(text, reason, len(own.tokens)))
        if reason is not None:
            job.ended = True
            self.stats.finished += 1
            self._leave(own)

    # --------------------------------------------------------------------------------- leaving

    def _fail(self, own: _Running, error: Exception) -> None:
        if own not in self._running:
            return
        known = (
            error
            if isinstance(error, FastLoraError)
            else FailedError(f"the server failed at this request ({type(error).__name__})")
        )
        self._leave(own, known)

    def _leave(self, own: _Running, error: FastLoraError | None = None) -> None:
        """Frees a request's row; the last ones take the place of those that left."""
        row = self._running.index(own)
        if error is not None or not own.tokens:  # nobody has looked whether its values are finite
            self._rows.cache.clear(row)
        if row < self._answering:
            self._answering -= 1
            self._move(self._answering, row)
            row = self._answering
        self._move(len(self._running) - 1, row)
        self._running.pop()
        if own.lease is not None:
            own.lease.release()
        self._end(own.job, error)

    def _move(self, source: int, target: int) -> None:
        if source != target:
            own = self._running[source]
            self._rows.cache.move(source, target, own.done)
            self._running[target] = own

    def _drop_waiting(self, job: Job, error: FastLoraError) -> None:
        with self._changed:
            self._waiting.remove(job)
        self._end(job, error)

    def _end(self, job: Job, error: FastLoraError | None) -> None:
        if job.version is not None:
            self._adapters.give_back(job.version)
        if job.ended:
            return
        job.ended = True
        if error is None:
            self.stats.cancelled += 1
            error = ClosedError("the request was ended")
        else:
            self.stats.failed += 1
        self._say(job, Piece(error=error))

    def _say(self, job: Job, piece: Piece) -> None:
        try:
            job.hear(piece)
        except Exception:  # its owner is gone
            job.cancelled = True


def _not_finite(version: Version | None) -> FastLoraError:
    """Returns the error for logits that are not finite, which an adapter is to blame for."""
    what = "numbers that are not finite"
    if version is None:
        return FailedError(f"the base model gives {what}")
    return CheckpointError(f"adapter {version.name!r} cannot be used: it gives {what}")


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Returns the tokens that end an answer: the model's, and the tokenizer's."""
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {*(given if isinstance(given, (list, tuple)) else [given]), tokenizer.eos_token_id}
    return frozenset(end for end in ends if end is not None)
