"""Our model against PEFT's on SmolLM2-135M: logits, gradients, files both ways, merging."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora import LoraConfig, LoraModel, get_peft_model
from fastlora.ops import backend as ops
from fastlora.testing import assert_within_budget
from tests.support.dora_truth import fixed_seed
from tests.support.masked_peft import LINEARS, check_three_layers

peft = pytest.importorskip("peft", reason="compares with PEFT")

TARGETS = ["q_proj", "v_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "r1": {"r": 1, "lora_alpha": 3},
    "r3": {"r": 3, "lora_alpha": 16},
    "r8": {"r": 8, "target_modules": "all-linear"},
    "r64": {"r": 64, "lora_alpha": 16},
    "rslora": {"r": 8, "use_rslora": True},
    "rank_pattern": {"rank_pattern": {r"layers\.[0-4]\.mlp\.down_proj": 3, "v_proj": 16}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 64, r".*\.[5-9]\.mlp\..*": 1}},
    "lora_bias": {"r": 4, "lora_bias": True},
    "modules_to_save": {"r": 4, "modules_to_save": ["lm_head"]},
}


def shared_names(peft_model: Any) -> dict[str, torch.nn.Parameter]:
    """PEFT's parameters by the names that ours have."""
    return {n.replace(".base_layer.", "."): p for n, p in peft_model.named_parameters()}


def twins(
    fresh: Callable[..., Any], dtype: torch.dtype = torch.float32, layers: int = 30, **config: Any
) -> tuple[LoraModel, Any]:
    """The same adapter on the same model, once ours and once PEFT's, every factor at random."""
    config = {"r": 8, "target_modules": TARGETS, **config}
    torch.manual_seed(1)
    ours = get_peft_model(fresh(dtype, layers), LoraConfig(**config))
    torch.manual_seed(1)
    theirs = peft.get_peft_model(fresh(dtype, layers), peft.LoraConfig(**config))
    mine, other = dict(ours.named_parameters()), shared_names(theirs)
    assert list(mine) == list(other)
    with torch.no_grad():
        for name, parameter in mine.items():
            assert torch.equal(parameter, other[name]), f"initial value of {name}"
            assert parameter.requires_grad == other[name].requires_grad, name
            if "lora_B" in name:
                parameter.normal_(std=0.02)
                other[name].copy_(parameter)
    return ours, theirs


