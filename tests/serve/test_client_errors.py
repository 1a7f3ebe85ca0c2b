"""What a client can do wrong: its own request is refused in OpenAI's form, and nobody else's."""

from __future__ import annotations

import json
from typing import Any

import pytest

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
PART = "messages.0.content.0.type"


def error_of(served: Any, path: str, status: int, body: Any, **options: Any) -> dict[str, Any]:
    """Sends a body, a complete one where it is a dict; returns the error."""
    if isinstance(body, dict):
        body = json.dumps({"model": "ash", "prompt": "hi", "max_tokens": 2} | body)
        if path == CHAT:
            body = json.dumps({"messages": HI} | json.loads(body) | {"prompt": None})
            body = json.dumps({k: v for k, v in json.loads(body).items() if k != "prompt"})
    options.setdefault("headers", {"Content-Type": "application/json"})
    answer = served.admin.post(path, content=body, **options)
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 2**70}, "max_tokens"),
        (
            {"max_tokens": 4000},
            "max_tokens=4000; the prompt and the completion together can have at most 128",
        ),
        ({"seed": 2**63}, "seed"),
        ({"seed": True}, "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop has 5 strings, expected at most 4"),
        ({"stop": ""}, "stop has an empty string"),
        ({"stop": "\ud800"}, "stop contains an unpaired surrogate"),
        ({"n": 2}, "n: is not supported"),
        ({"logprobs": 3}, "logprobs: is not supported"),
        ({"logprobs": 0}, "logprobs: is not supported"),  # of the answer's own tokens
        ({"presence_penalty": 1}, "presence_penalty: is not supported"),
        ({"tools": [{}]}, "tools: is not supported"),
        ({"no_such_thing": 1}, "no_such_thing: is not supported"),
        ({"metadata": {"a": "b"}}, "metadata: is not supported"),
        ({"service_tier": "flex"}, "service_tier: is not supported"),
        ({"top_logprobs": 2}, "top_logprobs: is not supported"),
        ({"model": None}, "model"),
        ({"stream_options": {"include_usage": True}}, "stream_options requires stream=true"),
        ({"stream": "yes"}, "stream"),
        ({"model": 7}, "model"),
    ],
)
def test_wrong_values(served: Any, path: str, body: dict[str, Any], said: str) -> None:
    error = error_of(served, path, 400, body)
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "the prompt is empty"),
        ([], "prompt contains 0 prompts, expected one"),
        (["a", "b"], "prompt contains 2 prompts, expected one"),
        ([[]], "the prompt is empty"),
        ([5, 97], "prompt contains 97, expected token ids from 0 to 96"),
        ([-1], "prompt contains -1"),
        ([2**80], "prompt"),
        (["a", 1], "prompt"),
        (None, "prompt"),
        ("x" * 127, "the prompt has 127 tokens and max_tokens=2"),
        ("\udc80", "prompt contains an unpaired surrogate"),
    ],
)
def test_wrong_prompts(served: Any, prompt: Any, said: str) -> None:
    assert said in error_of(served, COMPLETIONS, 400, {"prompt": prompt})["message"]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ([{"role": "wizard", "content": "hi"}], "messages.0.role"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": None}], "messages.0.content"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages.0.tool_calls: is not supported"),
        ([*HI, {"role": "assistant", "refusal": "no"}], "messages.1.refusal: is not supported"),
        ([{"role": "user", "content": 5}], "messages.0.content: Input should be a valid string"),
        (["hi"], "messages.0: expected a JSON object"),
        ([*HI, {"role": "system", "content": "late"}], "template rejects the messages: system fi"),
        ([{"role": "user", "content": "\ud812"}], "content contains an unpaired surrogate"),
        (
            [{"role": "user", "content": "x" * 200}],
            "together can have at most 128",
        ),
    ],
)
def test_wrong_messages(served: Any, messages: Any, said: str) -> None:
    assert said in error_of(served, CHAT, 400, {"messages": messages})["message"]


