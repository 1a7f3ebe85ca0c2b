"""The slots of vLLM's layers without vLLM: a slot that changes, and rows of another batch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from unittest import mock

import numpy as np
import pytest
import torch

from fastlora.integrations.vllm.slots import LayerSlots
from fastlora.ops.slots import BatchRows, SlotLoraUpdater
from fastlora.ops.torch import packed_forward
from fastlora.ops.torch.packed_slots import PackedSlots
from fastlora.testing import assert_within_budget

SLOTS, RANK, K, WIDTHS = 4, 16, 24, (12, 8)
Adapter = list[tuple[torch.Tensor, torch.Tensor, float]]
ROWS = (3, -1, 0, 0, 1, -1, 3, 1, 0)


def _empty_slots() -> LayerSlots:
    stacks_b = [torch.empty(SLOTS, 1, n, RANK) for n in WIDTHS]
    return LayerSlots(torch.empty(SLOTS, 1, RANK, K), stacks_b)


def _load(slots: LayerSlots, slot: int, rank: int) -> Adapter:
    own = [(torch.randn(rank, K), torch.randn(n, rank), 0.5 + i) for i, n in enumerate(WIDTHS)]
    downs, ups, scalings = zip(*own, strict=True)
    slots.write(slot, downs, ups, scalings)
    return own


def _batch(rows: Sequence[int], captured: bool = False) -> BatchRows:
    buffer = torch.full((32,), -1, dtype=torch.int64)
    batch = BatchRows(buffer, SLOTS, captured)
    _start(batch, rows)
    return batch


def _start(batch: BatchRows, rows: Sequence[int]) -> None:
    batch.slots.fill_(-1)
    batch.slots[: len(rows)] = torch.tensor(rows)
    batch.reset_for_batch(np.array(rows))


def _check(
    slots: LayerSlots, adapters: dict[int, Adapter], batch: BatchRows, rows: Sequence[int]
) -> None:
    x, y = torch.randn(len(rows), K), torch.randn(len(rows), sum(WIDTHS))
    truth, same = y.double(), y.clone()
    for row, slot in enumerate(rows):
        start = 0
        for lora_a, lora_b, scaling in adapters.get(slot, []):
            part = slice(start, start + lora_b.shape[0])
            s = x[row].double() @ lora_a.double().T
            truth[row, part] += scaling * (s @ lora_b.double().T)
            same[row, part] += scaling * (x[row] @ lora_a.T @ lora_b.T)
            start = part.stop
    own, tables = y.clone(), y.clone()
    (products,) = slots.linear
    with torch.no_grad():
        products.add_(own, x, batch)
        products.add_from_tables_(tables, x, batch)
    for result in (own, tables):
        assert_within_budget(result, same, truth)
        for row, slot in enumerate(rows):
            if slot not in adapters:
                assert torch.equal(result[row], y[row])


@pytest.mark.parametrize("captured", [False, True])
def test_a_slot_and_a_batch_change(captured: bool) -> None:
    """By the packed factors and by the tables, with the largest rank kept and changed."""
    slots = _empty_slots()
    adapters = {slot: _load(slots, slot, rank) for slot, rank in ((0, 8), (1, 3), (3, 8))}
    batch = _batch(ROWS, captured)
    _check(slots, adapters, batch, ROWS)
    adapters[0] = _load(slots, 0, 5)
    _check(slots, adapters, batch, ROWS)
    adapters[1] = _load(slots, 1, 16)
    _check(slots, adapters, batch, ROWS)
    slots.clear(3)
    del adapters[3]
    _check(slots, adapters, batch, ROWS)
    for rows in (ROWS[::-1], (1,), (-1, -1), (0,) * 20):
        _start(batch, rows)
        _check(slots, adapters, batch, rows)


def test_only_the_slot_that_changes_is_packed() -> None:
    """Unless the largest rank changes."""
    slots = _empty_slots()
    adapters = {slot: _load(slots, slot, rank) for slot, rank in ((0, 8), (1, 3), (3, 8))}
    batch, (products,) = _batch(ROWS), slots.linear
    _check(slots, adapters, batch, ROWS)
    assert products.num_full_packings == 1
    adapters[1] = _load(slots, 1, 7)
    _check(slots, adapters, batch, ROWS)
    assert products.num_full_packings == 1
    adapters[1] = _load(slots, 1, 9)
    _check(slots, adapters, batch, ROWS)
    assert products.num_full_packings == 2


def test_factors_that_other_code_writes_through_a_view() -> None:
    slots = _empty_slots()
    adapters = {0: _load(slots, 0, 8)}
    batch = _batch(ROWS)
    _check(slots, adapters, batch, ROWS)
    (stack_a, _), (_, stack_b) = slots.stacked_factors()
    stack_a[0, 0, 2] += 1.0
    adapters[0][0][0][2] += 1.0
    stack_b[0, 0, 3] -= 1.0
    adapters[0][1][1][3] -= 1.0
    _check(slots, adapters, batch, ROWS)


def test_a_slot_is_cleared_after_a_write_failed() -> None:
    """Though the write had set the slot's ranks in some of the products only."""
    slots = _empty_slots()
    adapters = {0: _load(slots, 0, 4)}
    batch = _batch(ROWS)
    _check(slots, adapters, batch, ROWS)
    error = MemoryError("no memory for the pack")
    with (
        mock.patch.object(PackedSlots, "_allocate_and_copy", side_effect=error),
        pytest.raises(MemoryError),
    ):
        _load(slots, 1, 16)
    assert not slots.is_empty(1)
    slots.clear(1)
    _check(slots, adapters, batch, ROWS)


