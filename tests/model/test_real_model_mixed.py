"""SmolLM2-135M with up to 64 adapters in one batch: each row is what PEFT gives it alone.

In float64, so that a row with anything of another one is not within rounding.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastlora
from fastlora import adapters
from tests.support.tiny import randomize, with_adapters

peft = pytest.importorskip("peft", reason="compares with PEFT")

# Adapters take these in turn: every rank, rsLoRA, lora_bias, different alphas and targets.
KINDS: list[dict[str, Any]] = [
    {"r": 1, "lora_alpha": 3, "target_modules": "all-linear"},
    {"r": 3, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    {"r": 8, "target_modules": "all-linear"},
    {"r": 16, "lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]},
    {"r": 64, "lora_alpha": 16, "target_modules": ["v_proj", "up_proj", "gate_proj"]},
    {"r": 16, "use_rslora": True, "target_modules": ["o_proj", "q_proj"]},
]


class Solo:
    """PEFT's model with one adapter of each kind, which takes the weights of any of ours."""

    def __init__(self, base: Any, ours: Any) -> None:
        configs = {f"kind{i}": peft.LoraConfig(**config) for i, config in enumerate(KINDS)}
        self.model = with_adapters(base, configs, peft)
        self.theirs = {
            name.replace(".base_layer.", "."): parameter
            for name, parameter in self.model.named_parameters()
        }
        self.ours: dict[str, dict[str, torch.nn.Parameter]] = {}
        for name, parameter in ours.named_parameters():
            for key in (part for part in name.split(".") if part.startswith("adapter")):
                self.ours.setdefault(key, {})[name] = parameter

    def take(self, name: str) -> dict[str, torch.nn.Parameter]:
        """Makes one of our adapters the active one; returns PEFT's parameters by our names."""
        kind = f"kind{int(name.removeprefix('adapter')) % len(KINDS)}"
        found = {}
        with torch.no_grad():
            for key, parameter in self.ours[name].items():
                found[key] = self.theirs[key.replace(f".{name}.", f".{kind}.")]
                found[key].copy_(parameter)
        self.model.set_adapter(kind)
        return found


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize("count", [4, 64])
def test_rows_and_gradients_are_pefts(count: int, fresh_smollm2: Callable[..., Any]) -> None:
    """Random mixes with base rows: named, by slot, once factors are packed, and in training."""
    kinds = (KINDS[index % len(KINDS)] for index in range(count))
    configs = {f"adapter{i}": fastlora.LoraConfig(**kind) for i, kind in enumerate(kinds)}
    model = with_adapters(fresh_smollm2(torch.float64, 2), configs)
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0.02 if "lora_B" in name else 1.0)
    solo = Solo(fresh_smollm2(torch.float64, 2), model)
    draw = random.Random(count)
    slots = [*range(count), -1, *(draw.randrange(-1, count) for _ in range(4))]
    draw.shuffle(slots)
    names = [None if slot < 0 else f"adapter{slot}" for slot in slots]
    ids = torch.randint(0, 49_000, (len(names), 5))
    model.set_adapter(list(configs))
    with adapters(model, names):
        logits = model(input_ids=ids).logits
    logits.square().mean(dim=(1, 2)).sum().backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    present = sorted(set(names) - {None})
    assert {key for name in present for key in solo.ours[name]} == set(found)
    outputs = [logits.detach()]
    model.eval()
    with torch.no_grad():
        for given in (names, names, torch.tensor(slots)):
            with adapters(model, given):
                outputs.append(model(input_ids=ids).logits)
    assert model.base_model.group.packs.packed_factors_nbytes > 0

    # Adapters are compared one by one with PEFT, of large batches one of every kind.
    for name in (None, *(f"adapter{i}" for i in range(min(count, len(KINDS))))):
        own = [i for i, other in enumerate(names) if other == name]
        solo.model.zero_grad()
        if name is None:
            with solo.model.disable_adapter():
                alone = solo.model(input_ids=ids[own]).logits
        else:
            parameters = solo.take(name)
            alone = solo.model(input_ids=ids[own]).logits
            alone.square().mean(dim=(1, 2)).sum().backward()
            for key, parameter in parameters.items():
                torch.testing.assert_close(found[key], parameter.grad, msg=key)
        for output in outputs:
            torch.testing.assert_close(output[own], alone.detach())
