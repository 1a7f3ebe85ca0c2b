"""torch.compile and activation checkpointing of SmolLM2."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import fastlora.functional  # noqa: F401  # registers the operators
from fastlora import LoraConfig, adapters, get_peft_model
from fastlora.testing import assert_within_budget
from tests.support.tiny import TwoLayers, trainable

IDS = torch.randint(0, 49_000, (2, 12), generator=torch.Generator().manual_seed(5))

X = torch.randn(2, 16, generator=torch.Generator().manual_seed(5))


def run(function: Any, x: torch.Tensor, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """Output and gradients, from the same random state."""
    torch.manual_seed(9)
    y = function(x)
    return [y.detach(), *torch.autograd.grad(y.pow(2).sum(), parameters)]


def test_compile_of_the_real_model(fresh_smollm2: Callable[..., Any]) -> None:
    """SmolLM2 with adapters on every linear compiles without a break; loss and gradients equal.

    Two of its thirty layers: the others are traced alike.
    """
    base = fresh_smollm2(layers=2)
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
        fresh_smollm2(layers=3),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.1),
    ).train()
    parameters = trainable(model)

    def loss(_: torch.Tensor) -> torch.Tensor:
        return model(input_ids=IDS, labels=IDS, use_cache=False).loss

    plain = run(loss, IDS, parameters)
    model.gradient_checkpointing_enable()
    for mine, expected in zip(run(loss, IDS, parameters), plain, strict=True):
        assert torch.equal(mine, expected)


def test_a_mixed_batch_after_batches_of_other_sizes() -> None:
    """The graph for any batch size compares the size with the number of adapter ids."""
    config = LoraConfig(r=4, target_modules=["q"], init_lora_weights=False)
    model, x = get_peft_model(TwoLayers(), config).eval(), torch.randn(4, 3, 16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(x[:2]), compiled(x)  # sizes are dynamic from the second one on
        with adapters(model, ["default", None]):
            torch.testing.assert_close(compiled(x[:2]), model(x[:2]))


def test_a_compiled_model_in_blocks_of_asyncio_tasks() -> None:
    """Blocks that tasks open need no graph of their own, and break none."""
    config = LoraConfig(r=4, target_modules=["q", "v"], init_lora_weights=False)
    model = get_peft_model(TwoLayers(), config, "a").eval()
    model.add_adapter("b", config)
    frames = CompileCounter()
    compiled = torch.compile(model, backend=frames, fullgraph=True)

    async def run(function: Any, ids: list[str]) -> torch.Tensor:
        with torch.no_grad(), adapters(model, ids):
            return function(X)

    for ids in (["a", "b"], ["b", "a"], ["b", "b"]):
        expected = asyncio.run(run(model, ids))
        torch.testing.assert_close(asyncio.run(run(compiled, ids)), expected)
    assert frames.frame_count == 1
