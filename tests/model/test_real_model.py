"""Our model against PEFT's on SmolLM2-135M: logits, gradients, files both ways, merging."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora import LoraConfig, get_peft_model
from fastlora.ops import backend as ops
from tests.support.dora_truth import fixed_seed
from tests.support.masked_peft import check_three_layers, randomize

peft = pytest.importorskip("peft", reason="compares with PEFT")

ALL = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
SOME = {"r": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
DROPOUT, DORA = {"lora_dropout": 0.2}, {"use_dora": True}
BOTH, BIAS = {**DROPOUT, **DORA}, {"use_rslora": True, "lora_bias": True}
PATCHED, WIDE = {"patched": True}, {"fp32_adapters": True}
FP32, BF16 = torch.float32, torch.bfloat16
RANKS = {"rank_pattern": {r"layers\.[0-1]\.mlp\.down_proj": 3, "v_proj": 16}}
ALPHAS = {"alpha_pattern": {"q_proj": 64, r".*\.[1-2]\.mlp\..*": 1}}
# A config, the base model's dtype, and options of `check_three_layers`.
CASES: dict[str, tuple[dict[str, Any], torch.dtype, dict[str, Any]]] = {
    "r1-patterns-lora_bias": ({**SOME, "r": 1, **RANKS, **ALPHAS, "lora_bias": True}, FP32, {}),
    "r64-rslora-copy": (
        {**SOME, "r": 64, "use_rslora": True, "modules_to_save": ["lm_head"]},
        FP32,
        {},
    ),
    "dropout": ({**ALL, **DROPOUT}, FP32, {}),
    "dropout-patched": ({**ALL, **DROPOUT, **BIAS}, FP32, PATCHED),
    "dropout-bf16": ({**ALL, **DROPOUT, **BIAS}, BF16, {}),
    "bf16-fp32-adapters": ({**ALL, **DROPOUT}, BF16, WIDE),
    "dora": ({**ALL, **DORA}, FP32, {}),
    "dora-dropout": ({**ALL, **BOTH}, BF16, {}),
    "dora-dropout-patched": ({**ALL, **BOTH}, FP32, PATCHED),
    "dora-bf16-patched": ({**ALL, **DORA}, BF16, PATCHED),
}


@pytest.mark.drawn(1 / 3)
@pytest.mark.parametrize("case", CASES)
def test_logits_gradients_and_files(
    case: str,
    fresh_smollm2: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Under our masks PEFT has our logits and every gradient of ours, on three layers."""
    monkeypatch.setattr(ops, "draw_dropout_seed", fixed_seed)
    config, dtype, options = CASES[case]
    folder = None if options or dtype == BF16 else tmp_path
    mine = check_three_layers(fresh_smollm2, dtype, config, folder=folder, **options)
    if config.get("use_dora") and config.get("lora_dropout"):
        report = fastlora.fusion_report(mine)
        assert report.fused == 0
        assert all("second base product" in row.reason for row in report.rows)


def twins(fresh: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
    """The same random adapter on the same model, once ours and once PEFT's."""
    ours = get_peft_model(fresh(*arguments), LoraConfig(**ALL))
    theirs = peft.get_peft_model(fresh(*arguments), peft.LoraConfig(**ALL))
    for model in (ours, theirs):
        randomize(model)
    return ours, theirs


def test_merge_and_unload(fresh_smollm2: Callable[..., Any]) -> None:
    """Merging, disabling, unloading: outputs are the adapter's, the base's, PEFT's merged."""
    ours, theirs = twins(fresh_smollm2, torch.float64, 3)
    base = fresh_smollm2(torch.float64, 3)
    ids = torch.randint(0, 49_000, (2, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected, plain = ours(input_ids=ids).logits, base(input_ids=ids).logits
        assert not torch.allclose(expected, plain)
        ours.merge_adapter()
        merged = ours(input_ids=ids).logits
        with ours.disable_adapter():
            assert torch.equal(ours(input_ids=ids).logits, plain)
        assert torch.equal(ours(input_ids=ids).logits, merged)
        ours.unmerge_adapter()
        assert torch.equal(ours(input_ids=ids).logits, expected)
        unloaded = ours.merge_and_unload(safe_merge=True)
        assert type(unloaded) is type(base)
        assert set(unloaded.state_dict()) == set(base.state_dict())
        again = unloaded(input_ids=ids).logits
        their_merged = theirs.merge_and_unload()(input_ids=ids).logits
    for found in (expected, merged, again):
        torch.testing.assert_close(found, their_merged)


def test_generation_and_the_report(
    fresh_smollm2: Callable[..., Any], smollm2_tokenizer: Any
) -> None:
    """Greedy tokens of all thirty layers are PEFT's; the report names their 210 linears."""
    ours, theirs = twins(fresh_smollm2)
    report = fastlora.fusion_report(ours)
    assert len(report.rows) == report.fused == 210
    assert str(report).startswith("210 of 210 LoRA layers are eligible for the fused call, ")
    assert "*.down_proj (30)" in str(report)
    prompt = smollm2_tokenizer("The capital of France is", return_tensors="pt")
    arguments = {**prompt, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(**arguments), theirs.generate(**arguments))
