"""`AdapterChangeDetector` notices whatever changes what packed factors were made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastlora import LoraConfig
from fastlora.routing.adapter_changes import AdapterChangeDetector
from tests.support.tiny import TwoLayers, with_adapters


def _written(layer: Any) -> None:
    with torch.no_grad():
        layer.lora_B["b"].weight += 1


def _replaced(layer: Any) -> None:
    layer.lora_A["b"].weight = nn.Parameter(layer.lora_A["b"].weight.detach().clone())


def _other_data(layer: Any) -> None:
    layer.lora_A["a"].weight.data = layer.lora_A["a"].weight.detach().clone()


def _scaled(layer: Any) -> None:
    layer.scaling["a"] = 0.25


CHANGES: dict[str, Callable[[Any], object]] = {
    "a write": _written,
    "a parameter that is replaced": _replaced,
    "other memory": _other_data,
    "a scaling": _scaled,
    "an adapter that is deleted": lambda layer: layer.lora_A.pop("a"),
    "a dropout that acts": lambda layer: layer.lora_dropout["b"].train(),
    "a hook behind lora_A": lambda layer: layer.lora_A["a"].register_forward_hook(print),
    "a hook before lora_B": lambda layer: layer.lora_B["b"].register_forward_pre_hook(print),
    "another forward": lambda layer: setattr(layer.lora_B["a"], "forward", print),
}


def _layer() -> Any:
    config = LoraConfig(r=2, target_modules=["q"], lora_dropout=0.5)
    model = with_adapters(TwoLayers(), dict.fromkeys("abc", config)).eval()
    return model.base_model.model.q


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change: str) -> None:
    layer, watch, others = _layer(), AdapterChangeDetector(), AdapterChangeDetector()
    watch.record_adapters(layer, layer.scaling, ["a", "b", "absent"])
    others.record_adapters(layer, layer.scaling, ["c"])
    assert watch.adapters_are_unchanged() and watch.adapters_are_unchanged()
    CHANGES[change](layer)
    assert not watch.adapters_are_unchanged()
    assert others.adapters_are_unchanged()


def test_what_cannot_be_watched_is_never_unchanged() -> None:
    layer, hooked, watch = _layer(), AdapterChangeDetector(), AdapterChangeDetector()
    layer.lora_A["a"].register_full_backward_hook(print)
    hooked.record_adapters(layer, layer.scaling, ["a"])
    assert not hooked.adapters_are_unchanged()
    with torch.inference_mode():
        layer.lora_B["b"].weight = nn.Parameter(torch.zeros_like(layer.lora_B["b"].weight))
    watch.record_adapters(layer, layer.scaling, ["b"])
    assert not watch.adapters_are_unchanged()
