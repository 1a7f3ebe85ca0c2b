"""The demo itself, shortened: it runs, it learns, and its check against PEFT can fail."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora.commands import demo, demo_peft
from fastlora.train.data import Batch

pytest.importorskip("peft")


@pytest.fixture
def arguments(tmp_path: Path, smollm2_dir: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(
        ["--out", str(tmp_path / "adapters"), "--steps", "2", "--rounds", "1", "--adapters", "1,3"]
        + ["--cache", str(smollm2_dir.parent), "--prompt", "What is the capital of Italy?"]
    )


def test_the_demo_runs(
    arguments: argparse.Namespace,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("BATCH", 3), ("SEQUENCES", 6), ("TABLE_ROUNDS", 1)):
        monkeypatch.setattr(demo, name, value)
    assert demo.run(arguments) == 0
    printed = capsys.readouterr().out
    assert "The capital of" in printed and "Italy" in printed
    assert "equal within fp32 rounding" in printed
    assert "NOT EQUAL" not in printed
    assert "forward + backward" in printed
    table = printed.partition("one after another\n")[2].splitlines()[:2]
    assert [line.split()[0] for line in table] == ["1", "3"]
    for style in demo.STYLES:
        assert {p.name for p in (arguments.out / style).iterdir()} >= {
            "adapter_config.json",
            "adapter_model.safetensors",
        }


def test_each_adapter_learns_its_own_style(
    tmp_path: Path, smollm2_tokenizer: Any, fresh_smollm2: Any
) -> None:
    """Each answers as its own data says, whatever the others in the batch learned."""
    for name, text in (("ships_log", "Ahoy!"), ("json_answer", "{}"), ("robot", "BEEP.")):
        row = json.dumps({"prompt": "What is the capital of Italy?", "completion": text})
        (tmp_path / f"{name}.jsonl").write_text(row)
    data = demo.read_styles([tmp_path / f"{name}.jsonl" for name in demo.STYLES], smollm2_tokenizer)
    model = demo.add_adapters(fresh_smollm2(), data)
    batches = demo.make_batches(data, smollm2_tokenizer.pad_token_id, 12, 3, torch.device("cpu"))
    losses = demo.train(model, batches)
    assert {name: len(seen) for name, seen in losses.items()} == dict.fromkeys(data, 12)
    assert all(seen[-1] < seen[0] / 10 for seen in losses.values()), losses
    model.eval()
    prompt = "What is the capital of Italy?"
    assert demo.answer(model, smollm2_tokenizer, prompt, ["robot", None, "json_answer"]) == [
        "BEEP.",
        "The capital of Italy is Rome.",
        "{}",
    ]


@pytest.mark.parametrize(("change", "agrees"), [(0.0, True), (0.01, False), (float("nan"), False)])
def test_the_check_sees_a_model_that_differs(
    tmp_path: Path, fresh_smollm2: Any, change: float, agrees: bool
) -> None:
    config = fastlora.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = fastlora.get_peft_model(fresh_smollm2(), config, adapter_name="a")
    model.add_adapter("b", config)
    model.save_pretrained(str(tmp_path))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.29" in name and "lora_B.b" in name:
                parameter.add_(change)
    ids = torch.tensor([[1, 504, 2725, 282, 4649, 314]] * 2)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    _, found, text = demo_peft.load_in_peft(
        model, fresh_smollm2, tmp_path, Batch(["a", "b"], inputs, ids)
    )
    assert found is agrees
    assert ("NOT EQUAL" in text) is not agrees
