"""The official client completes, chats and streams, and each adapter answers as it does alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.served import make_base, serving

NAMES: tuple[str | None, ...] = ("ash", "birch", "cedar", "dogwood", None)
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@pytest.mark.parametrize("name", NAMES)
def test_a_completion_is_what_the_adapter_says_alone(served: Any, name: str | None) -> None:
    answer = served.client.completions.create(model=name or "base", prompt="the sea", **GREEDY)
    tokens = served.alone.tokens("the sea", name, 12)
    assert answer.choices[0].text == served.alone.decode(tokens)
    assert answer.choices[0].finish_reason == ("length" if len(tokens) == 12 else "stop")
    assert answer.model == (name or "base")
    assert answer.usage.prompt_tokens == 7
    assert answer.usage.completion_tokens == len(tokens)
    assert answer.usage.total_tokens == 7 + len(tokens)


def test_the_names_of_adapters_give_different_answers(served: Any) -> None:
    """Else the tests here would see no adapter that is not there."""
    assert len({served.alone.text("the sea", name, 12) for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize(("prompt", "count"), [("the sea", 16), ("ab" * 60, 8)])
def test_a_completion_without_a_limit(served: Any, prompt: str, count: int) -> None:
    """It has at most 16 tokens, or as many as fit into 128 behind the prompt."""
    body = {"model": "ash", "prompt": prompt, "temperature": 0}
    answer = served.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert served.alone.is_answer(answer.json()["choices"][0]["text"], prompt, "ash", count)
    full = served.http.post("/v1/completions", json=body | {"prompt": "x" * 128})
    assert full.status_code == 400 and "max_tokens" not in full.json()["error"]["message"]


def test_a_prompt_of_tokens(served: Any) -> None:
    tokens = served.alone.tokenizer("the sea").input_ids
    for prompt in (tokens, [tokens], ["the sea"]):
        answer = served.client.completions.create(model="ash", prompt=prompt, **GREEDY)
        assert answer.choices[0].text == served.alone.text("the sea", "ash", 12)


def test_chat_uses_the_template(served: Any) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    answer = served.client.chat.completions.create(model="birch", messages=messages, **GREEDY)
    text = "<system>be brief<user>hi<bot>"
    assert answer.choices[0].message.content == served.alone.text(text, "birch", 12)
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(text)


def test_a_conversation_goes_on_with_the_answer_itself(served: Any) -> None:
    """E7: ``messages.append(answer.choices[0].message.model_dump())``, nulls and all."""
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    first = served.client.chat.completions.create(model="birch", messages=messages, **GREEDY)
    said = first.choices[0].message
    for own in (said.model_dump(), said, said.model_dump() | {"content": None, "tool_calls": []}):
        more = [*messages, own, {"role": "user", "content": "and?"}]
        answer = served.client.chat.completions.create(model="birch", messages=more, **GREEDY)
        content = (own["content"] or "") if isinstance(own, dict) else own.content
        text = f"<user>hi<assistant>{content}<user>and?<bot>"
        assert answer.choices[0].message.content == served.alone.text(text, "birch", 12)


def test_streams_have_the_same_text(served: Any) -> None:
    options = {**GREEDY, "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(served.client.completions.create(model="cedar", prompt="a", **options))
    alone = served.alone.tokens("a", "cedar", 12)
    assert "".join(c.choices[0].text for c in chunks[:-1]) == served.alone.decode(alone)
    assert [c.choices[0].finish_reason for c in chunks[:-2]] == [None] * (len(chunks) - 2)
    assert len(chunks) > 5
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12

    messages = [{"role": "user", "content": "a"}]
    chunks = list(served.client.chat.completions.create(model="base", messages=messages, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
    assert text == served.alone.text("<user>a<bot>", None, 12)
    assert chunks[-1].usage.prompt_tokens == len("<user>a<bot>")


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(served: Any) -> None:
    whole = served.alone.text("the sea", "ash", 12)
    stop = whole[5:8]
    wanted = whole[: whole.index(stop)]
    options = {**GREEDY, "stop": ["\x00never", stop]}
    answer = served.client.completions.create(model="ash", prompt="the sea", **options)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (wanted, "stop")
    chunks = served.client.completions.create(model="ash", prompt="the sea", stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == wanted


def test_draws_are_the_seeds(served: Any) -> None:
    """The same seed draws the same, alone and in company; other seeds draw something else."""

    def drawn(seed: int | None, top_p: float = 1.0) -> str:
        answer = served.client.completions.create(
            model="dogwood", prompt="x", temperature=1.5, top_p=top_p, seed=seed, max_tokens=16
        )
        return str(answer.choices[0].text)

    alone = [drawn(seed) for seed in range(4)]
    assert len(set(alone)) == 4
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(drawn, [*range(4), *range(4)])) == alone * 2
    assert len({drawn(None) for _ in range(3)}) == 3
    # So small a top_p leaves the likeliest token.
    assert drawn(0, 1e-9) == served.alone.text("x", "dogwood", 16)


def test_many_adapters_over_few_slots(served: Any) -> None:
    """40 requests at once, five names, two slots, six rows: each answers as alone."""
    wanted = [(NAMES[i % 5], f"{'ab' * (i % 7)}{i}", 4 + i % 9) for i in range(40)]

    def ask(case: tuple[str | None, str, int]) -> str:
        name, prompt, count = case
        answer = served.client.completions.create(
            model=name or "tiny", prompt=prompt, temperature=0, max_tokens=count
        )
        return str(answer.choices[0].text)

    with ThreadPoolExecutor(40) as threads:
        found = list(threads.map(ask, wanted))
    for (name, prompt, count), text in zip(wanted, found, strict=True):
        assert served.alone.is_answer(text, prompt, name, count), (name, prompt, text)


def test_models_are_listed(served: Any) -> None:
    names = [model.id for model in served.client.models.list()]
    assert names == ["tiny", "ash", "birch", "cedar", "dogwood"]
    assert served.client.models.retrieve("ash").parent == "tiny"
    assert served.http.get("/v1/models/").json() == served.http.get("/v1/models").json()


@pytest.mark.parametrize("path", ["org/tiny", "org%2Ftiny"])
def test_a_model_whose_name_has_a_slash(tmp_path: Path, path: str) -> None:
    pytest.importorskip("fastapi", reason="the server needs it")
    httpx = pytest.importorskip("httpx")
    with serving(make_base(tmp_path / "tiny"), "--name", "org/tiny") as (url, _):
        assert httpx.get(f"{url}/v1/models/{path}").json()["id"] == "org/tiny"
        assert httpx.get(f"{url}/v1/models/org/tiny/x").status_code == 404
