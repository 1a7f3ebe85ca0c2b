"""Batches that mix adapters with heads of their own; and generation, which is PEFT's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from tests.support.tiny import TwoLayers, randomise

peft = pytest.importorskip("peft", reason="compares with PEFT")

CONFIGS: dict[str, dict[str, Any]] = {
    "a": {"r": 1, "target_modules": ["q", "v"]},
    "b": {"r": 3, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q"]},
    "c": {"r": 16, "lora_bias": True, "target_modules": ["q", "v"]},
    "d": {"r": 64, "lora_alpha": 5, "target_modules": ["v"], "modules_to_save": ["head"]},
}
NAMES = ["b", "__base__", "a", "d", "c", "b", "a", None]


def build(library: Any, base: nn.Module, configs: dict[str, dict[str, Any]] = CONFIGS) -> Any:
    """A model with every adapter of CONFIGS, factors at random."""
    model = None
    for name, config in configs.items():
        torch.manual_seed(5)
        if model is None:
            model = library.get_peft_model(base, library.LoraConfig(**config), adapter_name=name)
        else:
            model.add_adapter(name, library.LoraConfig(**config))
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    return model


def ours() -> Any:
    """Ours, over TwoLayers."""
    torch.manual_seed(0)
    return build(fastlora, TwoLayers())


def alone(model: Any, x: torch.Tensor, name: str | None) -> torch.Tensor:
    """A row's output with its adapter alone."""
    if name in (None, "__base__"):
        with model.disable_adapter():
            return model(x)
    model.set_adapter(name)
    return model(x)


def test_rows_with_heads_of_their_own() -> None:
    """Every row's output and gradients are its adapter's alone (float64)."""
    model = ours().double()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in key or "modules_to_save" in key)
    x = torch.randn(len(NAMES), 7, 16, dtype=torch.float64, requires_grad=True)
    y = model(x, adapter_names=NAMES)
    y.square().sum().backward()
    mixed = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for i, name in enumerate(NAMES):
        own = alone(model, x[i : i + 1], name)
        torch.testing.assert_close(y[i : i + 1], own)
        own.square().sum().backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None and (key in mixed or parameter.grad.any()):
            torch.testing.assert_close(mixed[key], parameter.grad, msg=key)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, adapter_names=NAMES), y)


def test_generate_with_beams(fresh_smollm2: Callable[..., Any], smollm2_tokenizer: Any) -> None:
    """On SmolLM2, mixed generation gives PEFT's tokens, greedy and with beam search."""
    configs = {
        "a": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
        "b": {"r": 3, "target_modules": "all-linear", "use_rslora": True},
    }
    model, twin = build(fastlora, fresh_smollm2(), configs), build(peft, fresh_smollm2(), configs)
    theirs = dict(twin.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                theirs[name].copy_(parameter.mul_(0.1))
    prompts = ["The sea is", "My cat is called", "Paris is"]
    smollm2_tokenizer.padding_side = "left"
    prompt = smollm2_tokenizer(prompts, return_tensors="pt", padding=True)
    names = ["b", "__base__", "a"]
    for beams in (1, 2):
        arguments = {**prompt, "max_new_tokens": 6, "do_sample": False, "num_beams": beams}
        tokens = [m.eval().generate(**arguments, adapter_names=names) for m in (model, twin)]
        assert torch.equal(*tokens)
