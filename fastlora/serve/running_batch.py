"""The running requests of an engine, each with one row in the key-value cache.

This module takes no locks, because only the engine's thread calls it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from fastlora.pool import AdapterPool
from fastlora.routing.active import is_checking_rows
from fastlora.routing.block import adapters as routed_to
from fastlora.serve.adapters import AdapterVersion
from fastlora.serve.engine_request import (
    AnswerChunk,
    EngineCounters,
    EngineRequest,
    RequestFailedError,
    to_client_error,
)
from fastlora.serve.model_runner import KVCacheModelRunner
from fastlora.serve.sampling import sample_tokens
from fastlora.validation import CheckpointError, FastLoraError

_log = logging.getLogger("fastlora.serve")
# Maximum number of prompt tokens in a forward pass. It bounds how long running requests wait.
PREFILL_TOKENS = 512


class PersistentAdaptersBlock:
    """A `fastlora.adapters` block that stays open across forward passes with the same adapters.

    The block is closed when the rows use other adapters, when the pool replaces or unloads an
    adapter, when a forward pass fails, and after a forward pass in which the block checked rows
    (`is_checking_rows`). While the block is open, it keeps its adapters on the device: call
    `close_adapters_block_if_open` before their requests release them.
    """

    def __init__(self, pool: AdapterPool) -> None:
        self._pool = pool
        self._held = contextlib.ExitStack()
        self._key: tuple[object, ...] | None = None  # adapters and pool state of the open block

    @contextlib.contextmanager
    def route_rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Route each row to the named adapter during the ``with`` block.

        The adapters are in the pool. A name of None stands for the base model.
        """
        key = (self._pool.replaced, *names)
        if key != self._key:
            self.close_adapters_block_if_open()
            if any(names):
                self._held.enter_context(routed_to(self._pool, names))
        self._key = None
        with self._held.pop_all() as held:
            yield
            if not is_checking_rows():
                self._held, self._key = held.pop_all(), key

    def close_adapters_block_if_open(self) -> None:
        """Close the `fastlora.adapters` block if it is open.

        The block is closed by exiting its context.
        """
        self._key = None
        self._held.close()


