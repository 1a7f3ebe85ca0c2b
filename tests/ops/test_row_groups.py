"""`build_row_groups`: against groups made in Python, refilled in place, bad ids, no host sync."""

from __future__ import annotations

import random

import pytest
import torch

from fastlora.ops.row_groups import INVALID_SLOT, NO_SLOT, build_row_groups


def expected_groups(ids: list[int], slots: int) -> tuple[list[int], list[int], list[int]]:
    """Order, segment of each position, slot of each segment, by sorting in Python."""
    slot_of = [slot if NO_SLOT <= slot < slots else INVALID_SLOT for slot in ids]
    order = sorted(range(len(ids)), key=lambda row: slot_of[row])
    present = sorted(set(slot_of))
    return order, [present.index(slot_of[row]) for row in order], present


def expected_pieces(segment_of: list[int], block_m: int) -> list[int]:
    """Positions where a segment or a tile starts."""
    return [
        position
        for position, segment in enumerate(segment_of)
        if position % block_m == 0 or segment != segment_of[position - 1]
    ]


def check(groups: object, ids: list[int], slots: int, blocks: tuple[int, ...]) -> None:
    """Compares every buffer with the groups made in Python, padding included."""
    order, segment_of, present = expected_groups(ids, slots)
    m = len(ids)
    assert groups.order.tolist() == order
    assert groups.segment_of.tolist() == segment_of
    padding = min(m, slots + 2) - len(present)
    assert groups.segment_slot.tolist() == present + [NO_SLOT] * padding
    for block_m in blocks:
        starts = expected_pieces(segment_of, block_m)
        entries = -(-m // block_m) + min(m, slots + 2) + 1
        assert len(starts) < entries
        assert groups.pieces(block_m).tolist() == starts + [m] * (entries - len(starts))


@pytest.mark.parametrize(("m", "slots"), [(1, 0), (1, 5), (16, 1), (17, 3), (40, 64), (130, 7)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
def test_groups(m: int, slots: int, dtype: torch.dtype) -> None:
    chance = random.Random(m + slots)
    for low, high in ((-1, slots - 1), (-4, slots + 3), (0, 0), (slots - 1, slots - 1)):
        ids = [chance.randint(low, high) for _ in range(m)]
        groups = build_row_groups(torch.tensor(ids, dtype=dtype), m, slots)
        check(groups, ids, slots, (1, 16, 32))
        assert groups.order.dtype == groups.segment_of.dtype == torch.int32
        assert groups.invalid.tolist() == [any(not -1 <= slot < slots for slot in ids)]


def test_an_id_covers_rows_in_sequence() -> None:
    groups = build_row_groups(torch.tensor([2, -1, 0]), 12, 3)
    check(groups, [2] * 4 + [-1] * 4 + [0] * 4, 3, (16,))


def test_no_rows() -> None:
    groups = build_row_groups(torch.tensor([], dtype=torch.int64), 0, 4)
    assert groups.order.shape == groups.segment_slot.shape == (0,)
    assert groups.pieces(16).tolist() == [0]
    assert groups.invalid.tolist() == [False]


def test_update_writes_the_same_buffers() -> None:
    m, slots = 24, 4
    chance = random.Random(0)
    groups = build_row_groups(torch.full((m,), -1), m, slots)
    buffers = [groups.order, groups.segment_of, groups.segment_slot, groups.pieces(16)]
    addresses = [buffer.data_ptr() for buffer in buffers]
    for _ in range(5):
        ids = [chance.randint(-1, slots - 1) for _ in range(m)]
        groups.update_(torch.tensor(ids))
        check(groups, ids, slots, (16, 32))
    again = [groups.order, groups.segment_of, groups.segment_slot, groups.pieces(16)]
    assert [buffer.data_ptr() for buffer in again] == addresses


def test_the_flag_of_an_update_stays() -> None:
    groups = build_row_groups(torch.zeros(6, dtype=torch.int64), 6, 2)
    assert not groups.invalid
    groups.update_(torch.tensor([0, 2]))
    groups.update_(torch.tensor([0, 1]))
    assert groups.invalid
    groups.invalid.zero_()
    groups.update_(torch.tensor([0, 1]))
    assert not groups.invalid


def test_sizes_do_not_depend_on_the_ids() -> None:
    shapes = {
        tuple(tuple(t.shape) for t in (g.order, g.segment_of, g.segment_slot, g.pieces(16)))
        for low, high in ((-1, -1), (0, 0), (-1, 63), (-9, 90))
        for g in [build_row_groups(torch.randint(low, high + 1, (48,)), 48, 64)]
    }
    assert len(shapes) == 1


def test_no_value_is_read_on_the_host() -> None:
    """On the meta device there are no values: whatever needed one would raise."""
    ids = torch.empty(8, dtype=torch.int64, device="meta")
    groups = build_row_groups(ids, 32, 5)
    groups.pieces(16)
    groups.update_(ids)
    assert groups.order.shape == (32,)


def test_bad_ids_are_named() -> None:
    for ids, m, error, message in (
        (torch.zeros(4), 4, TypeError, "torch.float32, expected integers"),
        (torch.zeros(4, dtype=torch.bool), 4, TypeError, "torch.bool"),
        (torch.zeros(3, dtype=torch.int64), 4, ValueError, r"\(3,\), expected \[B\] with B divid"),
        (torch.zeros(2, 2, dtype=torch.int64), 4, ValueError, r"\(2, 2\)"),
        (torch.zeros(0, dtype=torch.int64), 4, ValueError, r"\(0,\)"),
    ):
        with pytest.raises(error, match=message):
            build_row_groups(ids, m, 2)
    with pytest.raises(ValueError, match="slots is -1"):
        build_row_groups(torch.zeros(1, dtype=torch.int64), 1, -1)


def test_a_refused_update_changes_nothing() -> None:
    groups = build_row_groups(torch.tensor([1, 0, -1]), 3, 2)
    with pytest.raises(ValueError, match="expected"):
        groups.update_(torch.tensor([0, 1]))
    check(groups, [1, 0, -1], 2, (16,))
