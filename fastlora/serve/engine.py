"""Continuous batching: requests for different adapters join and leave between two tokens.

One thread runs the model. In each turn, it admits waiting requests, reads a part of their prompts,
and generates the next token of every running request. A batch never uses more adapters than the
pool has slots: a request joins only if `AdapterPool.plan` finds that its adapter fits beside the
others.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fastlora.integrations.transformers import end_token_ids
from fastlora.pool import AdapterPool, Lease
from fastlora.serve.adapters import AdapterVersion, ServedAdapters
from fastlora.serve.detokenizer import IncrementalDetokenizer
from fastlora.serve.engine_request import (
    AnswerChunk,
    ClosedOrCanceledError,
    EngineCounters,
    EngineRequest,
    QueueFullError,
    to_client_error,
)
from fastlora.serve.model_runner import KVCacheModelRunner
from fastlora.serve.running_batch import RunningBatch
from fastlora.serve.sampling import SamplingParams
from fastlora.validation import ConfigError, FastLoraError, PoolFullError

_log = logging.getLogger("fastlora.serve")


class Engine:
    """Runs generation requests for a model and its adapters.

    Up to ``rows`` requests run concurrently on the one model.

    Args:
        model: The model of ``adapters.pool``.
        tokenizer: The tokenizer. Only the engine's thread may use it.
        adapters: The adapters that requests can use.
        rows: Maximum number of running requests.
        length: Maximum number of tokens in a prompt and its answer. None uses the model's own
            limit, but at most 2,048.
        max_waiting: Maximum number of waiting requests.

    Raises:
        UnsupportedLayerError, ConfigError: See `KVCacheModelRunner`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        adapters: ServedAdapters,
        *,
        rows: int = 32,
        length: int | None = None,
        max_waiting: int = 128,
    ) -> None:
        self._adapters = adapters
        self._pool: AdapterPool = adapters.pool
        cached = KVCacheModelRunner(model, rows, length)
        self.length, self._max_rows, self._max_waiting = cached.length, rows, max_waiting
        self.stats = EngineCounters()
        self._changed = threading.Condition()
        self._waiting: deque[EngineRequest] = deque()
        self._tokenizer, ends = tokenizer, end_token_ids(model, tokenizer)
        self._running = RunningBatch(
            ends, self._pool, cached, self.stats, self._release_adapter_and_report_failure
        )
        self._closing = False
        self._thread = threading.Thread(
            target=self._thread_main, name="fastlora-engine", daemon=True
        )
        self._thread.start()

    def submit(
        self,
        prompt: Sequence[int],
        adapter: str | None,
        sampling: SamplingParams,
        on_chunk: Callable[[AnswerChunk], None],
    ) -> EngineRequest:
        """Submit a request to process a prompt.

        The request is created, added to the queue, and returned.

        Args:
            prompt: Tokens of the prompt.
            adapter: Name of the adapter, or None for the base model.
            sampling: Sampling settings.
            on_chunk: Function that is called with each chunk of the answer, in the engine's thread.

        Raises:
            ConfigError: The prompt is empty, or leaves no room for the answer.
            AdapterNotFoundError: The adapter does not exist.
            CheckpointError: The adapter is damaged.
            QueueFullError: Too many requests are waiting.
            ClosedOrCanceledError: The engine is shutting down.
        """
        sampling = self._fill_in_max_tokens(prompt, sampling)
        with self._changed:
            if self._closing:
                raise ClosedOrCanceledError("the server is shutting down")
            if len(self._waiting) >= self._max_waiting:
                self.stats.requests_refused += 1
                raise QueueFullError(
                    f"{len(self._waiting)} requests are already waiting; try again later"
                )
            version = None if adapter is None else self._adapters.acquire_version(adapter)
            text = IncrementalDetokenizer(self._tokenizer, prompt, sampling.stop)
            job = EngineRequest(list(prompt), version, sampling, on_chunk, text)
            self._waiting.append(job)
            self.stats.requests += 1
            self._changed.notify_all()
        if version is not None:
            self._adapters.read_in_background(version, self._wake)
        return job

    def cancel(self, job: EngineRequest) -> None:
        """Cancel a request.

        Its row in the batch is freed before the next token is generated.
        """
        job.canceled = True
        self._wake()

    def close(self, cancel_after: float | None = None) -> None:
        """Shut down the engine, and wait until it has stopped.

        The engine accepts no more requests. Earlier requests have ``cancel_after`` seconds to
        finish, or unlimited time if ``cancel_after`` is None. Requests that have not finished
        within this time are canceled, and fail with `ClosedOrCanceledError`. ``cancel_after`` does
        not limit the duration of this call: after this time, the call still waits, without a limit,
        until the engine's thread has finished its current forward pass and has ended.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(cancel_after)
        if self._thread.is_alive():
            with self._changed:
                for job in [*self._waiting, *self._running.jobs]:
                    job.canceled = True
                self._changed.notify_all()
            self._thread.join()

    @property
    def waiting(self) -> int:
        """Number of waiting requests."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of running requests."""
        return len(self._running.jobs)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread is running."""
        return self._thread.is_alive()

    @property
    def closing(self) -> bool:
        """Whether the engine is closing.

        An engine that has already closed also counts as closing. A closing engine accepts no new
        requests.
        """
        return self._closing

    def _fill_in_max_tokens(
        self, prompt: Sequence[int], sampling: SamplingParams
    ) -> SamplingParams:
        """Return the sampling settings with ``max_tokens`` filled in.

        If it is None, it becomes the number of tokens that fit after the prompt.

        Raises:
            ConfigError: The prompt is empty, or the prompt and the completion together are too
                long.
        """
        if not prompt:
            raise ConfigError("the prompt is empty")
        room = self.length - len(prompt)
        if room < (sampling.max_tokens or 1):
            asked = "" if sampling.max_tokens is None else f" and max_tokens={sampling.max_tokens}"
            raise ConfigError(
                f"the prompt has {len(prompt)} tokens{asked}; the prompt and the completion "
                f"together can have at most {self.length} tokens"
            )
        most = room if sampling.max_tokens is None else sampling.max_tokens
        return replace(sampling, max_tokens=most)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _thread_main(self) -> None:
        """Run the main loop of the engine's thread.

        When the loop ends, the open `fastlora.adapters` context is exited.
        """
        try:
            self._run_loop()
        finally:
            self._running.close_adapters_block()

    def _run_loop(self) -> None:
        while True:
            with self._changed:
                while not (self._running.jobs or self._can_start_or_end_waiting()):
                    if self._closing and not self._waiting:
                        return
                    self._changed.wait()
            try:
                self._end_all_canceled_requests()
                self._admit_waiting()
                self._running.prefill_and_decode()
            except Exception as error:  # an internal error must not leave requests unanswered
                _log.exception("an iteration of the engine failed")
                self._running.fail_all(error)

    def _can_start_or_end_waiting(self) -> bool:
        """Return whether any waiting request can be started or removed from the queue."""
        return any(
            job.canceled or job.version is None or job.version.ready or job.version.error
            for job in self._waiting
        )

    def _end_all_canceled_requests(self) -> None:
        """Remove all canceled requests from the batch and from the queue."""
        self._running.remove_canceled()
        with self._changed:
            gone = [job for job in self._waiting if job.canceled]
            for job in gone:
                self._waiting.remove(job)
        for job in gone:
            self._release_adapter_and_report_failure(job, None)

    def _admit_waiting(self) -> None:
        """Move waiting requests into the batch.

        The requests start in order of arrival. If the adapter of a request does not fit yet, later
        requests may start first, but at most as many as there are rows.
        """
        blocked: list[EngineRequest] = []
        with self._changed:
            waiting = list(self._waiting)
        for job in waiting:
            if len(self._running.jobs) == self._max_rows:
                return
            if any(other.overtaken >= self._max_rows for other in blocked):
                return
            version = job.version
            if version is not None:
                if version.error is None and not version.ready:
                    continue
                try:
                    job.lease = self._try_lease(version)
                except Exception as error:  # for instance out of memory; others may fit
                    if not isinstance(error, FastLoraError):
                        _log.exception("loading adapter %r to the device failed", version.served_as)
                    with self._changed:
                        self._waiting.remove(job)
                    self._release_adapter_and_report_failure(job, to_client_error(error))
                    continue
                if job.lease is None:
                    blocked.append(job)
                    continue
            for other in blocked:
                other.overtaken += 1
            with self._changed:
                self._waiting.remove(job)
                self._running.jobs.append(job)

    def _try_lease(self, version: AdapterVersion) -> Lease | None:
        """Try to lease an adapter.

        Returns the lease, or None if there is currently no room for the adapter. The adapters in
        use stay on the device. Raises `CheckpointError` if the adapter is damaged, and
        `PoolFullError` if the adapter can never fit.
        """
        version.check_usable()
        held = self._running.adapters_in_use
        if len(self._pool.plan([*held, version.name])) > 1:
            return None
        try:
            # If no request is running, none will free a slot: the pool decides whether the adapter
            # fits.
            return self._pool.lease([version.name], timeout=0.0 if held else None)
        except PoolFullError:
            if held:
                return None
            raise

    def _release_adapter_and_report_failure(
        self, job: EngineRequest, request_error: FastLoraError | None
    ) -> None:
        """Release a request's adapter, and report the failure if the request failed.

        The failure is reported by passing an error to the request's ``on_chunk`` function. If
        ``request_error`` is None and the request has not ended, the reported error says that the
        request was canceled. Nothing is reported for a request that has already ended.
        """
        if job.version is not None:
            self._adapters.release_version(job.version)
        if job.ended:
            return
        job.ended = True
        if request_error is None:
            self.stats.requests_cancelled += 1
            request_error = ClosedOrCanceledError("the request was canceled")
        else:
            self.stats.requests_failed += 1
        job.emit(AnswerChunk(error=request_error))
