"""The running requests of an engine. Each request has one row in the key-value cache.

This module takes no locks: only the engine's thread calls it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from fastlora.pool import AdapterPool
from fastlora.routing.block import adapters as routed_to
from fastlora.routing.in_force import follows_rows
from fastlora.serve.adapters import Version
from fastlora.serve.job import EngineStats, FailedError, Job, Piece, told
from fastlora.serve.rows import Rows
from fastlora.serve.sampling import choose
from fastlora.validation import CheckpointError, FastLoraError

_log = logging.getLogger("fastlora.serve")
# Maximum number of prompt tokens in a forward pass. It bounds how long running requests wait.
PREFILL_TOKENS = 512


class HeldBlock:
    """A `fastlora.adapters` block that stays open from one forward pass to the next.

    It is closed when the rows use other adapters, when the pool replaces or unloads an adapter,
    when a forward pass fails, and after a forward pass in which the block tracked rows
    (`follows_rows`). While the block is open, it keeps its adapters on the device: call `close`
    before their requests release them.
    """

    def __init__(self, pool: AdapterPool) -> None:
        self._pool = pool
        self._held = contextlib.ExitStack()
        self._key: tuple[object, ...] | None = None  # adapters and pool state of the open block

    @contextlib.contextmanager
    def over(self, names: Sequence[str | None]) -> Iterator[None]:
        """Route each row of a forward pass in the ``with`` block to an adapter of the pool."""
        key = (self._pool.replaced, *names)
        if key != self._key:
            self.close()
            if any(names):
                self._held.enter_context(routed_to(self._pool, names))
        self._key = None
        with self._held.pop_all() as held:
            yield
            if not follows_rows():
                self._held, self._key = held.pop_all(), key

    def close(self) -> None:
        """Close the block if it is open."""
        self._key = None
        self._held.close()


class Batch:
    """Process the prompts of the running requests, and generate tokens for them.

    ``ended`` is called with each request that leaves the batch and its error, if any.

    Attributes:
        jobs: The requests, each at the index of its row: first the requests that generate tokens,
            then the requests whose prompts have not been processed completely.
    """

    def __init__(
        self,
        ends: Collection[int],
        pool: AdapterPool,
        rows: Rows,
        stats: EngineStats,
        ended: Callable[[Job, FastLoraError | None], None],
    ) -> None:
        self._ends, self._rows = ends, rows
        self._stats, self._ended = stats, ended
        self._block = HeldBlock(pool)
        self.jobs: list[Job] = []
        self._answering = 0

    @property
    def adapters(self) -> list[str]:
        """Names in the pool of the adapters in use: one name per request with an adapter."""
        return [job.pooled for job in self.jobs if job.pooled is not None]

    def drop_cancelled(self) -> None:
        """Remove all canceled requests from the batch."""
        for job in [job for job in self.jobs if job.cancelled]:
            self._leave(job)

    def fail(self, error: Exception) -> None:
        """End all running requests with an error."""
        for job in list(self.jobs):
            self._fail(job, error)

    def close(self) -> None:
        """Close the `fastlora.adapters` block that the last forward pass left open."""
        self._block.close()

    def turn(self) -> None:
        """Process part of the pending prompts, then generate a token for each complete prompt."""
        if self._answering < len(self.jobs):
            self._run(self._answering, self._next_prompts())
        if self._answering:
            self._run(0, self.jobs[: self._answering])

    def _next_prompts(self) -> list[Job]:
        """Return the requests whose prompts are next: one long prompt, or several short prompts."""
        first, *others = self.jobs[self._answering :]
        chosen, widest = [first], len(first.prompt)
        for job in others:
            widest = max(widest, len(job.prompt))
            if widest * (len(chosen) + 1) > PREFILL_TOKENS:  # even if `first` is partly read
                break
            chosen.append(job)
        return chosen

    def _run(self, first: int, chosen: Sequence[Job]) -> None:
        """Run a forward pass for requests in adjacent rows, which begin at row ``first``.

        If their prompts are now complete, choose their next tokens. If the forward pass fails, the
        requests in it fail.
        """
        parts = [(job.prompt[job.done :] or job.tokens[-1:])[:PREFILL_TOKENS] for job in chosen]
        names = [job.pooled for job in chosen]
        start = time.perf_counter()
        try:
            with self._block.over(names):
                logits = self._rows.forward(first, [job.done for job in chosen], parts)
        except Exception as error:  # for instance out of memory; others continue
            _log.exception("a forward pass with %d rows failed", len(chosen))
            for job in chosen:
                self._fail(job, error)
            return
        self._stats.forwards += 1
        self._stats.forward_rows += len(chosen)
        self._stats.forward_seconds += time.perf_counter() - start
        reads = first == self._answering
        for job, part in zip(chosen, parts, strict=True):
            job.done += len(part)
            self._stats.prompt_tokens += reads * len(part)
        if chosen[0].done >= len(chosen[0].prompt):
            self._answering += reads * len(chosen)
            self._choose(chosen, logits)

    def _choose(self, chosen: Sequence[Job], logits: torch.Tensor) -> None:
        """Choose the next token of each row, send new text, and remove finished requests."""
        settings = [job.sampling for job in chosen]
        tokens = choose(logits, settings, [job.generator for job in chosen])
        for job, token in zip(chosen, tokens, strict=True):
            if token is None:
                self._fail(job, _not_finite(job.version))
            else:
                self._take(job, token)

    def _take(self, job: Job, token: int) -> None:
        job.tokens.append(token)
        self._stats.answer_tokens += 1
        if len(job.tokens) == 1:
            self._stats.first_tokens += 1
            self._stats.first_token_seconds += time.monotonic() - job.came
        reason, text = None, ""
        if token in self._ends:
            reason = "stop"
        else:
            text = job.text.add(token)
            if not job.text.stopped and len(job.tokens) == job.sampling.max_tokens:
                reason = "length"
        if reason is not None:
            text += job.text.end()
        if job.text.stopped:
            reason = "stop"
        if text or reason:
            job.say(Piece(text, reason, len(job.tokens)))
        if reason is not None:
            job.ended = True
            self._stats.requests_finished += 1
            self._leave(job)

    def _fail(self, job: Job, error: Exception) -> None:
        if job in self.jobs:
            self._leave(job, told(error))

    def _leave(self, job: Job, error: FastLoraError | None = None) -> None:
        """Remove a request from the batch, and close the gap by moving the last rows."""
        self._block.close()
        row = self.jobs.index(job)
        if error is not None or not job.tokens:  # cached values may be non-finite
            self._rows.cache.clear(row)
        if row < self._answering:
            self._answering -= 1
            self._move(self._answering, row)
            row = self._answering
        self._move(len(self.jobs) - 1, row)
        self.jobs.pop()
        if job.lease is not None:
            job.lease.release()
            job.lease = None  # a slow client keeps the job, and would keep an evicted adapter alive
        self._ended(job, error)

    def _move(self, source: int, target: int) -> None:
        if source != target:
            job = self.jobs[source]
            self._rows.cache.move(source, target, job.done)
            self.jobs[target] = job


def _not_finite(version: Version | None) -> FastLoraError:
    """Return the error for non-finite logits, which names the adapter of the request, if any."""
    what = "logits that are not finite"
    if version is None:
        return FailedError(f"the base model returns {what}")
    return CheckpointError(f"adapter {version.served_as!r} cannot be used: it returns {what}")
