"""Adapters on stacks of experts' weights on kernels, against PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastlora
from fastlora.testing import assert_within_budget
from tests.support.moe_models import (
    ExpertBlock,
    copy_random_factors,
    file_gradients,
    routed_tokens,
    stacks_of,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = ["a", None, "b", "a", "c", None]
RANKS = {"a": 4, "b": 1, "c": 16}


def run(model: Any, rows: list[str | None] | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The output and every gradient of a step, with one adapter or a mixed batch."""
    model.zero_grad()
    given = routed_tokens(len(ROWS) * 4, dtype)
    x, *routed = (tensor.detach().to(DEVICE) for tensor in given)
    x.requires_grad_()
    if rows is None:
        y = model(x, *routed)
    else:
        with fastlora.adapters(model, rows):
            y = model(x.unflatten(0, (len(rows), 4)), *routed).flatten(0, 1)
    y.sum().backward()
    gradients = {(n, k): g for n in RANKS for k, g in file_gradients(model, n).items()}
    found = {"y": y.detach(), "x": x.grad, **gradients}
    return {str(name): value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("rows", [None, ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_compute_the_updates(rows: list[str | None] | None, dtype: torch.dtype) -> None:
    model: Any = None
    base = ExpertBlock("gpt_oss", dtype)
    for seed, (name, r) in enumerate(RANKS.items()):
        targets = stacks_of(ExpertBlock("gpt_oss", dtype))[: 1 if name == "c" else 2]
        config = fastlora.LoraConfig(r=r, target_modules=[], target_parameters=targets)
        if model is None:
            model = fastlora.get_peft_model(base, config, name)
        else:
            model.add_adapter(name, config)
        copy_random_factors([model], name, seed)
    if rows is not None:
        model.base_model.set_adapter(list(RANKS))
    model.to(DEVICE)
    layer = model.base_model.model.experts
    layer.impl = "eager"
    same = run(model, rows, dtype)
    layer.impl = "triton"
    found = run(model, rows, dtype)
    layer.impl = "auto"
    truth = run(model.double(), rows, torch.float64)
    assert found.keys() == same.keys() == truth.keys()
    assert len(found) == (6 if rows is None else 12)
    for name, value in found.items():
        assert_within_budget(value, same[name], truth[name], name)
