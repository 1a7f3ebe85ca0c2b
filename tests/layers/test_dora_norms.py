"""DoRA's norms: in factored form, and what a layer keeps of them until something changes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import fastlora.layers.dora_norms as dora_layer
from fastlora.bench.measure import peak_step_bytes
from fastlora.ops.torch.dora import (
    dora_scale,
    replace_zeros_with_infinity,
    squared_row_norms,
    squared_row_norms_with_update,
)
from tests.support.dora_truth import layer_of, make_problem


@pytest.mark.parametrize(
    ("n", "k", "r", "dtype"),
    [
        (33, 20, 3, torch.float32),
        (1, 300, 16, torch.float32),
        (2100, 130, 4, torch.bfloat16),
        (64, 96, 8, torch.float16),
        (40, 31, 64, torch.float64),
    ],
    ids=str,
)
def test_norms_in_factored_form(n: int, k: int, r: int, dtype: torch.dtype) -> None:
    """Against the dense norm in float64; the error of a factored one is that of its terms."""
    problem = make_problem(1, n, k, r, dtype)
    squares = squared_row_norms_with_update(
        problem.weight, squared_row_norms(problem.weight), problem.lora_a, problem.lora_b, 0.75
    )
    wide = problem.to(torch.float64)
    update = 0.75 * wide.lora_b @ wide.lora_a
    truth = (wide.weight + update).square().sum(1)
    terms = (wide.weight.norm(dim=1) + update.norm(dim=1)).square()
    error = (squares.double() - truth).abs() / terms
    assert error.max() <= 2 * torch.finfo(dtype).eps
    assert squares.dtype == torch.promote_types(dtype, torch.float32)


def test_norms_of_nothing_and_of_what_is_not_finite() -> None:
    """Of a zero row g is 0; a NaN in a row stays in that row."""
    weight, zeros = torch.eye(3), torch.zeros(3, 1)
    weight[1], weight[2, 2] = 0, float("nan")
    for scaling in (2.0, torch.tensor(2.0)):
        sums = squared_row_norms_with_update(
            weight, squared_row_norms(weight), zeros.t(), zeros, scaling
        )
        scale = dora_scale(torch.tensor([0.5, 3.0, 1.0]), replace_zeros_with_infinity(sums))
        assert scale[0] == 0.5 and scale[1] == 0 and scale[2].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_makes_no_weight_sized_temporary(dtype: torch.dtype) -> None:
    """The peak of a norm is a fraction of the weight's bytes."""
    problem = make_problem(1, 3000, 1024, 4, dtype)

    def norm() -> None:
        squares = squared_row_norms(problem.weight)
        squared_row_norms_with_update(problem.weight, squares, problem.lora_a, problem.lora_b, 0.75)

    norm()
    assert peak_step_bytes(norm) < problem.weight.nbytes / 2


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Counts calls of a function that layers make norms with."""
    calls: list[int] = []
    before = getattr(dora_layer, name)

    def call(*args: Any) -> torch.Tensor:
        calls.append(1)
        return before(*args)

    monkeypatch.setattr(dora_layer, name, call)
    return calls


def test_when_norms_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base's once; an adapter's in every training forward, and once while only inferring."""
    layer = layer_of(make_problem(5, 24, 20, 4, torch.float32), 6, 0.0)
    layer.weight.requires_grad_(False)
    layer.clear_caches()
    base, adapter = (
        counted(monkeypatch, "squared_row_norms"),
        counted(monkeypatch, "squared_row_norms_with_update"),
    )
    x = torch.randn(5, 20)
    for _ in range(3):
        layer(x)
    assert (len(base), len(adapter)) == (1, 3)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    assert (len(base), len(adapter)) == (1, 4)
    layer(x)  # an optimizer that moves no version may step behind this
    with torch.no_grad():
        layer(x)
    assert (len(base), len(adapter)) == (1, 6)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    with torch.no_grad():
        torch.testing.assert_close(copied(x), layer(x))
    assert (len(base), len(adapter)) == (2, 7)
