"""``fastlora chat``: who answers, what is remembered, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora.commands import cli
from fastlora.commands.chat import BASE, Chat, parse_adapter_folders
from fastlora.validation import CheckpointError, ConfigError
from tests.support import served
from tests.support.programs import error_of

pytest.importorskip("transformers", reason="chats with transformers' models")

NOBODY = (BASE, None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model in ``base``, and adapters ``ship`` and ``robot`` in ``run``."""
    root = tmp_path_factory.mktemp("chat")
    served.make_base(root / "base")
    for seed, name in enumerate(("robot", "ship")):
        served.make_adapter(root / "run" / name, seed)
    return root


@pytest.fixture(scope="module")
def alone(folders: Path) -> Callable[[str, str | None], str]:
    """What one adapter, or the base model, says behind a text, without any of this."""
    made = served.Alone(folders / "base", folders / "run")
    return lambda text, name: made.text(text, name, 8).strip()


@pytest.fixture
def chat(folders: Path) -> Any:
    """A conversation of greedy answers of eight tokens, with both adapters."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    model = fastlora.LoraModel.from_pretrained(base, folders / "run" / "robot", "robot")
    model.load_adapter(folders / "run" / "ship", "ship")
    tokenizer = AutoTokenizer.from_pretrained(folders / "base")
    sampling = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 96}
    return Chat(
        model.eval(), tokenizer, {n: n for n in ("robot", "ship")}, io.StringIO(), **sampling
    )


def said(chat: Chat, *lines: str) -> list[str]:
    """What is printed for these lines."""
    chat.out.seek(0)
    chat.out.truncate()
    assert all(chat.handle_line(line) for line in lines)
    return chat.out.getvalue().splitlines()


def test_the_chosen_adapter_answers_in_one_conversation(chat: Chat, alone: Any) -> None:
    """The history holds all that was said, whoever said it."""
    first = alone("<user>hi<bot>", "robot")
    assert [line.strip() for line in said(chat, "hi")] == [first]
    assert said(chat, "/adapter ship") == ["ship answers now"]
    second = alone(f"<user>hi<assistant>{first}<user>and you<bot>", "ship")
    assert [line.strip() for line in said(chat, "and you")] == [second] != [first]
    said(chat, "/adapter base", "/system be kind")
    assert said(chat, "hi")[0].strip() == alone("<system>be kind<user>hi<bot>", None)
    assert said(chat, "/adapters") == ["  robot", "  ship", "* base"]


def test_all_answer_at_once(chat: Chat, alone: Any) -> None:
    """One batch; the chosen adapter's answer goes on in the conversation."""
    lines = said(chat, "/compare", "/adapter ship", "hi")[2:]
    answers = {name: alone("<user>hi<bot>", name) for name in ("robot", "ship")}
    assert lines[:2] == [f"[{name}] {answer}".rstrip() for name, answer in answers.items()]
    assert lines[2] == f"[base] {alone('<user>hi<bot>', None)}".rstrip()
    assert chat.messages[-1] == {"role": "assistant", "content": answers["ship"]}


def test_what_no_longer_fits_is_forgotten(chat: Chat) -> None:
    """The oldest exchanges go; a message that never fits is left out, and nothing else changes."""
    chat.model.config.max_position_embeddings = 60
    said(chat, "one", "two")
    assert said(chat, "three")[0] == "(the first 1 exchanges no longer fit and were removed)"
    assert chat.messages[0] == {"role": "user", "content": "two"}
    before = list(chat.messages)
    assert "the model supports 60, of which 8 are reserved" in said(chat, "x" * 90)[-1]
    assert chat.messages == before


def test_commands(chat: Chat) -> None:
    """A slip is answered, and changes nothing."""
    assert said(chat, "/adapter shp")[0].startswith(
        "no adapter 'shp'; expected one of robot, ship, base"
    )
    assert chat.active_adapter == "robot"
    assert said(chat, "/nonsense")[0] == "unknown command /nonsense"
    said(chat, "hi", "/reset")
    assert chat.messages == [] and not said(chat, "  ")
    assert not chat.handle_line("/quit")


