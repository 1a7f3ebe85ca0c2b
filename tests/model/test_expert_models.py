"""Adapters on the experts of whole models: against PEFT in training, in files, and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastlora
from fastlora import LoraConfig, LoraModel
from tests.support.moe_models import (
    MODELS,
    copy_random_factors,
    file_gradients,
    file_parameters,
    moe_model,
    stacks_of,
)
from tests.support.peft_twins import peft

DOUBLE = torch.float64


def batch(seed: int = 5) -> torch.Tensor:
    return torch.randint(1, 32, (3, 7), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=batch() if ids is None else ids).logits
    return found


def adapted(kind: str, library: Any = fastlora, **config: Any) -> Any:
    """A float64 model with an adapter on its stacks and attention, the same in both libraries."""
    base = moe_model(kind, DOUBLE, "" if kind == "llama4_text" else "eager")
    torch.manual_seed(1)
    config = {"target_parameters": stacks_of(base), "target_modules": ["o_proj"], **config}
    settings = library.LoraConfig(**{"r": 3, "lora_alpha": 8, **config})
    return library.get_peft_model(base, settings)


@pytest.mark.parametrize("kind", MODELS)
def test_ten_losses_and_every_gradient_are_pefts(kind: str) -> None:
    losses, models = [], [adapted(kind), adapted(kind, peft)]
    ours, theirs = (file_parameters(model) for model in models)
    assert ours.keys() == theirs.keys()
    for key, factor in ours.items():
        assert torch.equal(factor, theirs[key]), key
    copy_random_factors(models)
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        run = []
        for step in range(10):
            optimizer.zero_grad()
            loss = logits(model, batch(step)).square().mean()
            loss.backward()
            run.append(loss.detach())
            optimizer.step()
        losses.append(torch.stack(run))
    # transformers computes norms, routers, and sums of experts in fp32.
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    gradients = [file_gradients(model) for model in models]
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        expected = gradients[1][key]
        assert gradient is not None and expected is not None, key
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), key


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama4_text", "gpt_oss"])
def test_files_are_pefts_both_ways(kind: str, tmp_path: Path) -> None:
    ours, theirs = adapted(kind), adapted(kind, peft)
    copy_random_factors([ours, theirs])
    expected = logits(theirs).detach()
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    found, wanted = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "theirs")
    )
    assert found.keys() == wanted.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, wanted[key]), key
    base = ours.unload(), theirs.unload()
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(base[1], tmp_path / "ours")), expected
    )
    loaded = LoraModel.from_pretrained(base[0], tmp_path / "theirs")
    torch.testing.assert_close(logits(loaded), expected)
    loaded.load_adapter(tmp_path / "ours", "second")
    loaded.set_adapter("second")
    torch.testing.assert_close(logits(loaded), expected)


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama4_text", "gpt_oss"])
def test_merging_is_undone_bit_for_bit(kind: str) -> None:
    model = adapted(kind)
    before = {n: p.clone() for n, p in model.named_parameters() if "lora" not in n}
    copy_random_factors([model])
    expected = logits(model).detach()
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected)
    model.unmerge_adapter()
    for name, value in before.items():
        assert torch.equal(dict(model.named_parameters())[name], value), name
    model.merge_adapter(keep_base=False)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]


def test_merged_weights_are_pefts() -> None:
    models = [adapted("gpt_oss"), adapted("gpt_oss", peft)]
    copy_random_factors(models)
    ours, theirs = (model.merge_and_unload().state_dict() for model in models)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-12, atol=1e-12)
