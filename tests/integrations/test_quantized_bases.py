"""Adapters over quantized bases against PEFT's over the very same base, on a CPU.

Every kind on a Llama, bitsandbytes' on a GPT-2 too, where transformers puts a quantized linear into
the place of a Conv1D. (torchao leaves a Conv1D as it is.)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora.ops import backend as ops
from tests.support.dora_truth import fixed_seed
from tests.support.masked_peft import gradients, make_dropout_explicit, randomize
from tests.support.peft_twins import assert_files_cross, peft
from tests.support.quantized_models import BITSANDBYTES, KINDS, quantized_model
from tests.support.tiny import tiny_llama, with_adapters

P = 0.25
FEATURES: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 8, "lora_alpha": 5, "use_rslora": True},
    "dora": {"r": 3, "lora_alpha": 6, "use_dora": True},
    "dropout": {"r": 4, "lora_alpha": 6, "lora_dropout": P},
}
# PEFT's DoRA over LLM.int8 loses the weight's scales in its first forward on a CPU.
LLAMA = [(k, "llama", f) for k in KINDS for f in ("dora", "dropout") if (k, f) != ("int8", "dora")]
# In evaluation dropout's adapters are plain ones.
LLAMA += [("nf4 nested", "llama", "rslora"), ("torchao int8", "llama", "lora")]
GPT2 = [(k, "gpt2", "dropout") for k in BITSANDBYTES]
CURVES = [(k, "llama", "lora") for k in ("fp4", "int8", "torchao int4", "torchao float8")]
CURVES += [("nf4 nested", "llama", "dora"), ("nf4 nested", "gpt2", "rslora")]
NAMES = ["en", "fr", "de", "es"]
IDS: list[str | None] = ["de", None, "en", "fr", "es", "en", None, "de"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Draws the masks that `masked_peft` makes explicit."""
    monkeypatch.setattr(ops, "draw_dropout_seed", fixed_seed)
    yield


def tolerance(kind: str) -> float:
    """LLM.int8 rounds x: an fp32 rounding before it may become one of 8 bits."""
    return 2e-2 if kind == "int8" else 2e-5


def tokens(rows: int = 2) -> torch.Tensor:
    """Random ids, no two rows alike."""
    return torch.randint(0, 97, (rows, 11), generator=torch.Generator().manual_seed(5))


def check(found: torch.Tensor, expected: torch.Tensor, kind: str, what: str) -> None:
    """Compares norms of what differs."""
    assert (found - expected).norm() <= tolerance(kind) * expected.norm() + 1e-12, what


