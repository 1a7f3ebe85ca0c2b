"""SmolLM2-135M with up to 64 adapters in one batch: each row is what PEFT gives it alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastlora
from fastlora import adapters

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


def name_of(index: int) -> str:
    """Name of an adapter."""
    return f"adapter{index}"


def build(fresh: Callable[..., Any], count: int, dtype: torch.dtype = torch.float32) -> Any:
    """Our model with ``count`` adapters of KINDS, every factor at random."""
    model: Any = None
    for index in range(count):
        torch.manual_seed(index)
        config = fastlora.LoraConfig(**KINDS[index % len(KINDS)])
        if model is None:
            model = fastlora.get_peft_model(fresh(dtype), config, name_of(0))
        else:
            model.add_adapter(name_of(index), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


def near(actual: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether the error against float64, as a norm, is at most twice PEFT's plus one rounding.

    A norm, since PEFT runs other products (one row at a time): the largest of a million errors
    is the luck of either side.
    """
    budget = (theirs.double() - exact).norm() + torch.finfo(torch.float32).eps * exact.norm()
    return bool((actual.double() - exact).norm() <= 2 * budget)


class Solo:
    """PEFT's model with one adapter of each kind, which takes the weights of any of ours."""

    def __init__(self, fresh: Callable[..., Any], ours: Any) -> None:
        self.model: Any = None
        for kind, config in enumerate(KINDS):
            if self.model is None:
                self.model = peft.get_peft_model(fresh(), peft.LoraConfig(**config), "kind0")
            else:
                self.model.add_adapter(f"kind{kind}", peft.LoraConfig(**config))
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

    def logits(self, ids: torch.Tensor, name: str | None) -> torch.Tensor:
        """Logits of rows with one adapter, or none."""
        if name is None:
            with self.model.disable_adapter():
                return self.model(input_ids=ids).logits
        self.take(name)
        return self.model(input_ids=ids).logits


@pytest.mark.parametrize("count", [1, 4, 16, 64])
def test_rows_are_pefts(fresh_smollm2: Callable[..., Any], count: int) -> None:
    """Random mixes with base rows: named, by slot, and once the factors are packed."""
    model = build(fresh_smollm2, count).eval()
    solo = Solo(fresh_smollm2, model)
    draw = random.Random(count)
    batch = max(6, count)
    slots = [draw.randrange(-1, count) for _ in range(batch)]
    names = [None if slot < 0 else name_of(slot) for slot in slots]
    ids = torch.randint(0, 49_000, (batch, 5))
    # Rows are compared one by one with PEFT, of large batches a part.
    rows = sorted(draw.sample(range(batch), min(batch, 12)))
    with torch.no_grad():
        outputs = []
        for given in (names, names, torch.tensor(slots)):
            with adapters(model, given):
                outputs.append(model(input_ids=ids).logits[rows])
        assert model.base_model.group.packs.nbytes > 0
        expected = torch.cat([solo.logits(ids[i : i + 1], names[i]) for i in rows])
        solo.model.double()
        exact = torch.cat([solo.logits(ids[i : i + 1], names[i]) for i in rows])
    for logits in outputs:
        assert near(logits, expected, exact)


def test_gradients_are_pefts(fresh_smollm2: Callable[..., Any]) -> None:
    """Every adapter's gradients in a mixed batch are those that PEFT gives its rows alone."""
    model = build(fresh_smollm2, len(KINDS))
    solo = Solo(fresh_smollm2, model)
    names = [name_of(i) for i in (3, 0, 5, 2, 1, 4, 0, 2)]
    names.insert(2, "__base__")
    ids = torch.randint(0, 49_000, (len(names), 6))
    model.set_adapter([name_of(i) for i in range(len(KINDS))])
    with adapters(model, names):
        model(input_ids=ids).logits.square().mean(dim=(1, 2)).sum().backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    def solo_gradients() -> dict[str, torch.Tensor]:
        gradients = {}
        for name in set(names) - {"__base__"}:
            solo.model.zero_grad()
            parameters = solo.take(name)
            rows = ids[[i for i, other in enumerate(names) if other == name]]
            solo.model(input_ids=rows).logits.square().mean(dim=(1, 2)).sum().backward()
            gradients |= {key: p.grad.clone() for key, p in parameters.items()}
        return gradients

    expected = solo_gradients()
    solo.model.double()
    exact = solo_gradients()
    assert set(found) == set(exact)
    # As in test_real_model: the root mean square over all tensors of their relative errors.
    flat = [
        torch.cat([(g[key].double() / exact[key].norm()).flatten() for key in exact])
        for g in (found, expected, exact)
    ]
    assert near(*flat)