@pytest.mark.parametrize(
    ("count", "content"),
    [(2049, "hi"), (2049, []), (1025, [{"type": "text", "text": ""}] * 2)],
    ids=["messages", "empty messages", "parts"],
)
def test_a_conversation_of_too_many_parts(count: int, content: Any) -> None:
    """E3: checking each of the 30,000 parts that fit in a body would hold everybody up."""
    protocol = pytest.importorskip("fastlora.serve.protocol", reason="the server needs pydantic")
    message = {"role": "user", "content": content}
    body = {"model": "ash", "messages": [message] * (count - 1)}
    assert len(protocol.ChatBody.model_validate(body).messages) == count - 1
    with pytest.raises(ValueError, match=r"messages have \d+ parts, expected at most 2048"):
        protocol.ChatBody.model_validate(body | {"messages": [message] * count})


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": ["a", 1] * 1500}),
        (COMPLETIONS, {"prompt": [["a"] * 3000]}),
        (COMPLETIONS, {"stop": [1] * 3000}),
        (COMPLETIONS, {f"k{i}": 1 for i in range(1500)}),
        (CHAT, {"messages": [{}] * 3000}),
        (CHAT, {"messages": [{"role": "user", "content": [{}] * 3000}]}),
        (CHAT, {"messages": [{f"k{i}": 1 for i in range(1500)}]}),
        ("/v1/load_lora_adapter", {f"k{i}": 1 for i in range(1500)}),
    ],
    ids=["mixed", "tokens", "stops", "fields", "messages", "parts", "message_fields", "load"],
)
def test_one_error_is_enough(
    served: Any, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body of wrong elements costs no error for each: that held everybody up for seconds."""
    from fastapi.exceptions import RequestValidationError

    errors = RequestValidationError.errors
    counts: list[int] = []

    def counted(self: Any) -> Any:
        counts.append(len(errors(self)))
        return errors(self)

    monkeypatch.setattr(RequestValidationError, "errors", counted)
    error_of(served, path, 400, body)
    assert 1 <= max(counts) <= 4


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        (CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]}, PART, "should be 'text'"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content", "Field required"),
        (COMPLETIONS, {"prompt": ["a", 1]}, "prompt.1", "should be a valid string"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt.1", "should be a valid integer"),
        (COMPLETIONS, {"prompt": [[1, "a"]]}, "prompt.0.1", "should be a valid integer"),
        (COMPLETIONS, {"prompt": 5}, "prompt", "should be a valid string"),
        (COMPLETIONS, {"str": 5}, "str", "is not supported"),
        (COMPLETIONS, {"stream_options": {"a": 1}}, "stream_options.a", "is not supported"),
    ],
)
def test_the_field_that_is_wrong(
    served: Any, path: str, body: dict[str, Any], param: str, said: str
) -> None:
    """The field's path has no names of types, and its error is that of the type that fits best."""
    error = error_of(served, path, 400, body)
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ") and error["message"].endswith(said)


@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded", "text/plain"])
def test_a_body_that_is_not_declared_as_json(served: Any, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    error = error_of(served, COMPLETIONS, 400, {}, headers=headers)
    assert error["message"].endswith("send the header Content-Type: application/json")
    assert error["param"] is None


def test_two_limits_of_one_thing(served: Any) -> None:
    assert (
        "the same setting" in error_of(served, CHAT, 400, {"max_completion_tokens": 3})["message"]
    )


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 15_000, b'{"model": NaN}', b"null"],
    ids=["empty", "cut", "list", "text", "no_utf8", "deep", "nan", "null"],
)
def test_bodies_that_are_none(served: Any, body: bytes) -> None:
    error = error_of(served, COMPLETIONS, 400, body)
    assert error["param"] == ("model" if b"NaN" in body else None)
    if body == b"{":
        assert error["message"].startswith("the request body is not valid JSON: ")
        assert error["message"].endswith(" at position 1")


def test_a_body_that_is_too_long(served: Any) -> None:
    body = json.dumps({"model": "ash", "prompt": "x" * 30_000})
    assert "more than 20000 bytes" in error_of(served, COMPLETIONS, 413, body)["message"]
    chunks = iter([b" " * 15_000, b" " * 15_000])  # without a Content-Length
    assert "more than 20000 bytes" in error_of(served, COMPLETIONS, 413, chunks)["message"]


@pytest.mark.parametrize(
    "name", ["ashy", "", "../adapters/ash", "ash\n1", "ash ", "ASH", "__base__"]
)
def test_an_unknown_name_fails_its_own_request_only(served: Any, name: str) -> None:
    error = error_of(served, COMPLETIONS, 404, {"model": name})
    assert error["code"] == "model_not_found"
    if name == "ashy":
        assert "close names: ash" in error["message"]
    error_of(served, CHAT, 404, {"model": name})


def test_paths_and_methods_that_are_none(served: Any) -> None:
    assert served.http.get("/v1/nothing").json()["error"]["message"] == "Not Found"
    answer = served.http.get(COMPLETIONS)
    assert answer.status_code == 405
    assert answer.json()["error"]["message"] == "Method Not Allowed"
    assert served.http.get("/v1/models/axe").status_code == 404


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_fields_that_request_nothing(served: Any, path: str) -> None:
    """E7: a null is an absent field, whatever its name, and so is a value that requests nothing."""
    options: dict[str, Any] = {"n": 1, "presence_penalty": 0.0, "frequency_penalty": 0}
    options |= {"logprobs": False, "user": "me", "logit_bias": {}, "metadata": {}, "tools": []}
    options |= {"service_tier": "auto", "modalities": ["text"], "top_logprobs": 0}
    nothing = ("stop", "temperature", "seed", "tool_choice", "top_logprobs", "reasoning_effort")
    options |= {"stream_options": {"include_usage": False, "include_obfuscation": None}}
    body = {"model": "ash", "max_tokens": 3, "stream": None}
    body |= {"prompt": "hi", "messages": None} if path == COMPLETIONS else {"messages": HI}
    for more in (options, dict.fromkeys((*nothing, "of a later version"))):
        answer = served.http.post(path, json=body | more)
        assert answer.status_code == 200, answer.text
        assert 1 <= answer.json()["usage"]["completion_tokens"] <= 3


def test_a_pool_that_closes_is_the_servers_end() -> None:
    """Its refusal is no fault of the request."""
    pytest.importorskip("fastapi", reason="the server needs it")
    from fastlora.serve.exception_handlers import to_status_and_body
    from fastlora.validation import AdapterStateError, PoolClosedError

    status, body = to_status_and_body(PoolClosedError("the pool is closed"))
    assert (status, body["error"]["code"]) == (503, "shutting_down")
    assert to_status_and_body(AdapterStateError("it exists"))[0] == 400
