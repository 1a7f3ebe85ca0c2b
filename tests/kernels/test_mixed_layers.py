"""Whole models in mixed batches on the Triton kernels: the eager results, launches and bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from tests.support.kernels.mixed_models import build, eager, run, use_impl

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.env import triton_interpreted
from fastlora.layers.factors import Parameters
from fastlora.pool import router as batches
from fastlora.routing.in_force import routed
from fastlora.routing.routing import Routing
from fastlora.testing import assert_within_budget
from fastlora.validation import AdapterNotFoundError
from tests.support.bytes.byte_counter import ByteCounter


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