class RunningBatch:
    """The batch of requests that the engine is currently running.

    Requests join and leave the batch between forward passes. To generate the answer to a request,
    the batch processes the prompt and then decodes the tokens of the answer. When a request leaves
    the batch, ``ended`` is called with the request and its error, or None if there is no error.

    Attributes:
        jobs: The requests, each at the index of its row: first the requests that generate tokens,
            then the requests whose prompts have not been processed completely.
    """

    def __init__(
        self,
        ends: Collection[int],
        pool: AdapterPool,
        rows: KVCacheModelRunner,
        stats: EngineCounters,
        ended: Callable[[EngineRequest, FastLoraError | None], None],
    ) -> None:
        self._ends, self._rows = ends, rows
        self._stats, self._ended = stats, ended
        self._block = PersistentAdaptersBlock(pool)
        self.jobs: list[EngineRequest] = []
        self._decoding_count = 0

    @property
    def adapters_in_use(self) -> list[str]:
        """Names of the adapters in use.

        The names are those in the pool. There is one entry per request that uses an adapter.
        """
        return [job.pool_adapter_name for job in self.jobs if job.pool_adapter_name is not None]

    def remove_canceled(self) -> None:
        """Remove all canceled requests from the batch."""
        for job in [job for job in self.jobs if job.canceled]:
            self._remove_and_fill_from_end(job)

    def fail_all(self, error: Exception) -> None:
        """End all running requests with an error."""
        for job in list(self.jobs):
            self._fail(job, error)

    def close_adapters_block(self) -> None:
        """Close the `fastlora.adapters` block in which the batch runs.

        The last forward pass may have left the block open. Nothing happens if no block is open.
        """
        self._block.close_adapters_block_if_open()

    def prefill_and_decode(self) -> None:
        """Run one step of the batch: prefill pending prompts, and decode the next tokens.

        The step first prefills at most `PREFILL_TOKENS` prompt tokens, including padding. The step
        then decodes the next token of each request whose prompt has been processed completely.
        """
        if self._decoding_count < len(self.jobs):
            self._forward_and_choose_tokens(self._decoding_count, self._next_prefill_requests())
        if self._decoding_count:
            self._forward_and_choose_tokens(0, self.jobs[: self._decoding_count])

    def _next_prefill_requests(self) -> list[EngineRequest]:
        """Choose the requests to prefill next.

        The requests are chosen, in the order of their rows, from the requests in the batch that are
        waiting for prefill. A request waits for prefill until its prompt has been processed
        completely. The result is one request with a long prompt, or as many requests with short
        prompts as fit in one forward pass. A forward pass processes at most `PREFILL_TOKENS` prompt
        tokens, including padding.
        """
        first, *others = self.jobs[self._decoding_count :]
        chosen, widest = [first], len(first.prompt)
        for job in others:
            widest = max(widest, len(job.prompt))
            if widest * (len(chosen) + 1) > PREFILL_TOKENS:  # even if `first` is partly read
                break
            chosen.append(job)
        return chosen

    def _forward_and_choose_tokens(self, first_row: int, requests: Sequence[EngineRequest]) -> None:
        """Run a forward pass for some rows of the batch, and choose each request's next token.

        The given requests are in adjacent rows, starting at row ``first_row``. A long prompt takes
        several forward passes, and a token is chosen only after the last of them. If the forward
        pass fails, the requests in it fail.
        """
        parts = [(job.prompt[job.done :] or job.tokens[-1:])[:PREFILL_TOKENS] for job in requests]
        names = [job.pool_adapter_name for job in requests]
        start = time.perf_counter()
        try:
            with self._block.route_rows(names):
                logits = self._rows.last_token_logits(
                    first_row, [job.done for job in requests], parts
                )
        except Exception as error:  # for instance out of memory; others continue
            _log.exception("a forward pass with %d rows failed", len(requests))
            for job in requests:
                self._fail(job, error)
            return
        self._stats.forwards += 1
        self._stats.forward_rows += len(requests)
        self._stats.forward_seconds += time.perf_counter() - start
        reads = first_row == self._decoding_count
        for job, part in zip(requests, parts, strict=True):
            job.done += len(part)
            self._stats.prompt_tokens += reads * len(part)
        if requests[0].done >= len(requests[0].prompt):
            self._decoding_count += reads * len(requests)
            self._sample_and_emit_text(requests, logits)

    def _sample_and_emit_text(
        self, requests: Sequence[EngineRequest], logits: torch.Tensor
    ) -> None:
        """Sample the next token for each request, and emit the new text.

        Finished requests are removed from the batch.
        """
        settings = [job.sampling for job in requests]
        tokens = sample_tokens(logits, settings, [job.generator for job in requests])
        for job, token in zip(requests, tokens, strict=True):
            if token is None:
                self._fail(job, _non_finite_logits_error(job.version))
            else:
                self._append_token(job, token)

    def _append_token(self, job: EngineRequest, token: int) -> None:
        job.tokens.append(token)
        self._stats.answer_tokens += 1
        if len(job.tokens) == 1:
            self._stats.first_tokens += 1
            self._stats.first_token_seconds += time.monotonic() - job.arrival_time
        reason, text = None, ""
        if token in self._ends:
            reason = "stop"
        else:
            text = job.detokenizer.add_token(token)
            if not job.detokenizer.stopped and len(job.tokens) == job.sampling.max_tokens:
                reason = "length"
        if reason is not None:
            text += job.detokenizer.flush()
        if job.detokenizer.stopped:
            reason = "stop"
        if text or reason:
            job.emit(AnswerChunk(text, reason, len(job.tokens)))
        if reason is not None:
            job.ended = True
            self._stats.requests_finished += 1
            self._remove_and_fill_from_end(job)

    def _fail(self, job: EngineRequest, error: Exception) -> None:
        if job in self.jobs:
            self._remove_and_fill_from_end(job, to_client_error(error))

    def _remove_and_fill_from_end(
        self, job: EngineRequest, error: FastLoraError | None = None
    ) -> None:
        """Remove a request from the batch, and move a later request into the empty row.

        Nothing moves if the removed request was the last one of the batch. Otherwise, the last
        request of the batch moves into the empty row, unless the removed request was generating
        tokens. If the removed request was generating tokens, the last request that generates tokens
        moves into the empty row, and the last request of the batch moves into the row that is then
        empty.

        First, the open `fastlora.adapters` block is closed. Afterwards, the lease on the request's
        adapter is released, and the ``ended`` function is called with the request and ``error``.
        """
        self._block.close_adapters_block_if_open()
        row = self.jobs.index(job)
        if error is not None or not job.tokens:  # cached values may be non-finite
            self._rows.cache.zero_cache_row(row)
        if row < self._decoding_count:
            self._decoding_count -= 1
            self._move(self._decoding_count, row)
            row = self._decoding_count
        self._move(len(self.jobs) - 1, row)
        self.jobs.pop()
        if job.lease is not None:
            job.lease.release()
            job.lease = None  # a slow client keeps the job, and would keep an evicted adapter alive
        self._ended(job, error)

    def _move(self, source: int, target: int) -> None:
        if source != target:
            job = self.jobs[source]
            self._rows.cache.copy_row(source, target, job.done)
            self.jobs[target] = job


def _non_finite_logits_error(version: AdapterVersion | None) -> FastLoraError:
    """Return the error for a request with non-finite logits.

    The error names the request's adapter, if there is one.
    """
    what = "logits that are not finite"
    if version is None:
        return RequestFailedError(f"the base model returns {what}")
    return CheckpointError(f"adapter {version.served_as!r} cannot be used: it returns {what}")
