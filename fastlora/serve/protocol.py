"""Bodies of requests in OpenAI's format, and their conversion to settings of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from fastlora.serve.prompt_tokenizer import check_no_surrogates
from fastlora.serve.sampling import MAX_STOPS, SamplingParams
from fastlora.validation import ConfigError

# Values that clients send although they request nothing. Any other value except null is rejected
# like an unknown field.
_IGNORED_DEFAULTS: Mapping[str, object] = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "logprobs": False,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "metadata": {},
    "modalities": ["text"],
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "service_tier": "auto",
    "store": False,
    "suffix": "",
    "tool_choice": "none",
    "tools": [],
    "top_logprobs": 0,
}
_INT64 = 2**63
_MAX_PARTS = 2048  # per conversation, as OpenAI limits messages; 30,000 take a second to check
_T = TypeVar("_T")
# Stop at the first invalid element: an error for each element of a long list would block all
# requests for seconds.
_List: TypeAlias = Annotated[list[_T], Field(fail_fast=True)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    ignored_defaults: ClassVar[Mapping[str, object]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_ignorable_fields(cls, data: Any) -> Any:
        """Drop the fields that can be ignored, and return the others.

        These are nulls, values that have no effect, and all unknown fields but the first.

        pydantic then rejects the first unknown field. A null field counts as not given, whatever
        its name is.
        """
        if not isinstance(data, dict):
            return data
        remaining, unknown = {}, None
        for name, value in data.items():
            if value is None or (
                name in cls.ignored_defaults and _json_equal(value, cls.ignored_defaults[name])
            ):
                continue
            if name not in cls.model_fields:
                unknown = name if unknown is None else unknown
                if name != unknown:
                    continue
            remaining[name] = value
        return remaining


class StreamOptions(_Body):
    """The ``stream_options`` of a streaming request.

    `include_usage` adds a final chunk with the token counts.
    """

    ignored_defaults = {"include_obfuscation": False}

    include_usage: bool = False


class BaseGenerationBody(_Body):
    """Base class for the request bodies of completions and chat completions.

    It defines the fields that both have in common.
    """

    ignored_defaults = _IGNORED_DEFAULTS

    model: str = Field(max_length=256)
    max_tokens: int | None = Field(None, ge=1, lt=_INT64)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    stop: str | _List[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    def to_sampling_params(self, max_tokens: int | None) -> SamplingParams:
        """Return the sampling settings of the request.

        Raises:
            ConfigError: A stop string is invalid.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        for text in stop[: MAX_STOPS + 1]:
            check_no_surrogates("stop", text)
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=tuple(stop),
        )


class CompletionBody(BaseGenerationBody):
    """The body of a completion request.

    The request is to continue a prompt, given as text or as tokens.
    """

    prompt: str | _List[int] | _List[str] | _List[_List[int]]

    def single_prompt(self) -> str | list[int]:
        """Return the single prompt of the request.

        Raises:
            ConfigError: There is not exactly one prompt.
        """
        given = self.prompt
        if isinstance(given, list) and not (given and isinstance(given[0], int)):
            if len(given) != 1:
                raise ConfigError(
                    f"prompt contains {len(given)} prompts, expected one; send a separate request "
                    "for each prompt"
                )
            return cast("str | list[int]", given[0])
        return cast("str | list[int]", given)


class TextPart(_Body):
    """A text part of a message.

    It is the only kind of part that this server supports.
    """

    ignored_defaults = {"annotations": []}

    type: Literal["text"]
    text: str


class Message(_Body):
    """A message in a conversation.

    Clients may send earlier answers back as messages.
    """

    ignored_defaults = {"annotations": [], "tool_calls": []}

    role: Literal["system", "developer", "user", "assistant"]
    content: str | _List[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_assistant_content(cls, data: Any) -> Any:
        """Fill in the missing content of an assistant message.

        Missing content is replaced with an empty string. Messages with other roles must have
        content.
        """
        if isinstance(data, dict) and data.get("role") == "assistant":
            return data if data.get("content") is not None else {**data, "content": ""}
        return data

    def to_template_dict(self) -> dict[str, str]:
        """Return the message as a dict for the chat template.

        The dict has the keys ``role`` and ``content``.
        """
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        check_no_surrogates("content", text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(BaseGenerationBody):
    """The body of a chat completion request.

    The request is to answer a conversation.
    """

    messages: _List[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, lt=_INT64)

    @model_validator(mode="before")
    @classmethod
    def _check_conversation_part_count(cls, data: Any) -> Any:
        """Raise an error if the messages of a conversation have too many parts in total.

        The parts of all messages are counted together. Each message counts as at least one part.
        This validator runs before the parts themselves are validated.
        """
        messages = data.get("messages") if isinstance(data, dict) else None
        if isinstance(messages, list):
            contents = [own.get("content") for own in messages if isinstance(own, dict)]
            parts = sum(max(1, len(own)) if isinstance(own, list) else 1 for own in contents)
            if parts > _MAX_PARTS:
                raise PydanticCustomError(
                    "too_long",
                    "messages have {parts} parts, expected at most {most}",
                    {"parts": parts, "most": _MAX_PARTS},
                )
        return data


class LoadAdapterBody(_Body):
    """The body of a request to load an adapter.

    The request has vLLM's format. The adapter is loaded from the server's adapter folder.
    """

    lora_name: str = Field(max_length=256)
    lora_path: str = Field(max_length=4096)
    load_inplace: bool = False


class UnloadAdapterBody(_Body):
    """The body of a request to unload an adapter.

    The request has vLLM's format.
    """

    lora_name: str = Field(max_length=256)
    lora_int_id: int | None = None


def _json_equal(value: object, other: object) -> bool:
    """Return whether two JSON values are equal.

    0 and False are different: ``logprobs: 0`` requests log probabilities, but ``logprobs: false``
    does not.
    """
    return value == other and isinstance(value, bool) == isinstance(other, bool)
