"""The demo itself, shortened: it runs, and its check against PEFT can fail."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora import demo

pytest.importorskip("peft")


@pytest.fixture
def arguments(tmp_path: Path, smollm2_dir: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(
        ["--out", str(tmp_path / "adapter"), "--steps", "2", "--rounds", "1"]
        + ["--cache", str(smollm2_dir.parent), "--prompt", "What is the capital of Italy?"]
    )


def test_the_demo_runs(arguments: argparse.Namespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.run(arguments) == 0
    printed = capsys.readouterr().out
    assert "The capital of Italy is Rome." in printed
    assert "equal within fp32 rounding" in printed
    assert "NOT EQUAL" not in printed
    assert "forward + backward" in printed
    assert {p.name for p in arguments.out.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.mark.parametrize(("change", "agrees"), [(0.0, True), (0.01, False), (float("nan"), False)])
def test_the_check_sees_a_model_that_differs(
    tmp_path: Path, fresh_smollm2: Any, change: float, agrees: bool
) -> None:
    config = fastlora.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = fastlora.get_peft_model(fresh_smollm2(), config)
    model.save_pretrained(str(tmp_path))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.29" in name and "lora_B" in name:
                parameter.add_(change)
    ids = torch.tensor([[1, 504, 2725, 282, 4649, 314]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    _, found = demo.load_in_peft(model, fresh_smollm2, tmp_path, batch)
    assert found is agrees
