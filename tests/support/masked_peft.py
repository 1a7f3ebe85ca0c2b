"""PEFT's models with our dropout's mask made explicit, and SmolLM2's first layers beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoraConfig, LoraModel, get_peft_model
from fastlora.testing import assert_within_budget, random_summation_order, run_with_largest_error
from tests.support.dora_truth import keep_mask

peft = pytest.importorskip("peft", reason="compares with PEFT")

TOKENS = 2048  # that are kept: the head would be most of the time


class Masked(nn.Module):
    """Takes the place of PEFT's dropout: the mask that ours draws from a fixed seed."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drops."""
        if not self.training:
            return x
        rows = x.reshape(-1, x.shape[-1])
        return (rows * keep_mask(*rows.shape, self.p).to(x.dtype)).view(x.shape)


def make_dropout_explicit(model: nn.Module, p: float) -> None:
    """In a PEFT model."""
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and p:
            for name in module.lora_dropout:
                module.lora_dropout[name] = Masked(p)


def randomize(model: nn.Module) -> None:
    """Gives factors, magnitudes and copies other values, the same in any model of these names."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
            if "modules_to_save" in name:
                parameter.mul_(1.25)
            if "magnitude" in name:
                factors = 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.mul_(factors.to(parameter.dtype))


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, and the gradient of every adapter parameter."""
    output = model.train()(input_ids=ids, labels=ids)
    model.zero_grad()
    output.loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), **found}


def check_three_layers(
    fresh_smollm2: Callable[..., Any],
    dtype: torch.dtype,
    config: dict[str, Any],
    *,
    patched: bool = False,
    fp32_adapters: bool = False,
    folder: Path | None = None,
) -> Any:
    """Compares logits and every gradient with PEFT's of the same dtype and of float64.

    Args:
        fresh_smollm2: The fixture.
        dtype: Of the base model.
        config: Fields of a LoraConfig. Seeds must be fixed: `dora_truth.fixed_seed`.
        patched: Patch a PEFT model instead of making one of ours.
        fp32_adapters: PEFT's ``autocast_adapter_dtype``.
        folder: Where to save both; each is then loaded by the other library.

    Returns:
        Our model, in training mode.
    """
    ids = torch.randint(0, TOKENS, (2, 12), generator=torch.Generator().manual_seed(5))
    p = config.get("lora_dropout", 0.0)

    def base(kind: torch.dtype) -> Any:
        model = fresh_smollm2(dtype).to(kind)
        model.resize_token_embeddings(TOKENS)
        model.model.layers = model.model.layers[:3]
        return model

    def theirs(kind: torch.dtype) -> Any:
        return peft.get_peft_model(
            base(kind), peft.LoraConfig(**config), autocast_adapter_dtype=fp32_adapters
        )

    same, truth = theirs(dtype), theirs(torch.float64)
    randomize(same)
    state = {n: t.clone() for n, t in same.state_dict().items()}
    truth.load_state_dict({n: t.double() for n, t in state.items()})
    for model in (same, truth):
        make_dropout_explicit(model, p)
    if patched:
        mine = theirs(dtype)
        mine.load_state_dict(state)
        report = fastlora.patch(mine.eval())
    else:
        mine = get_peft_model(
            base(dtype), LoraConfig(**config), autocast_adapter_dtype=fp32_adapters
        )
        mine.load_state_dict({n.replace(".base_layer", ""): t for n, t in state.items()})
        report = fastlora.fusion_report(mine.eval())
    assert report.fused == len(report.rows) == len(same.base_model.targeted_module_names)
    results = [gradients(model, ids) for model in (mine, same, truth)]
    trained = [n for n, parameter in mine.named_parameters() if parameter.requires_grad]
    assert results[0].keys() == results[1].keys() == {"logits", *trained}
    logits = [result.pop("logits") for result in results]
    # One order of summation may be right by chance, deep in a model.
    runs = [logits[1]]
    with torch.no_grad(), random_summation_order(same, seed=0):
        runs.append(same(input_ids=ids).logits)
    assert_within_budget(logits[0], run_with_largest_error(runs, logits[2]), logits[2], "logits")
    # In their own units, all parameters together: rounding of one goes through all others.
    exact = results[2]
    found, plain, true = (
        torch.cat([(r[n].double() / exact[n].norm()).flatten() for n in exact]) for r in results
    )
    budget = (plain - true).norm() + torch.finfo(dtype).eps * true.norm()
    assert (found - true).norm() <= 2 * budget
    for name, value in exact.items():
        # None is wrong alone. Where the terms of a gradient cancel, as those of a key's bias do,
        # PEFT's own error is as large.
        mine_off, off = (r[name].double() - value for r in results[:2])
        assert mine_off.norm() < 0.1 * value.norm() + 2 * off.norm(), name
    if folder is not None:
        for saved, other, load in ((mine, same, peft.PeftModel), (same, mine, LoraModel)):
            saved.save_pretrained(folder / load.__module__)
            loaded = load.from_pretrained(base(dtype), folder / load.__module__)
            with torch.no_grad():
                expected = other.eval()(input_ids=ids).logits
                assert torch.equal(loaded(input_ids=ids).logits, expected)
        mine.train()
    return mine
