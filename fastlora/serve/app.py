"""The HTTP application: OpenAI's endpoints, vLLM's endpoints for adapters, health, and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from starlette.responses import PlainTextResponse, Response

from fastlora.serve.adapters import ServedAdapters
from fastlora.serve.engine import Engine
from fastlora.serve.exception_handlers import AsciiJSONResponse, add_exception_handlers
from fastlora.serve.keys import AdminKeyRequiredError, ApiKeys, CallerRole
from fastlora.serve.metrics import PrometheusMetrics
from fastlora.serve.middleware import KeyAndSizeMiddleware
from fastlora.serve.openai_responses import (
    AsyncAnswerStream,
    BaseAnswerFormat,
    ChatCompletionFormat,
    CompletionFormat,
    EventStreamResponse,
    result_unless_disconnected,
)
from fastlora.serve.prompt_tokenizer import PromptTokenizer, check_no_surrogates
from fastlora.serve.protocol import (
    BaseGenerationBody,
    ChatBody,
    CompletionBody,
    LoadAdapterBody,
    UnloadAdapterBody,
)
from fastlora.serve.sampling import SamplingParams
from fastlora.validation import AdapterNotFoundError, ConfigError, near_names

_log = logging.getLogger("fastlora.serve")
_COMPLETION_TOKENS = 16  # OpenAI's default max_tokens for completions
_CLOSED_BY_CLIENT = 499
_SHORT_PROMPT = 1 << 14  # characters, which take about 10 ms to tokenize
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class AppSettings:
    """Settings for the HTTP application of a `Server`.

    Attributes:
        base: Name of the base model. Clients may also use the name ``base``.
        keys: Keys that clients must send.
        max_body_bytes: Maximum size of a request's body, in bytes.
        max_pending_body_bytes: Maximum total size of all incomplete request bodies, in bytes; at
            least ``max_body_bytes``. Bodies below 64 KiB do not count.
        scan_interval_seconds: Seconds between two scans of the adapter folder; 0 disables them.
    """

    base: str
    keys: ApiKeys = ApiKeys()
    max_body_bytes: int = 1 << 20
    max_pending_body_bytes: int = 1 << 26
    scan_interval_seconds: float = 2.0


class Server:
    """Serves an engine's model and adapters over HTTP.

    The attribute ``app`` is the FastAPI application, which handles the HTTP requests. The engine is
    closed when the application shuts down.
    """

    def __init__(
        self,
        engine: Engine,
        adapters: ServedAdapters,
        prompts: PromptTokenizer,
        settings: AppSettings,
    ) -> None:
        self.engine, self.adapters, self.prompts = engine, adapters, prompts
        self.settings = settings
        self.metrics = PrometheusMetrics(engine, adapters)
        self.since = int(time.time())
        # asyncio has more threads than there are cores, so short prompts always get a thread.
        self._long_prompts = asyncio.Semaphore(max(1, (os.cpu_count() or 1) - 1))
        app = FastAPI(
            title="fastlora serve",
            docs_url=None,  # the page would load scripts from other hosts
            redoc_url=None,
            lifespan=self._lifespan,
            default_response_class=AsciiJSONResponse,
        )
        add_exception_handlers(app)
        app.add_middleware(
            KeyAndSizeMiddleware,
            keys=settings.keys,
            max_body_bytes=settings.max_body_bytes,
            max_pending_body_bytes=settings.max_pending_body_bytes,
            metrics=self.metrics,
        )
        for method, path, call in (
            ("GET", "/health", self.health),
            ("GET", "/metrics", self.show_metrics),
            ("GET", "/v1/models", self.list_models),
            ("GET", "/v1/models/", self.list_models),
            ("GET", "/v1/models/{name:path}", self.describe_model),  # a name may contain /
            ("POST", "/v1/completions", self.completions),
            ("POST", "/v1/chat/completions", self.chat_completions),
        ):
            app.add_api_route(path, call, methods=[method], response_model=None)
        if settings.keys.admin is not None:  # without an admin key, these paths do not exist
            admin: dict[str, Any] = {
                "response_model": None,
                "dependencies": [Depends(_require_admin_key)],
            }
            app.add_api_route("/v1/load_lora_adapter", self.load, methods=["POST"], **admin)
            app.add_api_route("/v1/unload_lora_adapter", self.unload, methods=["POST"], **admin)
        self.app = app

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        watch = asyncio.create_task(self._watch()) if self.settings.scan_interval_seconds else None
        try:
            yield
        finally:
            if watch is not None:
                watch.cancel()
            # All connections have closed, so no client waits for the remaining requests.
            await asyncio.to_thread(self.engine.close, 0.0)

    async def _watch(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self.adapters.sync_with_folder)
            except Exception:  # a missing folder may come back
                _log.exception("scanning the adapter folder failed")
            await asyncio.sleep(self.settings.scan_interval_seconds)

    async def health(self) -> Response:
        """Report whether the server accepts requests."""
        if not self.engine.alive or self.engine.closing:
            return AsciiJSONResponse({"status": "shutting down"}, 503)
        return AsciiJSONResponse({"status": "ok"})

    async def show_metrics(self) -> Response:
        """Return the metrics in the Prometheus text format."""
        return Response(self.metrics.to_prometheus_text(), media_type=self.metrics.media_type)

    async def list_models(self) -> Response:
        """List the base model and all usable adapters."""
        names = [self.settings.base, *self.adapters.usable_names]
        return AsciiJSONResponse({"object": "list", "data": [self._model(name) for name in names]})

    async def describe_model(self, name: str) -> Response:
        """Describe the base model or a usable adapter."""
        if not self._is_base(name) and name not in self.adapters.usable_names:
            raise AdapterNotFoundError(f"the model {name!r} does not exist")
        return AsciiJSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        base = self._is_base(name)
        return {
            "id": name,
            "object": "model",
            "created": self.since,
            "owned_by": "fastlora",
            "parent": None if base else self.settings.base,
            "max_model_len": self.engine.length,
        }

    def _is_base(self, name: str) -> bool:
        return name in ("base", self.settings.base)

    async def load(self, body: LoadAdapterBody) -> Response:
        """Load an adapter from a folder under the server's adapter folder."""
        check_no_surrogates("lora_name", body.lora_name)
        check_no_surrogates("lora_path", body.lora_path)
        await asyncio.to_thread(
            self.adapters.load, body.lora_name, body.lora_path, replace=body.load_inplace
        )
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(self, body: UnloadAdapterBody) -> Response:
        """Unload an adapter.

        Running requests continue to use it until they end.
        """
        await asyncio.to_thread(self.adapters.unload, body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """Handle a completion request: continue a prompt."""
        sampling = body.to_sampling_params(body.max_tokens)
        given = body.single_prompt()
        if isinstance(given, str):
            check_no_surrogates("prompt", given)
            tokens = await self._tokenize_in_thread(len(given), self.prompts.tokenize_text, given)
        else:
            tokens = self.prompts.check_ids_in_vocabulary(given)
        if sampling.max_tokens is None:
            room = max(0, self.engine.length - len(tokens))
            # Without room, None makes the engine reject the prompt.
            sampling = replace(sampling, max_tokens=min(_COMPLETION_TOKENS, room) or None)
        return await self._answer(body, request, tokens, sampling, CompletionFormat)

    async def chat_completions(self, body: ChatBody, request: Request) -> Response:
        """Handle a chat completion request: answer a conversation."""
        if body.max_tokens and body.max_completion_tokens:
            raise ConfigError("max_tokens and max_completion_tokens are the same setting; send one")
        sampling = body.to_sampling_params(body.max_tokens or body.max_completion_tokens)
        messages = [message.to_template_dict() for message in body.messages]
        size = sum(len(message["content"]) for message in messages)
        tokens = await self._tokenize_in_thread(size, self.prompts.tokenize_messages, messages)
        return await self._answer(body, request, tokens, sampling, ChatCompletionFormat)

    async def _tokenize_in_thread(
        self, size: int, tokenize: Callable[[_T], list[int]], given: _T
    ) -> list[int]:
        """Tokenize a prompt in a thread.

        Long prompts may have to wait for each other.
        """
        if size <= _SHORT_PROMPT:
            return await asyncio.to_thread(tokenize, given)
        async with self._long_prompts:
            return await asyncio.to_thread(tokenize, given)

    async def _answer(
        self,
        body: BaseGenerationBody,
        request: Request,
        tokens: list[int],
        sampling: SamplingParams,
        form: type[BaseAnswerFormat],
    ) -> Response:
        usage = body.stream_options is not None and body.stream_options.include_usage
        if usage and not body.stream:
            raise ConfigError("stream_options requires stream=true")
        adapter = None if self._is_base(body.model) else body.model
        try:
            answer = AsyncAnswerStream(self.engine, tokens, adapter, sampling)
        except AdapterNotFoundError as error:
            if request.state.caller is not CallerRole.ADMIN:
                raise
            close = near_names(body.model, [self.settings.base, *self.adapters.usable_names])
            raise AdapterNotFoundError(f"{error}{close}") from error
        shape = form(body.model, len(tokens))
        ended = False
        try:
            # Wait for a chunk before sending the status, so that an early error gets its own
            # status.
            first = await result_unless_disconnected(request, answer.next_chunk())
            if first is None:
                return Response(status_code=_CLOSED_BY_CLIENT)
            if body.stream:
                response = EventStreamResponse(answer, shape.stream_events(answer, first, usage))
                ended = True  # from here on, the stream cancels the request
                return response
            chunks = [first]
            while chunks[-1].finish_reason is None:
                chunk = await result_unless_disconnected(request, answer.next_chunk())
                if chunk is None:
                    return Response(status_code=_CLOSED_BY_CLIENT)
                chunks.append(chunk)
            text = "".join(chunk.text for chunk in chunks)
            return AsciiJSONResponse(shape.full_body(text, chunks[-1]))
        finally:
            if not ended:
                answer.cancel()


async def _require_admin_key(request: Request) -> None:
    """Raise `AdminKeyRequiredError` unless the request has the admin key."""
    if request.state.caller is not CallerRole.ADMIN:
        raise AdminKeyRequiredError("this endpoint requires the admin key")