def truth(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients by name of PEFT's model in float64; its own gradients are gone then."""
    model.zero_grad()
    model.double()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    exact = {n: p.grad for n, p in shared_names(model).items() if p.grad is not None}
    model.zero_grad()
    model.float()
    return out.logits.detach(), exact


def near(actual: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether the error against float64, as a norm, is at most twice PEFT's plus one rounding."""
    eps = torch.finfo(theirs.dtype).eps
    budget = (theirs.double() - exact).norm() + eps * exact.norm()
    return bool((actual.double() - exact).norm() <= 2 * budget)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    """Token ids, ``[2, 12]``."""
    return torch.randint(0, 49_000, (2, 12), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("case", CASES)
def test_logits_gradients_and_files(
    case: str, fresh_smollm2: Callable[..., Any], ids: torch.Tensor, tmp_path: Path
) -> None:
    """Logits and gradients agree to fp32 rounding; each side's files load in the other."""
    layers = 30 if case == "r8" else 10
    ours, theirs = twins(fresh_smollm2, layers=layers, **CASES[case])
    mine, other = ours(input_ids=ids, labels=ids), theirs(input_ids=ids, labels=ids)
    mine.loss.backward()
    other.loss.backward()
    grads = {n: p.grad.clone() for n, p in shared_names(theirs).items() if p.grad is not None}
    exact_logits, exact_grads = truth(theirs, ids)
    assert_within_budget(mine.logits, other.logits, exact_logits, "logits")
    assert not torch.equal(
        mine.logits, fresh_smollm2(layers=layers)(input_ids=ids).logits
    )  # it acts

    compared = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert set(compared) == set(grads) == set(exact_grads)
    # Each tensor's relative error is the luck of thirty layers' roundings, so their root mean
    # square is compared; one wrong gradient would exceed it by orders of magnitude.
    scaled = [
        [g[name].double() / exact_grads[name].norm() for name in exact_grads]
        for g in (compared, grads, exact_grads)
    ]
    mine_flat, theirs_flat, exact_flat = (torch.cat([t.flatten() for t in s]) for s in scaled)
    assert near(mine_flat.float(), theirs_flat.float(), exact_flat)

    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    here = LoraModel.from_pretrained(fresh_smollm2(layers=layers), tmp_path / "theirs")
    there = peft.PeftModel.from_pretrained(fresh_smollm2(layers=layers), tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(here(input_ids=ids).logits, ours.eval()(input_ids=ids).logits)
        assert torch.equal(there(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["lora", "rslora-bias"])
@pytest.mark.parametrize(
    ("dtype", "fp32_adapters", "patched"),
    [
        (torch.float32, False, False),
        (torch.float32, False, True),
        (torch.bfloat16, False, False),
        (torch.bfloat16, True, False),
    ],
    ids=["fp32", "fp32-patched", "bf16", "bf16-fp32-adapters"],
)
def test_dropout(
    fresh_smollm2: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    fp32_adapters: bool,
    patched: bool,
    kind: str,
) -> None:
    """Under our masks PEFT has our logits and every gradient of ours, on three layers."""
    monkeypatch.setattr(ops, "draw_seed", fixed_seed)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.2}
    if kind == "rslora-bias":
        config |= {"use_rslora": True, "lora_bias": True}
    mine = check_three_layers(
        fresh_smollm2, dtype, config, patched=patched, fp32_adapters=fp32_adapters
    )
    trained = (3 if kind == "rslora-bias" else 2) * LINEARS
    assert sum(q.requires_grad for q in mine.parameters()) == trained


def test_bf16_stays_within_the_budget(fresh_smollm2: Callable[..., Any], ids: torch.Tensor) -> None:
    """On a bf16 base with PEFT's fp32 factors we are as near to the truth as PEFT, within 2x."""
    ours, theirs = twins(fresh_smollm2, torch.bfloat16, target_modules="all-linear")
    with torch.no_grad():
        mine, other = ours(input_ids=ids).logits, theirs(input_ids=ids).logits
        exact = theirs.double()(input_ids=ids).logits
    assert mine.dtype == torch.bfloat16
    assert near(mine, other, exact)
    assert all(p.dtype == torch.float32 for n, p in ours.named_parameters() if "lora_" in n)


def test_merge_and_unload(fresh_smollm2: Callable[..., Any], ids: torch.Tensor) -> None:
    """Merging, disabling, unloading: outputs are the adapter's, the base's, the base's."""
    ours, theirs = twins(fresh_smollm2, layers=10, target_modules="all-linear")
    base = fresh_smollm2(layers=10)
    exact, _ = truth(theirs, ids)
    with torch.no_grad():
        expected, plain = ours(input_ids=ids).logits, base(input_ids=ids).logits
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
    assert near(merged, their_merged, exact)
    assert near(again, their_merged, exact)


def test_generate(
    fresh_smollm2: Callable[..., Any], smollm2_tokenizer: Any, ids: torch.Tensor
) -> None:
    """Greedy generation gives PEFT's tokens."""
    ours, theirs = twins(fresh_smollm2)
    prompt = smollm2_tokenizer("The capital of France is", return_tensors="pt")
    arguments = {**prompt, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(**arguments), theirs.generate(**arguments))


def test_report_names_every_layer(fresh_smollm2: Callable[..., Any]) -> None:
    """All 210 linears are fused and the printed table says so."""
    ours, _ = twins(fresh_smollm2, target_modules="all-linear")
    report = fastlora.fusion_report(ours)
    assert len(report.rows) == report.fused == 210
    assert str(report).startswith("210 of 210 LoRA layers are eligible for the fused call; ")
    assert "*.down_proj (30)" in str(report)
