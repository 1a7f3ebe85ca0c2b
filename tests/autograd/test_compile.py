"""torch.compile, activation checkpointing and opcheck on the CPU path."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor_config

import fastlora.functional  # noqa: F401  # registers the operators
from fastlora import FastLoraLinear, LoraConfig, get_peft_model
from fastlora.testing import assert_within_budget
from tests.support.tiny import trainable

IDS = torch.randint(0, 49_000, (2, 12), generator=torch.Generator().manual_seed(5))


def two_layers(p: float) -> nn.Sequential:
    """Two layers with random factors."""
    torch.manual_seed(0)
    layers = [FastLoraLinear(64, 96, r=3, lora_dropout=p), FastLoraLinear(96, 64, r=5, bias=False)]
    for layer in layers:
        nn.init.normal_(layer.lora_B["default"].weight)
    return nn.Sequential(layers[0], nn.SiLU(), layers[1])


def run(function: Any, x: torch.Tensor, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """Output and gradients, from the same random state."""
    torch.manual_seed(9)
    y = function(x)
    return [y.detach(), *torch.autograd.grad(y.pow(2).sum(), parameters)]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compile_of_two_layers(backend: str, p: float) -> None:
    """Full graph, forward and backward, dropout included, in train and in inference mode."""
    if backend == "inductor" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("inductor needs a C++ compiler")
    torch.compiler.reset()  # other tests' graphs count against the limit of a function they share
    model, x = two_layers(p), torch.randn(7, 64)
    parameters = trainable(model)
    # Inductor has a random stream of its own, unless it is told to take torch's.
    with inductor_config.patch(fallback_random=True):
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        results = run(compiled, x, parameters)
        with torch.no_grad():
            inferred = compiled.eval()(x)
    model.train()
    wide = copy.deepcopy(model).double()
    exact = run(wide, x.double(), trainable(wide))  # of one seed, the same masks
    for mine, plain, truth in zip(results, run(model, x, parameters), exact, strict=True):
        assert_within_budget(mine, plain, truth)
    with torch.no_grad():
        assert_within_budget(inferred, model.eval()(x), wide.eval()(x.double()))


@pytest.mark.parametrize("grad", [True, False])
def test_one_graph_for_few_rows_and_many(grad: bool) -> None:
    """What the eager path chooses by the number of rows is no guard of a graph."""
    torch.compiler.reset()
    model = nn.Sequential(FastLoraLinear(32, 48, r=8), FastLoraLinear(48, 512, r=4))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    for rows in (8, 300, 600, 2000):
        with torch.set_grad_enabled(grad):
            y = compiled(torch.randn(rows, 32))
        if grad:
            y.sum().backward()
    assert counter.frame_count == 1


def test_compile_of_the_real_model(fresh_smollm2: Callable[..., Any]) -> None:
    """SmolLM2 with adapters on every linear compiles without a break; loss and gradients equal.

    Four of its thirty layers: the others are traced alike.
    """
    base = fresh_smollm2()
    base.model.layers = base.model.layers[:4]
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    parameters = trainable(model)

    def loss(m: Any) -> torch.Tensor:
        # Not transformers' own, which is fp32 in a float64 model too.
        logits = m(input_ids=IDS).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())

    results = [run(lambda _, m=m: loss(m), IDS, parameters) for m in (compiled, model)]
    wide = copy.deepcopy(model).double()  # of one seed, the same masks
    results.append(run(lambda _: loss(wide), IDS, trainable(wide)))
    for mine, plain, truth in zip(*results, strict=True):
        assert_within_budget(mine, plain, truth)


def test_checkpointing_of_the_real_model(fresh_smollm2: Callable[..., Any]) -> None:
    """SmolLM2's own gradient checkpointing, with dropout: the same gradients."""
    model = get_peft_model(
        fresh_smollm2(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.1)
    ).train()
    parameters = trainable(model)

    def loss(_: torch.Tensor) -> torch.Tensor:
        return model(input_ids=IDS, labels=IDS, use_cache=False).loss

    plain = run(loss, IDS, parameters)
    model.gradient_checkpointing_enable()
    for mine, expected in zip(run(loss, IDS, parameters), plain, strict=True):
        assert torch.equal(mine, expected)


def calls() -> dict[str, tuple[Any, ...]]:
    """Arguments of the operators in PyTorch, of three slots one of which leaves the layer alone."""
    x, weight, dy = torch.randn(6, 16), torch.randn(24, 16), torch.randn(6, 24)
    lora_a = [torch.randn(3, 16), None, torch.randn(5, 16)]
    lora_b = [torch.randn(24, 3), None, torch.randn(24, 5)]
    lora_bias, with_bias = [None, None, torch.randn(24)], [False, False, True]
    factors = [t for own in zip(lora_a, lora_b, lora_bias, strict=True) for t in own]
    ids, cpu = torch.tensor([2, 0, -1, 1, 2, 0]), torch.device("cpu")
    rows = torch.ops.fastlora.rows_sort(ids, 6, 3, cpu)[:4]
    drop, s, scaling = (torch.tensor([7, 8, 9]), [0.5, 0.1, 0.0]), torch.randn(6, 16), torch.rand(3)
    return {
        "rows_sort": (ids, 6, 3, cpu),
        "rows_pieces": (rows[1], 3, 16),
        "lora_keep": (x, torch.tensor([7]), 0.5, s),
        "lora_shrink": (x, rows, lora_a, 1, *drop, "eager"),
        "lora_shrink of siblings": (x, rows, lora_a * 2, 2, None, [0.0] * 6, "eager"),
        "lora_linear": (
            x,
            weight,
            weight[:, 0],
            rows,
            None,
            factors,
            scaling,
            *drop,
            "eager",
            "auto",
        ),
        "lora_linear of s": (x, weight, None, rows, s, factors, scaling, *drop, "eager", "auto"),
        "lora_expand_": (dy, s, rows, lora_b, lora_bias, scaling, "eager"),
        "lora_grad_b": (dy, s, rows, 0, lora_b, with_bias, scaling, True, "eager"),
        "lora_grad_b of ds": (dy, s, rows, 0, lora_b, with_bias, scaling, False, "eager"),
        "lora_grad_x": (dy, weight, s, rows, lora_a, *drop, "eager", "auto"),
        "lora_grad_x alone": (dy, None, s, rows, lora_a, None, drop[1], "eager", "auto"),
        "lora_grad_a": (x, [s], rows, 0, lora_a, *drop, "eager"),
        "lora_grad_a of siblings": (x, [s, s + 1], rows, 0, lora_a * 2, None, [0.0] * 6, "eager"),
    }


@pytest.mark.parametrize("name", list(calls()))
def test_opcheck(name: str) -> None:
    """Schema, fake and dispatch of every operator agree with what it does."""
    operator = getattr(torch.ops.fastlora, name.split()[0]).default
    torch.library.opcheck(operator, calls()[name])
