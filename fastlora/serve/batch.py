"""The requests that run: each has a row of keys and values, and each forward serves many of them.

Nothing here locks; the engine's thread is the only one that calls it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastlora.integrations.transformers import end_tokens
from fastlora.pool import AdapterPool, Lease
from fastlora.routing.block import adapters as routed_to
from fastlora.serve.adapters import Version
from fastlora.serve.job import EngineStats, FailedError, Job, Piece, told
from fastlora.serve.rows import Rows
from fastlora.serve.sampling import choose
from fastlora.serve.text import AnswerText
from fastlora.validation import CheckpointError, FastLoraError

_log = logging.getLogger("fastlora.serve")
# Tokens of prompts in one forward: who already answers waits no longer than for these.
PREFILL_TOKENS = 512


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


class Batch:
    """Reads prompts and makes tokens; ``ended`` hears of each request that leaves, and why."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        pool: AdapterPool,
        rows: Rows,
        stats: EngineStats,
        ended: Callable[[Job, FastLoraError | None], None],
    ) -> None:
        self._tokenizer, self._pool, self._rows = tokenizer, pool, rows
        self._stats, self._ended = stats, ended
        self._ends = end_tokens(model, tokenizer)
        # Those that answer, then those that have a part of their prompt to read.
        self._running: list[_Running] = []
        self._answering = 0

    def __len__(self) -> int:
        return len(self._running)

    @property
    def jobs(self) -> list[Job]:
        """The requests."""
        return [own.job for own in self._running]

    @property
    def adapters(self) -> list[str]:
        """Their adapters, by their names in the pool; a name comes as often as it is used."""
        return [own.pooled for own in self._running if own.pooled is not None]

    def add(self, job: Job, lease: Lease | None) -> None:
        """Gives a request a row, of which one must be free; the lease ends when it leaves."""
        text = AnswerText(self._tokenizer, job.prompt, job.sampling.stop)
        self._running.append(_Running(job, lease, text, job.sampling.generator()))

    def drop_cancelled(self) -> None:
        """Ends those that nobody listens to."""
        for own in [own for own in self._running if own.job.cancelled]:
            self._leave(own)

    def fail(self, error: Exception) -> None:
        """Ends all of them."""
        for own in list(self._running):
            self._fail(own, error)

    def turn(self) -> None:
        """Reads a part of the prompts, and makes the next token of all that answer."""
        if self._answering < len(self._running):
            self._read_prompts()
        if self._answering:
            self._answer()

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
            self._stats.prompt_tokens += len(part)
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
        self._stats.forwards += 1
        self._stats.forward_rows += len(chosen)
        self._stats.forward_seconds += time.perf_counter() - start
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
        self._stats.answer_tokens += 1
        if job.first is None:
            job.first = time.monotonic()
            self._stats.first_tokens += 1
            self._stats.first_token_seconds += job.first - job.came
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
            job.say(Piece(text, reason, len(own.tokens)))
        if reason is not None:
            job.ended = True
            self._stats.finished += 1
            self._leave(own)

    # --------------------------------------------------------------------------------- leaving

    def _fail(self, own: _Running, error: Exception) -> None:
        if own in self._running:
            self._leave(own, told(error))

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
        self._ended(own.job, error)

    def _move(self, source: int, target: int) -> None:
        if source != target:
            own = self._running[source]
            self._rows.cache.move(source, target, own.done)
            self._running[target] = own


def _not_finite(version: Version | None) -> FastLoraError:
    """Returns the error for logits that are not finite, which an adapter is to blame for."""
    what = "numbers that are not finite"
    if version is None:
        return FailedError(f"the base model gives {what}")
    return CheckpointError(f"adapter {version.name!r} cannot be used: it gives {what}")