def sides(kind: str, arch: str, feature: str) -> dict[str, Any]:
    """The same random adapter in ours, in PEFT's, and in PEFT's patched."""
    config = {**FEATURES[feature], "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    found = {}
    for side, library in (("ours", fastlora), ("peft", peft), ("patched", peft)):
        model = library.get_peft_model(quantized_model(kind, arch), library.LoraConfig(**config))
        randomize(model)
        found[side] = model
    make_dropout_explicit(found["peft"], config.get("lora_dropout", 0.0))
    fastlora.patch(found["patched"])
    return found


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize(("kind", "arch", "feature"), LLAMA + GPT2)
def test_one_adapter(kind: str, arch: str, feature: str) -> None:
    """Logits and every factor's gradient in training, logits in evaluation; nothing is silent."""
    models = sides(kind, arch, feature)
    report = fastlora.fusion_report(models["ours"])
    assert len(report.rows) == (14 if arch == "llama" else 8)
    assert all(row.fused or row.reason for row in report.rows)
    expected = gradients(models["peft"], tokens())
    with torch.no_grad():
        logits = models["peft"].eval()(input_ids=tokens()).logits
    for side in ("ours", "patched"):
        found = gradients(models[side], tokens())
        assert found.keys() == expected.keys() and len(found) > len(report.rows)
        for name, value in expected.items():
            assert value.norm() > 0, name
            check(found[name], value, kind, f"{side} {name}")
        with torch.no_grad():
            check(models[side].eval()(input_ids=tokens()).logits, logits, kind, side)


@pytest.mark.parametrize("kind", ["nf4", "torchao int8"])
def test_dtype_of_factors(kind: str) -> None:
    """Without a cast to fp32 they are in what the base computes in, with a bias or without."""
    for cast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        for library in (fastlora, peft):
            model = library.get_peft_model(
                quantized_model(kind, dtype=torch.bfloat16),
                library.LoraConfig(target_modules=["q_proj", "up_proj"]),
                autocast_adapter_dtype=cast,
            )
            found = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
            assert found == {dtype}, library.__name__


@pytest.mark.parametrize(("kind", "arch", "feature"), CURVES)
def test_ten_steps(kind: str, arch: str, feature: str) -> None:
    """AdamW's loss curve."""
    curves = {}
    for side, model in sides(kind, arch, feature).items():
        trained = [p for p in model.train().parameters() if p.requires_grad]
        optimizer, curve = torch.optim.AdamW(trained, lr=1e-2), []
        for _ in range(10):
            loss = model(input_ids=tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.detach())
        curves[side] = torch.stack(curve)
    assert curves["peft"][-1] < 0.9 * curves["peft"][0]
    for side in ("ours", "patched"):
        # Adam divides by what a gradient is small in: roundings grow from step to step.
        worst = ((curves[side] - curves["peft"]) / curves["peft"]).abs().max()
        assert worst < 20 * tolerance(kind), side


def of_four(kind: str, library: Any) -> Any:
    """Four random adapters of several kinds over one base."""
    fields = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    features = ("lora", "rslora", "rslora" if kind == "int8" else "dora", "lora")
    configs = {
        name: library.LoraConfig(**FEATURES[feature], **fields)
        for name, feature in zip(NAMES, features, strict=True)
    }
    model = with_adapters(quantized_model(kind), configs, library)
    randomize(model)
    return model


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_batches_and_pools(kind: str, tmp_path: Path) -> None:
    """Each row is PEFT's with its adapter alone: logits, gradients of all factors; and a pool's."""
    ours, theirs, patched = (of_four(kind, lib) for lib in (fastlora, peft, peft))
    fastlora.patch(patched)
    ids = tokens(len(IDS))
    weight = torch.randn(len(IDS), 11, 97, generator=torch.Generator().manual_seed(2))
    theirs.train()
    logits = torch.empty(len(IDS), 11, 97)
    expected: dict[str, torch.Tensor] = {}
    for name in (None, *NAMES):
        rows = [i for i, own in enumerate(IDS) if own == name]
        if name is None:
            with theirs.disable_adapter(), torch.no_grad():
                logits[rows] = theirs(input_ids=ids[rows]).logits
            continue
        theirs.set_adapter(name)
        theirs.zero_grad()
        own = theirs(input_ids=ids[rows]).logits
        (own * weight[rows]).sum().backward()
        logits[rows] = own.detach()
        expected |= {n: p.grad for n, p in theirs.named_parameters() if f".{name}" in n}
    assert len(expected) == 14 * (2 * 4 + (kind != "int8"))
    assert all(gradient is not None for gradient in expected.values())
    for model in (ours, patched):
        model.train()
        for parameter in (p for n, p in model.named_parameters() if "lora_" in n):
            parameter.requires_grad_(True)
        with fastlora.adapters(model, IDS):
            found = model(input_ids=ids).logits
        (found * weight).sum().backward()
        check(found.detach(), logits, kind, "logits")
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert grads.keys() == expected.keys()
        for name, value in expected.items():
            check(grads[name], value, kind, name)
    theirs.eval()
    for model in (ours, theirs, patched):
        model.eval()
    names = [name or "__base__" for name in IDS]
    with torch.no_grad():
        decoded = ours(input_ids=ids, adapter_names=names).logits
        rows = [i for i, name in enumerate(IDS) if name != "de"]  # PEFT mixes no DoRA
        plain = of_four(kind, peft).eval()
        plain.delete_adapter("de")
        expected_rows = plain(input_ids=ids[rows], adapter_names=[names[i] for i in rows]).logits
        check(decoded[rows], expected_rows, kind, "adapter_names")
    ours.save_pretrained(tmp_path)
    model = quantized_model(kind).eval()
    with fastlora.AdapterPool(model) as pool, torch.no_grad():
        for name in NAMES:
            pool.register(name, tmp_path / name)
        with fastlora.adapters(model, IDS):
            check(model(input_ids=ids).logits, decoded, kind, "pool")


def logits(model: Any) -> torch.Tensor:
    """What a model gives in evaluation."""
    return model.eval()(input_ids=tokens()).logits


@pytest.mark.parametrize("kind", ["nf4 nested", "torchao int8"])
def test_files_both_ways(kind: str, tmp_path: Path) -> None:
    """What ours writes PEFT reads, on the quantized base and on a plain one, and the other way."""
    models = sides(kind, "llama", "dora")
    both = models["ours"], models["peft"]
    expected = logits(both[1]).detach()
    assert_files_cross(both, lambda: quantized_model(kind), logits, expected, tmp_path)
    plain = [
        load.from_pretrained(tiny_llama(), str(tmp_path / "saved0"))
        for load in (peft.PeftModel, fastlora.LoraModel)
    ]
    check(logits(plain[0]), logits(plain[1]), "nf4", "plain")
