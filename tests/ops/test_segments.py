"""Mixed batches in PyTorch with rows that are not sorted."""

from __future__ import annotations

import pytest
import torch

from fastlora.ops.factors import Base, LayerAdapterOperands
from fastlora.ops.rows import sort_rows
from fastlora.ops.torch import segments
from fastlora.testing import assert_within_budget

M, K, N = 23, 24, 20
MIXES = {
    # Slots 1 and 3 have adjacent rows. Slot 4 has none. Slot 0 has no adapter.
    "adjacent": [-1, 1, 1, 1, 0, 0, 2, 3, 2, -1, 0, 5, 2, 5, 2, -1, 0, 2, 5, -1, 5, 2, 2],
    "one slot": [2] * M,
    "alternating": [slot % 4 + 1 for slot in range(M)],  # as many as run in batched products
}


def operands(dtype: torch.dtype, ranks: list[int], with_bias: bool) -> LayerAdapterOperands:
    """Random adapters of slots 1 to 5."""
    return LayerAdapterOperands(
        [torch.randn(r, K).to(dtype) / 5 for r in ranks],
        [torch.randn(N, r).to(dtype) / 5 for r in ranks],
        [torch.randn(N).to(dtype) if with_bias else None for _ in ranks],
        torch.tensor([0.5, 1.0, 2.0, 3.0, 0.25]),
        (0.0,) * len(ranks),
        None,
        (1, 2, 3, 4, 5),
    )


def expected(
    y: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, adapters: LayerAdapterOperands
) -> torch.Tensor:
    """y plus each adapter's update in y's dtype."""
    y = y.clone()
    for index, slot in enumerate(adapters.slots or ()):
        scaling, own = adapters.scaling[index].to(y.dtype), ids == slot
        s = scaling * (x[own] @ adapters.lora_a[index].to(y.dtype).t())
        y[own] += s @ adapters.lora_b[index].to(y.dtype).t()
        lora_bias = adapters.lora_bias[index]
        if lora_bias is not None:
            y[own] += lora_bias.to(y.dtype) * scaling
    return y


@pytest.mark.parametrize("ranks", [[3, 8, 4, 3, 1], [8] * 5], ids=["ranks", "one rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_updates_are_added_to_the_rows_of_y(mix: str, dtype: torch.dtype, ranks: list[int]) -> None:
    """The result is y itself, which may be columns of a larger tensor, and s is sorted."""
    torch.manual_seed(0)
    ids = torch.tensor(MIXES[mix])
    rows, adapters = sort_rows(ids, M, 6), operands(dtype, ranks, mix != "one slot")
    x, whole = torch.randn(M, K).to(dtype), torch.randn(M, N + 6).to(dtype)
    before = whole.clone()
    y, base = whole[:, 3:-3], (ids < 1) | (ids > 5)
    same = expected(y, x, ids, adapters)
    truth = expected(y.double(), x.double(), ids, adapters)
    kept, s = segments.forward(x, Base(y=y), adapters, rows)
    assert torch.equal(whole, before)
    made, _ = segments.forward(x, Base(y=y, inplace=True), adapters, rows)
    assert made is y
    again, _ = segments.forward(x, Base(y=before[:, 3:-3], inplace=True), adapters, rows, s)
    for found in (kept, made, again):
        assert_within_budget(found, same, truth)
        assert torch.equal(found[base], kept[base])
    assert torch.equal(made[base], before[:, 3:-3][base])
    assert torch.equal(whole[:, :3], before[:, :3])


def test_rows_of_segments() -> None:
    rows = sort_rows(torch.tensor(MIXES["adjacent"]), M, 6)
    found = dict(zip(rows.used_slots, rows.segment_rows, strict=True))
    assert found[1] == slice(1, 4) and found[3] == slice(7, 8)
    for slot in (0, 2, 5):
        own = found[slot]
        assert isinstance(own, torch.Tensor) and own.dtype == torch.int64
        assert own.tolist() == [row for row in range(M) if MIXES["adjacent"][row] == slot]
    assert sort_rows(torch.tensor([-1, -1]), 2, 6).segment_rows == ()
