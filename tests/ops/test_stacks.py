"""Adapters on a stack of weights against each matrix alone, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlora.autograd.stacks import stacked_lora_linear
from fastlora.ops.rows import Rows, sort_rows
from fastlora.ops.stacks import (
    StackedWeightAdapterOperands,
    dropout_seeds_of_keys,
    rank_row_views,
    transposed_rank_rows,
)
from fastlora.ops.torch import reference
from fastlora.ops.torch.stacks import grouped_linear
from fastlora.testing import assert_within_budget

E, N, K = 5, 24, 16
RANKS = (4, 1, 3, 0)  # the last adapter does not adapt the stack
SLOTS = len(RANKS)


def keys_of(count: int, seed: int = 0) -> torch.Tensor:
    """Keys of rows, with a matrix and an adapter that have none."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randint(0, E - 1, (count,), generator=generator)
    return matrix * SLOTS + torch.randint(0, SLOTS, (count,), generator=generator)


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


class Case:
    """Random operands, in the layout of adapter files."""

    def __init__(self, dtype: torch.dtype, p: float = 0.0, rows: int = 40) -> None:
        torch.manual_seed(1)
        self.stack = torch.randn(E, N, K, dtype=dtype)
        self.files = [(leaf(E * r, K, dtype=dtype), leaf(N, r * E, dtype=dtype)) for r in RANKS]
        self.scaling = torch.rand(SLOTS, dtype=torch.float64 if dtype.itemsize == 8 else None)
        self.dropout_p = tuple(p if slot != 1 else 0.0 for slot in range(SLOTS))
        self.seeds = dropout_seeds_of_keys(torch.arange(SLOTS), E) if p else None
        self.rows: Rows = sort_rows(keys_of(rows), rows, E * SLOTS)
        self.x = torch.randn(rows, K, dtype=dtype)[self.rows.order.long()].requires_grad_()
        self.dy = torch.randn(rows, N, dtype=dtype)

    def operands(self) -> StackedWeightAdapterOperands:
        pairs = [
            rank_row_views(a, b, E) if a.numel() else (a.view(E, 0, K), b.new_empty(E, 0, N))
            for a, b in self.files
        ]
        lora_a, lora_b = ([*part] for part in zip(*pairs, strict=True))
        return StackedWeightAdapterOperands(
            lora_a, lora_b, self.scaling, self.dropout_p, self.seeds
        )

    def truth(self) -> torch.Tensor:
        """Each row by itself, with PEFT's own formula for the layout."""
        out = []
        for key, start, stop in self.rows.segments:
            matrix, slot = divmod(key, SLOTS)
            (a, b), r = self.files[slot], RANKS[slot]
            x = self.x[start:stop]
            y = x @ self.stack[matrix].T
            if r:
                down = a.reshape(E, r, K)[matrix]
                up = b.reshape(N, r, E)[:, :, matrix]
                p = self.dropout_p[slot]
                if p and self.seeds is not None:
                    keep = reference.draw_keep_mask(x.detach(), self.seeds[key : key + 1], p)
                    x = x * keep / (1 - p)
                y = y + self.scaling[slot] * (x @ down.T @ up.T)
            out.append(y)
        return torch.cat(out)

    def parameters(self) -> list[torch.Tensor]:
        return [self.x, self.stack, *(t for pair in self.files for t in pair if t.numel())]


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_values_and_every_gradient(p: float) -> None:
    case = Case(torch.float64, p)
    case.stack.requires_grad_()
    y = stacked_lora_linear(case.x, case.stack, None, SLOTS, case.operands(), case.rows, "eager")
    expected = case.truth()
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y, case.parameters(), case.dy)
    for own, wanted in zip(
        found, torch.autograd.grad(expected, case.parameters(), case.dy), strict=True
    ):
        torch.testing.assert_close(own, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_gradients_of_narrow_factors(dtype: torch.dtype) -> None:
    """A dy below the smallest fp16 number, with a large x, gives gradients within the range."""
    case = Case(torch.float32)
    case.x = (case.x.detach() * 1e5).requires_grad_()
    case.dy *= 1e-8
    case.files = [(a.detach().to(dtype), b.detach().to(dtype)) for a, b in case.files]
    truth = Case(torch.float64)
    truth.x, truth.stack = case.x.detach().double(), case.stack.double()
    truth.scaling = case.scaling.double()
    truth.files = [(a.double(), b.double()) for a, b in case.files]
    factors = []
    for own in (case, truth):
        factors.append([t.requires_grad_() for pair in own.files for t in pair if t.numel()])
    y = stacked_lora_linear(case.x, case.stack, None, SLOTS, case.operands(), case.rows, "eager")
    found = torch.autograd.grad(y, factors[0], case.dy)
    expected = torch.autograd.grad(truth.truth(), factors[1], case.dy.double())
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(
            actual.double(), wanted, rtol=1e-2, atol=1e-2 * wanted.abs().max().item()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_librarys_grouped_product_and_its_replacement_agree(dtype: torch.dtype) -> None:
    case = Case(dtype)
    y = grouped_linear(case.x, case.stack, case.rows, SLOTS)
    expected = torch.cat(
        [
            case.x[start:stop].double() @ case.stack[key // SLOTS].double().T
            for key, start, stop in case.rows.segments
        ]
    )
    torch.testing.assert_close(
        y.double(), expected, rtol=2e-2, atol=1e-5 if dtype.itemsize == 4 else 5e-2
    )


# Numbers of rows by matrix: few, several parts of several keys, a key larger than a part, and many.
SPREADS = {
    "few": (8, 0, 20, 7, 5),
    "parts": (0, 100, 120, 0, 90, 130, 150, 0, 180, 60, 170, 130, 0, 110, 140, 0),
    "large": (600, 5, 0, 5, 5, 5),
    "many": (0, 900, 0, 400),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("wide", "p"),
    [("w", 0.0), ("w", 0.3), ("wwww", 0.0), ("wwnn", 0.3), ("m", 0.0), ("nm", 0.0)],
)
@pytest.mark.parametrize("spread", SPREADS)
def test_factors_in_fp32(spread: str, wide: str, p: float, dtype: torch.dtype) -> None:
    """Adapters with wide factors, with narrow ones, or with one of each, ``m``."""
    torch.manual_seed(1)
    counts, slots = torch.tensor(SPREADS[spread]), len(wide)
    e, m = len(counts), int(counts.sum())
    matrix = torch.arange(e).repeat_interleave(counts)[torch.randperm(m)]
    keys = matrix * slots + torch.randint(0, slots, (m,))
    if slots > 1:
        keys[::7] = -1
    rows = sort_rows(keys, m, e * slots)
    x, dy = torch.randn(m, K).to(dtype), torch.randn(m, N).to(dtype)
    kinds = {"w": (torch.float32,) * 2, "n": (dtype,) * 2, "m": (torch.float32, dtype)}
    files = [
        (torch.randn(e * 4, K).to(a), torch.randn(N, 4 * e).to(b))
        for a, b in (kinds[each] for each in wide)
    ]
    scaling = torch.rand(slots) + 0.5
    seeds = dropout_seeds_of_keys(torch.arange(slots), e) if p else None

    def run(exact: bool, factor_dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        wanted = torch.float64 if exact else factor_dtype
        leaves = [t.clone() if wanted is None else t.to(wanted) for pair in files for t in pair]
        own_x = (x.double() if exact else x.clone()).requires_grad_()
        own = [leaf.requires_grad_() for leaf in leaves]
        pairs = zip(own[::2], own[1::2], strict=True)
        lora_a, lora_b = zip(
            *((rank_row_views(a, b, e)[0], transposed_rank_rows(b, e)) for a, b in pairs),
            strict=True,
        )
        numbers = scaling.double() if exact else scaling
        operands = StackedWeightAdapterOperands([*lora_a], [*lora_b], numbers, (p,) * slots, seeds)
        y = stacked_lora_linear(own_x, None, own_x.new_zeros(m, N), slots, operands, rows, "eager")
        return [y.detach(), *torch.autograd.grad(y, [own_x, *own], dy.to(y.dtype))]

    wanted = [dtype, dtype, *(t.dtype for pair in files for t in pair)]
    runs = zip(run(False), run(False, dtype), run(True), wanted, strict=True)
    for number, (found, same, truth, own_dtype) in enumerate(runs):
        assert_within_budget(found, same, truth, f"result {number}")
        assert found.dtype == own_dtype


class _LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that an operator returns, besides views of the given tensors."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            owned = isinstance(tensor, torch.Tensor) and tensor.untyped_storage()
            if owned and owned.data_ptr() not in self.known:
                self.numel = max(self.numel, tensor.numel())
        return made


@pytest.mark.parametrize("adapters", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nothing_as_large_as_the_stack_is_made(adapters: int, dtype: torch.dtype) -> None:
    """In the forward, and in the backward for a frozen stack."""
    count, n, k, r, rows = 64, 32, 64, 4, 100
    stack = torch.randn(count, n, k, dtype=dtype)
    keys = torch.randint(0, count * adapters, (rows,))
    sorted_rows = sort_rows(keys, rows, count * adapters)
    x = torch.randn(rows, k, dtype=dtype).requires_grad_()
    files = [(leaf(count * r, k, dtype=dtype), leaf(n, r * count, dtype=dtype))] * adapters
    pairs = [(rank_row_views(a, b, count)[0], transposed_rank_rows(b, count)) for a, b in files]
    lora_a, lora_b = ([*part] for part in zip(*pairs, strict=True))
    scaling = torch.ones(adapters, dtype=torch.float64 if dtype.itemsize == 8 else None)
    operands = StackedWeightAdapterOperands(lora_a, lora_b, scaling, (0.0,) * adapters)
    with _LargestTensor(stack) as largest:
        y = stacked_lora_linear(x, stack, None, adapters, operands, sorted_rows, "eager")
        y.sum().backward()
    assert rows * k <= largest.numel <= max(rows * k, count * r * k) < stack.numel() / 2
    assert all(factor.grad is not None and factor.grad.any() for factor in files[0])
