"""Batches that mix adapters: PEFT's outputs, solo gradients and runs, and nothing leaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora import adapters
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


def test_outputs_are_each_rows_alone() -> None:
    """Own heads included: every row's output is its adapter's alone."""
    model = ours().double().eval()
    x = torch.randn(len(NAMES), 7, 16).double()
    y = model(x, adapter_names=NAMES)
    for i, name in enumerate(NAMES):
        torch.testing.assert_close(y[i : i + 1], alone(model, x[i : i + 1], name))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Gradients by name, and clears them."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_gradients_are_the_solo_runs() -> None:
    """Every adapter's gradients, and the input's, equal those of its rows alone (float64)."""
    model = ours().double()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in key or "modules_to_save" in key)
    x = torch.randn(len(NAMES), 5, 16, dtype=torch.float64, requires_grad=True)
    w = torch.randn(len(NAMES), 5, 5, dtype=torch.float64)
    with adapters(model, NAMES):
        y = model(x)
    (y * w).sum().backward()
    dx, mixed = x.grad.clone(), gradients(model)
    x.grad = None
    expected: dict[str, torch.Tensor] = {}
    for i, name in enumerate(NAMES):
        (alone(model, x[i : i + 1], name) * w[i : i + 1]).sum().backward()
        for key, gradient in gradients(model).items():
            expected[key] = expected.get(key, 0) + gradient
    assert set(mixed) == {k for k, g in expected.items() if g.abs().sum() > 0}
    for key, gradient in mixed.items():
        torch.testing.assert_close(gradient, expected[key], msg=key)
    torch.testing.assert_close(dx, x.grad)


def test_wrapped_base_layers() -> None:
    """GPT-2's Conv1D takes part like any other."""
    pytest.importorskip("transformers")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2)
    base = GPT2LMHeadModel(config).double().eval()
    configs = {
        "a": {"r": 2, "target_modules": ["c_attn"]},
        "b": {"r": 4, "target_modules": ["c_proj"]},
    }
    model = build(fastlora, base, configs).eval()
    ids = torch.randint(0, 50, (3, 6))
    y = model(input_ids=ids, adapter_names=["b", None, "a"]).logits
    for i, name in enumerate(("b", None, "a")):
        with torch.no_grad():
            expected = alone(model, ids[i : i + 1], name).logits
        torch.testing.assert_close(y[i : i + 1], expected)


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


def test_backward_inside_autocast() -> None:
    """A mixed forward outside autocast can have its backward inside, in the forward's dtype."""
    layer_model = ours()
    layer_model.set_adapter(["a", "b", "c"])
    x = torch.randn(len(NAMES), 16)
    with adapters(layer_model, NAMES):
        y = layer_model.base_model.model.q(x)
    with torch.autocast("cpu", torch.bfloat16):
        y.sum().backward()
    inside = gradients(layer_model)
    with adapters(layer_model, NAMES):
        layer_model.base_model.model.q(x).sum().backward()
    outside = gradients(layer_model)
    assert set(inside) == set(outside) != set()
    assert all(torch.equal(gradient, outside[key]) for key, gradient in inside.items())
