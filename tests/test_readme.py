"""The README's code runs as it stands, on a small model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora import LoraConfig, get_peft_model
from tests.support.tiny import tiny_llama

pytest.importorskip("transformers", reason="the README's models are transformers'")
pytest.importorskip("peft", reason="the README patches a PEFT model")

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)


def given() -> dict[str, Any]:
    """The names that a reader has before each block."""
    ids = torch.randint(0, 97, (3, 6))
    return {
        "base_model": tiny_llama(),
        "another_base": tiny_llama(),
        "model": get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear")),
        "inputs": {"input_ids": ids, "max_new_tokens": 3},
        "batch": {"input_ids": ids, "labels": ids},
        "LoraConfig": LoraConfig,
        "torch": torch,
    }


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each block by itself, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    names = given()
    names["model"].save_pretrained("adapters/one")  # what somebody trained before
    exec(compile(BLOCKS[number], f"README.md block {number}", "exec"), names)
    if "report" in names:
        assert names["report"].fused == len(names["report"].rows) > 0
        assert "LoRA layers fused" in capsys.readouterr().out
    if "merged" in names:
        assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
        assert fastlora.fusion_report(names["merged"]).rows == ()


def test_the_readme_has_its_examples() -> None:
    """A layer, a model, patch, a mixed batch, and many adapters in serving and training."""
    assert len(BLOCKS) == 5