def test_more_rows_than_the_buffer_has_are_refused() -> None:
    slots = _empty_slots()
    _load(slots, 0, 4)
    batch = _batch(ROWS)
    x, y = torch.randn(64, K), torch.randn(64, sum(WIDTHS))
    with pytest.raises(ValueError, match="x has 64 rows, expected at most 32"):
        slots.linear[0].add_(y, x, batch)


@pytest.mark.parametrize("change", ["load", "clear"])
def test_a_slot_changes_after_other_code_has_written_another(change: str) -> None:
    """What was written is used, although no forward has run between the two changes."""
    slots = _empty_slots()
    adapters = {0: _load(slots, 0, 8), 1: _load(slots, 1, 4)}
    batch = _batch(ROWS)
    _check(slots, adapters, batch, ROWS)
    (stack_a, _), (_, stack_b) = slots.stacked_factors()
    stack_a[0, 0, 2] += 1.0
    adapters[0][0][0][2] += 1.0
    stack_b[0, 0, 3] -= 1.0
    adapters[0][1][1][3] -= 1.0
    if change == "load":
        adapters[1] = _load(slots, 1, 5)
    else:
        slots.clear(1)
        del adapters[1]
    _check(slots, adapters, batch, ROWS)


@pytest.mark.parametrize(
    ("shape_a", "shape_b"),
    [
        ((4, 1), (8, 4)),
        ((4, K - 1), (8, 4)),
        ((1, K), (8, 4)),
        ((4, K), (8, 3)),
        ((4, K), (1, 4)),
        ((4, K), (9, 4)),
        ((RANK + 1, K), (8, RANK + 1)),
        ((K,), (8, 4)),
    ],
)
def test_factors_that_do_not_fit_are_refused_and_nothing_changes(
    shape_a: tuple[int, ...], shape_b: tuple[int, ...]
) -> None:
    """The error is in the second slice, and the first slice of the slot is not changed either."""
    slots = _empty_slots()
    adapters = {0: _load(slots, 0, 4), 1: _load(slots, 1, 3)}
    batch = _batch(ROWS)
    _check(slots, adapters, batch, ROWS)
    downs, ups = (
        [torch.randn(4, K), torch.randn(shape_a)],
        [torch.randn(12, 4), torch.randn(shape_b)],
    )
    expected = rf"slice 1: .*{re.escape(str(shape_a))}.*expected \[rank, {K}\] and \[8, rank\]"
    with pytest.raises(ValueError, match=expected):
        slots.write(0, downs, ups, [1.0, 1.0])
    _check(slots, adapters, batch, ROWS)


def test_a_batch_without_adapters_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("an update was computed")

    slots = _empty_slots()
    _load(slots, 1, 4)
    (products,) = slots.linear
    monkeypatch.setattr(packed_forward, "add_", fail)
    monkeypatch.setattr(SlotLoraUpdater, "add_from_tables_", fail)
    y = torch.randn(3, sum(WIDTHS))
    before = y.clone()
    for add in (products.add_, slots.add_linear_):
        add(y, torch.randn(3, K), _batch((-1, -1, -1)))
        assert torch.equal(y, before)
        with pytest.raises(AssertionError, match="an update was computed"):
            add(y, torch.randn(3, K), _batch((-1, 1, -1)))
