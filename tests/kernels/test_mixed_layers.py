"""Whole models in mixed batches on the Triton kernels: the eager results, launches and bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from tests.support.kernels.mixed_models import build, eager, run, use_impl

pytest.importorskip("triton", reason="triton is not installed")

import fastlora
from fastlora.env import triton_interpreted
from fastlora.layers.factors import Parameters
from fastlora.pool import router as batches
from fastlora.routing.in_force import routed
from fastlora.routing.routing import Routing
from fastlora.testing import assert_within_budget
from fastlora.validation import AdapterNotFoundError
from tests.support.bytes.byte_counter import ByteCounter


@pytest.mark.parametrize(("count", "batch", "tokens"), [(1, 3, 1), (7, 17, 1), (9, 11, 8)])
def test_a_model_on_the_kernels(
    lab: Any, count: int, batch: int, tokens: int, dtype: torch.dtype
) -> None:
    """Decode and prefill sizes, mixed ranks, rsLoRA, lora_bias, absent modules and base rows."""
    model = build(lab, count, dtype)
    generator = torch.Generator().manual_seed(batch)
    drawn = torch.randint(-1, count, (batch,), generator=generator)
    names = [None if i < 0 else f"a{i}" for i in drawn.tolist()]
    x = torch.randn(batch, tokens, 64, generator=generator).to(lab.device, dtype)
    reference = eager(model)
    expected = run(reference, x, names)
    exact = run(reference.double(), x.double(), names)
    for ids in (names, names, drawn.to(lab.device)):  # traced on the first call; names and slots
        assert_within_budget(run(model, x, ids), expected, exact)


def launches(model: Any, x: torch.Tensor, ids: Any) -> Counter[str]:
    """Launches of each kernel in one forward, once siblings are known."""
    for _ in range(2):
        run(model, x, ids)
    with ByteCounter(x=[x]) as counter:
        run(model, x, ids)
    return Counter({name: count.launches for name, count in counter.kernels.items()})


@pytest.mark.skipif(not triton_interpreted(), reason="launches are counted in the interpreter")
def test_launches_do_not_depend_on_the_mix(lab: Any) -> None:
    """One shrink for q, k and v, one for o, and one linear each, for any mix and any number."""
    model = build(lab, 6, torch.float32)
    x = torch.randn(12, 64)
    found = [
        launches(model, x, ids)
        for ids in (["a0"] * 12, [None] * 12, [f"a{i % 6}" for i in range(12)])
    ]
    assert found[0] == found[1] == found[2]
    assert sorted(found[0].values()) == [2, 4]  # shrinks and linears


def test_a_pool_on_the_kernels(lab: Any, dtype: torch.dtype) -> None:
    """Rows of a pool's adapters equal the same adapters as parameters; slots and names alike."""
    model = build(lab, 5, dtype)
    base = eager(model).unload()
    pool = fastlora.AdapterPool(base, target_modules=["q", "k", "v", "o"], max_adapters=8)
    for name, config in model.peft_config.items():
        state = {
            f"base_model.model.{key.replace(f'.{name}.', '.')}": tensor
            for key, tensor in model.base_model.model.state_dict().items()
            if f".{name}." in key
        }
        pool.load(name, state, config=config)
    use_impl(base, "triton")
    names = ["a3", None, "a0", "a4", "a2", "a1", "a3"]
    x = torch.randn(7, 2, 64).to(lab.device, dtype)
    expected = run(eager(model), x, names)
    exact = run(eager(model).double(), x.double(), names)
    slots = torch.tensor([-1 if name is None else pool.slot_of(name) for name in names])
    for ids in (names, names, slots):
        assert_within_budget(run(base, x, ids), expected, exact)
    state["base_model.model.q.lora_A.weight"].mul_(2)
    pool.load("a4", state, config=model.peft_config["a4"])  # a hot swap
    assert not torch.allclose(run(base, x, names)[3], expected[3])
    with pytest.raises(AdapterNotFoundError, match="slot 7"):
        run(base, x, torch.tensor([0, 7]))


def test_ids_that_nobody_checked(lab: Any, dtype: torch.dtype) -> None:
    """As on a GPU: rows of ids out of range come out NaN, all others right, and it is said."""
    model = build(lab, 3, dtype)
    ids = torch.tensor([0, 5, -1, 2, -7])
    slots = batches.looked_up(torch.arange(3), ids).to(lab.device)
    assert slots.tolist() == [0, -2, -1, 2, -2]
    tuner, names = model.base_model, ("a0", "a1", "a2")
    seeds = torch.zeros(3, dtype=torch.int64)
    routing = Routing(tuner.group, names, slots, seeds, Parameters(names), tuner.routed)
    x = torch.randn(5, 64).to(lab.device, dtype)
    with torch.no_grad(), routed(routing):
        y = model(x)
    good = [0, 2, 3]
    expected = run(model, x[good], ["a0", None, "a2"])
    exact = run(eager(model).double(), x[good].double(), ["a0", None, "a2"])
    assert_within_budget(y[good], expected, exact)
    assert y[[1, 4]].isnan().all()
    with pytest.raises(AdapterNotFoundError, match="out of range.*came out NaN"):
        routing.check_ids()
    use_impl(model, "eager")
    again = Routing(tuner.group, names, slots, seeds, Parameters(names), tuner.routed)
    with pytest.raises(AdapterNotFoundError, match="out of range"), torch.no_grad(), routed(again):
        model(x)
