"""Faults of ``fastlora/serve`` and of its command: keys, limits, connections, logs, requests."""

from __future__ import annotations

from tests.faults.fault import Fault

_ADAPTERS = "tests/serve/test_adapters.py"
_BATCH = "tests/serve/test_batch.py"
_CONNECTIONS = "tests/serve/test_connections.py"
_ENGINE = "tests/serve/test_engine.py"
_KEYS = "tests/serve/test_keys.py"
_LOG = "tests/serve/test_log.py"
_PROMPTS = "tests/serve/test_prompts.py"

FAULTS = (
    Fault(
        sentence="An adapter that is intact but not supported is called damaged.",
        kind="a wrong code",
        source="D2",
        path="fastlora/serve/exception_handlers.py",
        before="""\
    (UnsupportedAdapterError, 422, "invalid_request_error", "adapter_unsupported"),
""",
        after="",
        tests=("tests/serve/test_adapters.py::test_an_adapter_that_pools_do_not_support",),
    ),
    Fault(
        sentence="A request that has ended keeps its adapter for a client that reads slowly.",
        kind="a lease kept",
        source="fc317c3",
        path="fastlora/serve/running_batch.py",
        before="            job.lease.release()\n            job.lease = None",
        after="            job.lease.release()\n            pass",
        tests=(f"{_ENGINE}::test_who_keeps_a_request_that_has_ended_keeps_no_adapter",),
    ),
    Fault(
        sentence="The block of a batch keeps the adapter of a request that has left.",
        kind="a block kept",
        source="M10",
        path="fastlora/serve/running_batch.py",
        before=(
            "        self._block.close_adapters_block_if_open()\n"
            "        row = self.jobs.index(job)\n"
        ),
        after="        row = self.jobs.index(job)\n",
        tests=(f"{_BATCH}::test_a_block_is_held_while_the_rows_keep_their_adapters",),
    ),
    Fault(
        sentence="A block that follows rows stays open, and sees what the engine computes.",
        kind="a mode left on",
        source="M10",
        path="fastlora/serve/running_batch.py",
        before="            if not is_checking_rows():\n",
        after="            if True:\n",
        tests=(f"{_BATCH}::test_a_block_is_held_while_the_rows_keep_their_adapters",),
    ),
    Fault(
        sentence="The next token does not see that the pool has replaced or unloaded an adapter.",
        kind="a stale adapter",
        source="M10",
        path="fastlora/serve/running_batch.py",
        before="key = (self._pool.replaced, *names)",
        after="key = (0, *names)",
        tests=(
            f"{_BATCH}::test_an_adapter_that_is_replaced_between_two_tokens[pooled]",
            f"{_BATCH}::test_an_adapter_that_the_pool_forgets_fails_its_rows",
        ),
    ),
    Fault(
        sentence="A thread of the engine that ends early leaves its block open.",
        kind="a block kept",
        source="M10",
        path="fastlora/serve/engine.py",
        before="            self._running.close_adapters_block()\n",
        after="            pass\n",
        tests=(f"{_ENGINE}::test_a_thread_that_ends_early_leaves_no_block_open",),
    ),
    Fault(
        sentence="A registration that ends late undoes what a client loaded or unloaded meanwhile.",
        kind="a race of two changes",
        source="M10",
        path="fastlora/serve/adapters.py",
        before="            if self._needs_new_version(name, version.fingerprint):\n",
        after="            if True:\n",
        tests=(
            f"{_ADAPTERS}::test_a_slow_registration_delays_no_request[load]",
            f"{_ADAPTERS}::test_a_slow_registration_delays_no_request[unload]",
        ),
    ),
    Fault(
        sentence="Those who wait for an adapter are told under the lock that it has been read.",
        kind="a call under a lock",
        source="cb8d05f",
        path="fastlora/serve/adapters.py",
        before="""\
        if future is not None:
            future.add_done_callback(lambda done: self._on_read(version, done))
        elif not waits:
            on_done()
""",
        after="""\
        with self._lock:
            if future is not None:
                future.add_done_callback(lambda done: self._on_read(version, done))
            elif not waits:
                on_done()
""",
        tests=(f"{_ENGINE}::test_nobody_is_called_under_the_lock",),
    ),
    Fault(
        sentence="A fault in bringing an adapter in leaves its request in the queue.",
        kind="a request without an end",
        source="a6b5b1d",
        path="fastlora/serve/engine.py",
        before="""\
                    with self._changed:
                        self._waiting.remove(job)
                    self._release_adapter_and_report_failure(job, to_client_error(error))
                    continue
""",
        after="""\
                    self._release_adapter_and_report_failure(job, to_client_error(error))
                    continue
""",
        tests=(f"{_ENGINE}::test_a_fault_of_bringing_an_adapter_in_costs_its_own_requests",),
    ),
    Fault(
        sentence="A connection that is accepted while the server ends is kept.",
        kind="a connection kept at the end",
        source="4970466",
        path="fastlora/serve/connections.py",
        before="        if self.ending:\n            return False\n",
        after="",
        tests=(f"{_CONNECTIONS}::test_a_server_that_ends_takes_no_connection",),
    ),
    Fault(
        sentence="A body may come in any number of small chunks.",
        kind="no bound on chunks",
        source="5aea27d",
        path="fastlora/serve/connections.py",
        before="            if self._small > _MOST_SMALL:\n",
        after="            if self._small < 0:\n",
        tests=(f"{_CONNECTIONS}::test_small_chunks_hold_nobody_up",),
    ),
    Fault(
        sentence="Each byte of a slow client puts off the deadline of its headers.",
        kind="a deadline put off",
        source="728279c",
        path="fastlora/serve/connections.py",
        before="        if waits is self.waits:\n            return\n",
        after="        if waits is self.waits is None:\n            return\n",
        tests=(f"{_CONNECTIONS}::test_a_client_that_is_waited_for_is_closed",),
    ),
    Fault(
        sentence="Connections may take all descriptors, and none is left for new ones.",
        kind="a limit too high",
        source="728279c",
        path="fastlora/serve/connections.py",
        before="(descriptors - _OTHER_FILES) // 2",
        after="(descriptors - _OTHER_FILES)",
        tests=(f"{_CONNECTIONS}::test_limits_leave_descriptors",),
    ),
    Fault(
        sentence="The bytes of a refused body count as being read for ever.",
        kind="a budget kept",
        source="5bb8b6a",
        path="fastlora/serve/middleware.py",
        before="            finally:\n                hold(0)\n",
        after="            finally:\n                pass\n",
        tests=(f"{_CONNECTIONS}::test_bodies_that_are_being_read_are_bounded_together",),
    ),
    Fault(
        sentence="A client's key is accepted by its beginning.",
        kind="keys compared wrongly",
        source="E9",
        path="fastlora/serve/keys.py",
        before="key is not None and hmac.compare_digest(given, key.encode())",
        after="key is not None and key.encode().startswith(given)",
        tests=(f"{_KEYS}::test_who_a_key_names",),
    ),
    Fault(
        sentence="A bearer token is refused where the client writes the scheme in lower case.",
        kind="a scheme compared by case",
        source="caeb60c",
        path="fastlora/serve/keys.py",
        before='scheme.lower() == b"bearer"',
        after='scheme == b"Bearer"',
        tests=(f"{_KEYS}::test_who_a_key_names",),
    ),
    Fault(
        sentence="A server with an empty key serves everybody.",
        kind="an empty key",
        source="caeb60c",
        path="fastlora/serve/keys.py",
        before="    if key is None:\n        return None\n",
        after="    if not key:\n        return None\n",
        tests=(f"{_KEYS}::test_an_empty_key_is_rejected",),
    ),
    Fault(
        sentence="Every client that has a key may load and unload adapters.",
        kind="a right too wide",
        source="caeb60c",
        path="fastlora/serve/app.py",
        before="""\
    if request.state.caller is not CallerRole.ADMIN:
        raise AdminKeyRequiredError(""",
        after="""\
    if request.state.caller is CallerRole.STRANGER:
        raise AdminKeyRequiredError(""",
        tests=(f"{_KEYS}::test_only_the_admin_key_changes_adapters",),
    ),
    Fault(
        sentence="Short prompts wait until long ones have been tokenized.",
        kind="a short prompt behind long ones",
        source="923d188",
        path="fastlora/serve/app.py",
        before="        if size <= _SHORT_PROMPT:\n",
        after="        if size <= 0:\n",
        tests=(f"{_PROMPTS}::test_long_prompts_delay_no_short_one",),
    ),
    Fault(
        sentence="A prompt is refused for its length after it has been tokenized.",
        kind="a limit checked too late",
        source="923d188",
        path="fastlora/serve/prompt_tokenizer.py",
        before="""\
        if self._length is not None and self._bound.certainly_exceeds_tokens(text, self._length):
""",
        after="""\
        self._tokenizer([text], add_special_tokens=special)
        if self._length is not None and self._bound.certainly_exceeds_tokens(text, self._length):
""",
        tests=(f"{_PROMPTS}::test_a_long_text_is_rejected_without_the_tokenizer",),
    ),
    Fault(
        sentence="A name that a client sends begins a line of the log.",
        kind="a forged line",
        source="b1bc4bf",
        path="fastlora/serve/log.py",
        before="    return _BREAKS.sub(lambda found: repr(found.group())[1:-1], short)",
        after="    return short",
        tests=(f"{_LOG}::test_no_name_begins_a_line",),
    ),
    Fault(
        sentence="The same message is written as often as clients cause it.",
        kind="a flood of lines",
        source="b1bc4bf",
        path="fastlora/serve/log.py",
        before="        return not count",
        after="        return True",
        tests=(f"{_LOG}::test_the_same_message_is_one_line_a_minute",),
    ),
    Fault(
        sentence="A request that meets a closing pool is answered as if it were wrong.",
        kind="a wrong status",
        source="d221200",
        path="fastlora/serve/exception_handlers.py",
        before='    (PoolClosedError, 503, "server_error", "shutting_down"),\n',
        after="",
        tests=("tests/serve/test_client_errors.py::test_a_pool_that_closes_is_the_servers_end",),
    ),
    Fault(
        sentence="Parts of messages are not counted before each of them is checked.",
        kind="no bound on parts",
        source="d6eb2eb",
        path="fastlora/serve/protocol.py",
        before="sum(max(1, len(own)) if isinstance(own, list) else 1 for own in contents)",
        after="len(contents)",
        tests=("tests/serve/test_client_errors.py::test_a_conversation_of_too_many_parts[parts]",),
    ),
    Fault(
        sentence="Refused folders that are gone are remembered, and not named when they return.",
        kind="a memory that only grows",
        source="4c8e19a",
        path="fastlora/serve/adapters.py",
        before="        self._rejected = rejected\n",
        after="        self._rejected |= rejected\n",
        tests=(f"{_LOG}::test_a_rejected_folder_is_named_again_when_it_returns",),
    ),
    Fault(
        sentence="Answers are held back for more to send, since the socket names no protocol.",
        kind="a delay of the network",
        source="5aea27d",
        path="fastlora/commands/serve.py",
        before="socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)",
        after="socket.socket(family, socket.SOCK_STREAM)",
        tests=(f"{_CONNECTIONS}::test_answers_are_sent_at_once",),
    ),
    Fault(
        sentence="A second server takes the port of one that still loads its model.",
        kind="a port taken twice",
        source="0ecfe31",
        path="fastlora/commands/serve.py",
        before="            listening.listen(128)\n",
        after="",
        tests=(
            "tests/serve/test_server.py::"
            "test_a_port_that_is_taken_is_said_before_the_model_is_read",
        ),
    ),
    Fault(
        sentence="A request reads NaN that a failed request left in its row of the cache.",
        kind="a row left as it was",
        source="M10",
        path="fastlora/serve/running_batch.py",
        before="            self._rows.cache.zero_cache_row(row)\n",
        after="            pass\n",
        tests=("tests/serve/test_batch.py::test_a_row_that_failed_is_zeros_for_the_next_request",),
    ),
    Fault(
        sentence="A model with ALiBi is accepted, and fails at its first request.",
        kind="an unsupported position embedding",
        source="F1",
        path="fastlora/serve/model_runner.py",
        before='if getattr(text, "alibi", False):',
        after="if False:",
        tests=(f"{_ENGINE}::test_what_serving_cannot_do_raises",),
    ),
    Fault(
        sentence="The local layers of GPT-Neo see other positions beside a longer row.",
        kind="an unsupported window",
        source="F1",
        path="fastlora/serve/model_runner.py",
        before='kinds |= {"local"} & set(',
        after="kinds |= set() & set(",
        tests=(f"{_ENGINE}::test_what_serving_cannot_do_raises",),
    ),
    Fault(
        sentence="An adapter is served as it was before its files changed.",
        kind="stale adapter",
        source="M10",
        path="fastlora/serve/adapters.py",
        before="return known is None or known.fingerprint != fingerprint",
        after="return known is None",
        tests=("tests/serve/test_adapters.py::test_a_folder_comes_and_changes_and_goes",),
    ),
    Fault(
        sentence="The pool keeps an adapter of the server's that no name and no request has.",
        kind="kept memory",
        source="M10",
        path="fastlora/serve/adapters.py",
        before="if not is_current and not version.users and version.name in self.pool:",
        after="if False:",
        tests=("tests/serve/test_adapters.py::test_nothing_is_left_in_the_pool",),
    ),
    Fault(
        sentence="A completion without max_tokens is rejected where fewer than 16 tokens fit.",
        kind="a default above a limit",
        source="C6",
        path="fastlora/serve/app.py",
        before="max_tokens=min(_COMPLETION_TOKENS, room) or None",
        after="max_tokens=_COMPLETION_TOKENS",
        tests=("tests/serve/test_openai.py::test_a_completion_without_a_limit",),
    ),
)
