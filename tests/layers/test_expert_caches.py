"""What invalidates the copies of factors that experts keep in evaluation, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from tests.support.expert_batches import (
    EACH,
    RANKS,
    ROWS,
    batch_inputs,
    looped,
    mixed_block,
    tokens_of,
)
from tests.support.moe_models import file_parameters

Change = Callable[[Any], Any]


def factors_of(model: Any) -> list[nn.Parameter]:
    return [factor for name in RANKS for factor in file_parameters(model, name).values()]


@torch.enable_grad()
def trained(model: Any) -> None:
    """Computes gradients of every adapter."""
    model.train()
    with fastlora.adapters(model, ROWS):
        x, *routed = batch_inputs()
        model(x.unflatten(0, (len(ROWS), EACH)), *routed).square().mean().backward()


def stepped(compiled: bool = False, trains: bool = True, **options: Any) -> Change:
    """Steps of an optimizer, with the gradients of a forward or with others."""

    def change(model: Any) -> None:
        optimizer = torch.optim.SGD(factors_of(model), lr=1.0, **options)
        if trains:
            trained(model)
        else:
            for factor in factors_of(model):
                factor.grad = torch.full_like(factor, 0.1)
        (torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step)()
        model.eval()

    return change


@torch.no_grad()
def in_place(model: Any) -> None:
    for factor in factors_of(model):
        factor.mul_(1.25)


def data(model: Any) -> None:
    for factor in factors_of(model):
        factor.data.mul_(1.25)
    fastlora.clear_caches(model)


def data_after_training(model: Any) -> None:
    """As an optimizer that is unknown writes, which changes no version."""
    trained(model)
    for factor in factors_of(model):
        factor.data.mul_(1.25)
    model.eval()


def data_before_training(model: Any) -> None:
    for factor in factors_of(model):
        factor.data.mul_(1.25)
    model.train().eval()


def memory(model: Any) -> None:
    """Twice, so that the first memory is free for the second replacement."""
    for factor in factors_of(model):
        factor.data = factor.data * 2.5
        factor.data = factor.data * 0.5


def parameters(model: Any) -> None:
    for layer in model.base_model.model.experts.adapted_parameters():
        for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
            factor.weight = nn.Parameter(factor.weight.detach() * 0.75)


def loaded(assign: bool) -> Change:
    def change(model: Any) -> None:
        state = {key: 0.75 * value for key, value in model.state_dict().items()}
        model.load_state_dict(state, assign=assign)

    return change


def scale(model: Any) -> None:
    for layer in model.base_model.model.experts.adapted_parameters():
        for name in layer.r:
            layer.set_scale(name, 2.0)


@torch.no_grad()
def base(model: Any) -> None:
    for stack in model.base_model.model.experts.base_layer.parameters():
        stack.mul_(0.75)


def moved(model: Any) -> None:
    model.bfloat16().double()


def merged(model: Any) -> None:
    """The stacks are written while an adapter is merged."""
    model.merge_adapter(["a"])
    for stack in model.base_model.model.experts.base_layer.parameters():
        stack.data.mul_(2.0)
    model.unmerge_adapter()


def replaced(model: Any) -> None:
    """An adapter is deleted, and another one gets its name."""
    config = model.peft_config["b"]
    model.delete_adapter("b")
    model.add_adapter("b", config)
    for factor in file_parameters(model, "b").values():
        nn.init.normal_(factor)


CHANGES: dict[str, Change] = {
    "one by one": stepped(foreach=False),
    "foreach": stepped(foreach=True),
    "fused": stepped(fused=True),
    "compiled": stepped(compiled=True),
    "fused, of given gradients": stepped(trains=False, fused=True),
    "foreach, of given gradients": stepped(trains=False, foreach=True),
    "compiled, of given gradients": stepped(trains=False, compiled=True),
    "loaded": loaded(assign=False),
    "assigned": loaded(assign=True),
    **{
        change.__name__: change
        for change in (
            *(in_place, data, data_after_training, data_before_training, memory, parameters),
            *(scale, base, moved, merged, replaced),
        )
    },
}


def expected_of(model: Any, inputs: list[torch.Tensor], rows: list[str | None]) -> torch.Tensor:
    """The output in plain PyTorch, sample by sample."""
    parts = [
        looped(model, *(t[tokens_of([sample])] for t in inputs), name)  # type: ignore[misc]
        for sample, name in enumerate(rows)
    ]
    return torch.cat(parts).detach()


def run(model: Any, inputs: list[torch.Tensor], rows: list[str | None]) -> torch.Tensor:
    x, *routed = inputs
    with fastlora.adapters(model, rows):
        y: torch.Tensor = model(x.unflatten(0, (len(rows), EACH)), *routed)
    return y.flatten(0, 1)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: str) -> None:
    """By a mixed batch and by one adapter alone."""
    model, inputs, rows = mixed_block("qwen3_moe").eval(), batch_inputs(), list(ROWS)
    before = expected_of(model, inputs, rows)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(run(model, inputs, rows), before)
            model.set_adapter("b")
            model(*inputs)
    CHANGES[change](model)
    model.set_adapter("b")
    expected = expected_of(model, inputs, rows)
    assert (expected - before).abs().amax() > 1e-3
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(run(model, inputs, rows), expected)
            alone = expected_of(model, inputs, ["b"] * len(rows))
            torch.testing.assert_close(model(*inputs), alone)


@pytest.mark.parametrize("change", ["fused", "data", "data_after_training", "in_place"])
def test_changes_within_a_block_are_seen(change: str) -> None:
    model, (x, *routed) = mixed_block("gpt_oss").eval(), batch_inputs()
    x = x.unflatten(0, (len(ROWS), EACH))
    with torch.no_grad(), fastlora.adapters(model, ROWS):
        before = [model(x, *routed) for _ in range(3)][0]
        CHANGES[change](model)
        found = model(x, *routed)
    torch.testing.assert_close(
        found.flatten(0, 1), expected_of(model, [x.flatten(0, 1), *routed], list(ROWS))
    )
    assert not torch.allclose(found, before)


def test_a_hot_swap_is_seen(tmp_path: Path) -> None:
    """Also where the file adapts fewer stacks than the adapter did."""
    model, inputs, rows = mixed_block("qwen3_moe").eval(), batch_inputs(), list(ROWS)
    other = mixed_block("qwen3_moe")
    in_place(other)
    other.save_pretrained(tmp_path, selected_adapters=["c", "d"])
    for name, source in (("c", "c"), ("d", "d"), ("a", "d")):
        with torch.no_grad():
            for _ in range(3):
                before = run(model, inputs, rows)
            fastlora.hotswap_adapter(model, tmp_path / source, name)
            found = run(model, inputs, rows)
        torch.testing.assert_close(found, expected_of(model, inputs, rows))
        assert not torch.allclose(found, before)
        own = tokens_of([sample for sample, row in enumerate(rows) if row == name])
        wanted = expected_of(other, inputs, [source] * len(rows))
        torch.testing.assert_close(found[own], wanted[own])