def test_without_a_template_a_message_begins_a_text(
    chat: Any, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As data without --chat trains."""
    chat.plain = True
    assert said(chat, "the sea")[0].strip() == alone("the sea", "robot")
    assert chat.messages == []
    assert said(chat, "/system be kind") == ["a system prompt needs a chat template"]
    whole, asked = chat.tokenizer, []
    ended = lambda texts, **how: whole([f"{text}<eos>" for text in texts], **how)  # noqa: E731
    monkeypatch.setattr(chat._prompts, "_tokenizer", ended)
    chat._prompts._tokenizer.eos_token_id = whole.eos_token_id
    monkeypatch.setattr(chat, "_stream_answer", lambda ids: asked.append(ids) or "")
    chat.try_answer("the sea")
    assert asked[0].tolist() == whole("the sea", return_tensors="pt").input_ids.tolist()


def test_a_template_that_raises(chat: Chat) -> None:
    """Some have no system prompt: the dialogue goes on."""
    chat.tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + served.TEMPLATE
    )
    lines = said(chat, "/system be kind", "hi")
    assert lines[-1] == "the model's chat template rejects the messages: no system"
    assert chat.messages == [] and chat.handle_line("/system") and chat.try_answer("hi")


def test_the_command(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of adapters brings all of them; prompts need no terminal."""
    arguments = [str(folders / "base"), "--adapter", str(folders / "run"), "--cpu"]
    asked = ["--temperature", "0", "--max-new-tokens", "4", "--prompt", "the sea", "--compare"]
    assert cli.main(["chat", *arguments, *asked]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["[robot]", "[ship]", "[base]"]


def test_the_command_names_who_answered(
    folders: Path, alone: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several adapters, each answer starts with a name. With one adapter, it does not."""
    arguments = ["chat", str(folders / "base"), "--cpu", "--temperature=0", "--max-new-tokens=8"]
    plain = [*arguments, "--plain"]
    both, ship = ["--adapter", str(folders / "run")], ["--adapter", str(folders / "run" / "ship")]
    answers = {name: alone("the sea", name) for name in ("robot", "ship")}
    assert cli.main([*plain, *both, "--prompt", "the sea"]) == 0
    assert capsys.readouterr().out.split() == ["[robot]", *answers["robot"].split()]
    assert (
        cli.main([*plain, *ship, *both[:1], f"b={folders / 'run' / 'robot'}", "--prompt=the sea"])
        == 0
    )
    assert capsys.readouterr().out.split() == ["[ship]", *answers["ship"].split()]
    assert cli.main([*plain, *ship, "--prompt", "the sea"]) == 0
    assert capsys.readouterr().out.split() == answers["ship"].split()
    monkeypatch.setattr("sys.stdin", io.StringIO("the sea\n/adapter ship\nthe sea\n"))
    assert cli.main([*plain, *both]) == 0
    assert capsys.readouterr().out.split() == [
        *("[robot]", *answers["robot"].split(), "ship", "answers", "now"),
        *("[ship]", *answers["ship"].split()),
    ]


def test_it_samples_as_the_server_does(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's generation config counts for its end tokens only; the tokenizer's end counts too.

    At this temperature, all 97 tokens are about equally likely.
    """
    base, chats = tmp_path / "base", list[Any]()
    shutil.copytree(folders / "base", base)
    config = {"eos_token_id": [7], "top_k": 3, "suppress_tokens": [5], "no_repeat_ngram_size": 1}
    (base / "generation_config.json").write_text(json.dumps(config))
    monkeypatch.setattr(Chat, "try_answer", lambda chat, _: not chats.append(chat))
    options = ["--temperature=1000", "--top-p=1", "--max-new-tokens=2", "--prompt=x"]
    assert cli.main(["chat", str(base), "--cpu", "--plain", *options]) == 0
    made = chats[0]._generate(torch.full((4000, 1), 9), [BASE] * 4000)
    first, second = made[:, 1], made[:, 2]
    assert first.unique().tolist() == list(range(97))
    ended = torch.isin(first, torch.tensor([7, 95]))
    assert (second[ended] == 96).all() and (second[~ended] == 96).float().mean() < 0.1


@pytest.mark.parametrize("temperature", ["1e-300", "1e-40"])
def test_a_temperature_near_zero_is_greedy(
    folders: Path, alone: Any, temperature: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--plain", "--prompt=the sea", "--max-new-tokens=8", "--temperature", temperature]
    assert cli.main(["chat", str(folders / "base"), "--cpu", *options]) == 0
    assert capsys.readouterr().out.strip() == alone("the sea", None)


@pytest.mark.parametrize("name", ["v1.0", "forward"])
def test_names_of_folders_that_a_model_does_not_take(
    folders: Path, alone: Any, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server takes them, too."""
    shutil.copytree(folders / "run" / "ship", tmp_path / name)
    options = ["--plain", "--prompt=the sea", "--max-new-tokens=8", "--temperature=0", "--compare"]
    given = [str(folders / "base"), "--cpu", "--adapter", str(tmp_path / name)]
    assert cli.main(["chat", *given, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"[{n}] {alone('the sea', a)}".rstrip() for n, a in ((name, "ship"), NOBODY)]


def test_lines_that_are_not_utf8(
    folders: Path, alone: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are reported, and the chat goes on."""
    given = io.BytesIO(b"\xff\n/\xff\nthe sea\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(given, encoding="utf-8"))
    options = ["--cpu", "--plain", "--max-new-tokens=8", "--temperature=0"]
    assert cli.main(["chat", str(folders / "base"), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("the line contains an unpaired surrogate") for line in lines[:2])
    assert [line.strip() for line in lines[2:]] == [alone("the sea", None)]


def test_errors(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before a model is read, in one line."""
    robot = folders / "run" / "robot"
    assert list(parse_adapter_folders([f"a={robot}", f"b={robot}"])) == ["a", "b"]
    sign = tmp_path / "lr=1"
    sign.symlink_to(folders / "run")
    assert list(parse_adapter_folders([str(sign / "ship")])) == ["ship"]
    with pytest.raises(ConfigError, match="'robot' is already in use; pass NAME="):
        parse_adapter_folders([str(robot), str(folders / "run")])
    with pytest.raises(ConfigError, match="the name is empty; pass NAME="):
        parse_adapter_folders([f"={robot}"])
    with pytest.raises(ConfigError, match="'base' is already in use"):
        parse_adapter_folders([f"base={robot}"])
    with pytest.raises(
        CheckpointError, match="not an adapter folder; expected it to contain adapter_config.json"
    ):
        parse_adapter_folders([str(tmp_path)])
    base = folders / "base"
    assert "--top-p must be greater than 0" in error_of(capsys, "chat", base, "--top-p", 0)
    assert "--temperature must be at least 0" in error_of(capsys, "chat", base, "--temperature", -1)
    assert "--max-new-tokens must be" in error_of(capsys, "chat", base, "--max-new-tokens", 0)
    assert "--prompt must not be empty" in error_of(capsys, "chat", base, "--prompt", " ")
    assert "--system needs a chat" in error_of(capsys, "chat", base, "--system", "x", "--plain")
    assert "--seed must be between -92" in error_of(capsys, "chat", base, "--seed", 2**63)
    assert "--seed must be between -92" in error_of(capsys, "chat", base, "--seed", -(2**63) - 1)
    for flag in ("--prompt", "--system"):
        error = error_of(capsys, "chat", base, flag, "\udcff")
        assert f"{flag} contains an unpaired surrogate" in error
    long = ["chat", str(base), "--plain", "--prompt", "x" * 3000]
    assert cli.main(long) == 1 and "the model supports" in capsys.readouterr().out
    assert "no such folder" in error_of(capsys, "chat", tmp_path / "nowhere", "--prompt", "x")
