"""Adapters on stacks of experts' weights on kernels, against PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora.ops.rows import Rows
from fastlora.ops.torch import stacks
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


def make_model(dtype: torch.dtype) -> Any:
    """A block of experts with three adapters, the last one on one of the two stacks."""
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
    return model.to(DEVICE)


@pytest.mark.parametrize("rows", [None, ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_compute_the_updates(
    rows: list[str | None] | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here, PyTorch's products round fp32 factors to the dtype of x, as kernels do."""
    model = make_model(dtype)
    monkeypatch.setattr(stacks, "_dtype_of_factor_products", lambda x, *_: x.dtype)
    if rows is not None:
        model.base_model.set_adapter(list(RANKS))
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


class _NoHostReads(TorchDispatchMode):
    """Raises if the host reads a value of a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func) and "nonzero" not in str(func), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [None, ROWS])
def test_the_host_waits_for_no_layer(
    rows: list[str | None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads the ids of a block once. What a router chooses it reads in no layer."""
    model = make_model(torch.float32)
    model.base_model.model.experts.impl = "triton"
    x, *routed = (tensor.detach().to(DEVICE) for tensor in routed_tokens(24, torch.float32))
    with torch.no_grad(), fastlora.adapters(model, rows or ["a"] * 6):
        expected = model(x.unflatten(0, (-1, 4)), *routed)
        read = Rows.segments.func

        def read_once(own: Rows) -> Any:
            assert own.ids is not None and own.m == len(x), "the host reads a router's choices"
            return read(own)

        monkeypatch.setattr(Rows, "segments", property(read_once))
        with _NoHostReads():
            found = model(x.unflatten(0, (-1, 4)), *routed)
    assert torch.equal(found, expected)


def test_an_index_out_of_range_makes_its_token_nan() -> None:
    """The host, which does not wait for the index, cannot raise."""
    model = make_model(torch.float32)
    model.base_model.model.experts.impl = "triton"
    x, index, weights = (tensor.detach().to(DEVICE) for tensor in routed_tokens(8, torch.float32))
    with torch.no_grad():
        expected = model(x, index, weights)
        index[3, 1], index[5, 0] = 4, -1
        found = model(x, index, weights)
    others = torch.tensor([row not in (3, 5) for row in range(8)], device=DEVICE)
    assert found[~others].isnan().all()
    torch.testing.assert_close(found[others], expected[others])


def test_kernels_read_the_factors_of_a_pool(tmp_path: Path) -> None:
    """In place, with one adapter on one stack, and base rows."""
    model = make_model(torch.float32)
    for name in RANKS:
        model.save_pretrained(tmp_path, selected_adapters=[name])
    base = ExpertBlock("gpt_oss", torch.float32).to(DEVICE)
    x, *routed = (tensor.detach().to(DEVICE) for tensor in routed_tokens(24, torch.float32))
    found = {}
    targets = {"target_modules": [], "target_parameters": stacks_of(base)}
    with fastlora.AdapterPool(base, **targets) as pool, torch.no_grad():
        pool.register_folder(tmp_path)
        for impl in ("eager", "triton"):
            base.experts.impl = impl
            with fastlora.adapters(pool, ROWS):
                found[impl] = base(x.unflatten(0, (6, 4)), *routed)
    with torch.no_grad(), fastlora.adapters(model, ROWS):
        expected = model(x.unflatten(0, (6, 4)), *routed)
    for value in found.values():
        torch.testing.assert_close(value, expected)
