"""`sort_rows`: against rows sorted in Python, what the host sees, bad ids, no host sync."""

from __future__ import annotations

import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlora.ops.rows import INVALID_SLOT, NO_SLOT, rows_from_tensors, sort_rows


def expected_groups(ids: list[int], slots: int) -> tuple[list[int], list[int], list[int]]:
    """Order, segment of each position, slot of each segment, by sorting in Python."""
    slot_of = [slot if NO_SLOT <= slot < slots else INVALID_SLOT for slot in ids]
    last = {INVALID_SLOT: slots, NO_SLOT: slots + 1}
    order = sorted(range(len(ids)), key=lambda row: last.get(slot_of[row], slot_of[row]))
    present = sorted(set(slot_of), key=lambda slot: last.get(slot, slot))
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
        assert groups.piece_starts(block_m).tolist() == starts + [m] * (entries - len(starts))


@pytest.mark.parametrize(("m", "slots"), [(1, 0), (1, 5), (16, 1), (17, 3), (40, 64), (130, 7)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
def test_groups(m: int, slots: int, dtype: torch.dtype) -> None:
    chance = random.Random(m + slots)
    for low, high in ((-1, slots - 1), (-4, slots + 3), (0, 0), (slots - 1, slots - 1)):
        ids = [chance.randint(low, high) for _ in range(m)]
        groups = sort_rows(torch.tensor(ids, dtype=dtype), m, slots)
        check(groups, ids, slots, (1, 16, 32))
        assert groups.order.dtype == groups.segment_of.dtype == torch.int32
        assert groups.invalid.tolist() == [any(not -1 <= slot < slots for slot in ids)]


def test_an_id_covers_rows_in_sequence() -> None:
    groups = sort_rows(torch.tensor([2, -1, 0]), 12, 3)
    check(groups, [2] * 4 + [-1] * 4 + [0] * 4, 3, (16,))


def test_no_rows() -> None:
    groups = sort_rows(torch.tensor([], dtype=torch.int64), 0, 4)
    assert groups.order.shape == groups.segment_slot.shape == (0,)
    assert groups.piece_starts(16).tolist() == [0]
    assert groups.invalid.tolist() == [False]


def test_what_the_host_sees_is_what_the_device_has() -> None:
    """Segments, the inverse order and members, from ids and from an operator's tensors alike."""
    chance = random.Random(1)
    for m, slots, each in ((12, 3, 1), (12, 5, 4), (1, 1, 1), (40, 9, 2)):
        ids = [chance.randint(-1, slots - 1) for _ in range(m // each)]
        spread = [slot for slot in ids for _ in range(each)]
        rows = sort_rows(torch.tensor(ids), m, slots)
        order, _, _ = expected_groups(spread, slots)
        expected = [
            (slot, order.index(own[0]), order.index(own[0]) + len(own))
            for slot in range(slots)
            if (own := [row for row in range(m) if spread[row] == slot])
        ]
        for found in (rows, rows_from_tensors(rows.operator_arguments())):
            assert list(found.segments) == expected
            assert found.is_sorted == (order == sorted(order))
            assert found.inverse_order[found.order.long()].tolist() == list(range(m))
            present = [segment.slot for segment in found.segments]
            members = [present.index(s) if s in present else len(present) for s in spread]
            assert found.segment_index.tolist() == members
            for (slot, start, stop), own in zip(found.segments, found.segment_rows, strict=True):
                expected_rows = [row for row in range(m) if spread[row] == slot]
                assert torch.arange(m)[own].tolist() == expected_rows == order[start:stop]
                adjacent = expected_rows[-1] - expected_rows[0] == len(expected_rows) - 1
                assert isinstance(own, slice) == adjacent
            x = torch.arange(m)
            assert torch.equal(found.restored(found.sorted(x)), x)
            assert found.sorted(x).tolist() == order
            assert (found.slots, found.m) == (slots, m)
        assert rows.each == each


@pytest.mark.parametrize("largest", [2048, 8192])
def test_one_sort_serves_every_padded_size(largest: int) -> None:
    """A prefix is the batch without the padding: rows, slots, pieces, and invalid ids."""
    chance, slots = random.Random(largest), 5
    whole = torch.full((largest,), NO_SLOT)
    for m in (1, 16, 128, 512, 2048, 8192):
        if m > largest:
            continue
        whole[:] = NO_SLOT
        whole[: m - m // 4] = torch.tensor(
            [chance.randint(-2, slots) for _ in range(m - m // 4)], dtype=torch.int64
        )
        rows = sort_rows(whole, largest, slots)
        blocks = (16, 64, 128)
        starts = {block_m: rows.piece_starts(block_m) for block_m in blocks}
        first, alone = rows.first_rows(m), sort_rows(whole[:m], m, slots)
        assert (first.m, first.slots, first.each) == (m, slots, 1)
        assert torch.equal(first.order, alone.order)
        assert torch.equal(first.segment_of, alone.segment_of)
        assert torch.equal(first.segment_slot, alone.segment_slot)
        assert torch.equal(first.slot_start, alone.slot_start)
        assert torch.equal(first.invalid, alone.invalid)
        assert first.segments == alone.segments
        assert first.has_rows_without_slot == alone.has_rows_without_slot
        for block_m in blocks:
            own = first.piece_starts(block_m)
            assert own.data_ptr() == starts[block_m].data_ptr()
            assert torch.equal(own.clamp(max=m), alone.piece_starts(block_m))
        for view, tensor in zip(first.operator_arguments(), rows.operator_arguments(), strict=True):
            assert view.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize(
    ("ids", "expected"), [([0, 1, 1, 0], False), ([0, 1, 1, -1], True), ([2, 2, 2, 2], False)]
)
def test_rows_without_a_slot(ids: list[int], expected: bool) -> None:
    assert sort_rows(torch.tensor(ids), len(ids), 3).has_rows_without_slot is expected


def test_rows_of_segments() -> None:
    """Adjacent rows are a slice, and others are listed in ascending order."""
    blocks = [(2, 300), (0, 500), (-1, 200)]
    rows = sort_rows(torch.tensor([slot for slot, n in blocks for _ in range(n)]), 2000, 3)
    assert [segment.slot for segment in rows.segments] == [0, 2]
    assert rows.segment_rows == (slice(600, 1600), slice(0, 600))
    mixed = torch.randint(0, 3, (1000,), generator=torch.Generator().manual_seed(0))
    rows = sort_rows(mixed, 1000, 3)
    for slot, found in enumerate(rows.segment_rows):
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found.long(), (mixed == slot).nonzero().view(-1))


def test_sizes_do_not_depend_on_the_ids() -> None:
    shapes = {
        tuple(tuple(t.shape) for t in (g.order, g.segment_of, g.segment_slot, g.piece_starts(16)))
        for low, high in ((-1, -1), (0, 0), (-1, 63), (-9, 90))
        for g in [sort_rows(torch.randint(low, high + 1, (48,)), 48, 64)]
    }
    assert len(shapes) == 1


def test_no_value_is_read_on_the_host() -> None:
    """On the meta device there are no values: whatever needed one would raise."""
    ids = torch.empty(8, dtype=torch.int64, device="meta")
    groups = sort_rows(ids, 32, 5)
    real = sort_rows(torch.zeros(8, dtype=torch.int64), 32, 5)
    for found, expected in zip(groups.operator_arguments(), real.operator_arguments(), strict=True):
        assert found.shape == expected.shape and found.dtype == expected.dtype
    assert groups.piece_starts(16).shape == real.piece_starts(16).shape
    assert groups.invalid.shape == real.invalid.shape


def test_compilers_know_all_sizes() -> None:
    real = sort_rows(torch.zeros(8, dtype=torch.int64), 32, 5)
    with FakeTensorMode():
        fake = sort_rows(torch.zeros(8, dtype=torch.int64), 32, 5)
        pieces = fake.piece_starts(16)
    for found, expected in zip(fake.operator_arguments(), real.operator_arguments(), strict=True):
        assert found.shape == expected.shape and found.dtype == expected.dtype
    assert fake.invalid.shape == real.invalid.shape and fake.invalid.dtype == torch.bool
    assert pieces.shape == real.piece_starts(16).shape


def test_pieces_are_made_when_they_are_asked_for_and_cached() -> None:
    ids = torch.tensor([1, 0, 1])
    rows = sort_rows(ids, 12, 2)
    assert not rows._pieces
    first = rows.piece_starts(4)
    assert rows.piece_starts(4) is first
    assert not torch.equal(rows.piece_starts(2), first)
    in_a_graph = sort_rows(ids, 12, 2, cache_pieces=False)
    assert in_a_graph.piece_starts(4) is not in_a_graph.piece_starts(4)
    assert torch.equal(in_a_graph.piece_starts(4), first)


def test_pieces_are_made_with_rows_where_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch makes both if there are more ids than a kernel sorts."""
    pytest.importorskip("triton", reason="triton is not installed")
    from fastlora.kernels.configs import piece_rows
    from fastlora.kernels.mixed_rows_sort import MAX_IDS

    m = MAX_IDS + 1
    ids, block_m = torch.arange(m) % 3, piece_rows(m)
    plain = sort_rows(ids, m, 3)
    monkeypatch.setattr("fastlora.ops.rows.auto_selects_kernels", lambda device: True)
    rows = sort_rows(ids, m, 3)
    assert rows._pieces is not None and list(rows._pieces) == [block_m]
    assert rows.piece_starts(block_m) is rows._pieces[block_m]
    assert torch.equal(rows.piece_starts(block_m), plain.piece_starts(block_m))
    assert torch.equal(rows.order, plain.order)


def test_rows_are_told_apart_by_identity() -> None:
    """Plans are kept by rows, whose tensors say nothing as a key."""
    ids = torch.tensor([1, 0, 1])
    rows, others = sort_rows(ids, 3, 2), sort_rows(ids, 3, 2)
    assert rows != others and {rows: 1, others: 2}[rows] == 1


def test_bad_ids_are_named() -> None:
    for ids, m, error, message in (
        (torch.zeros(4), 4, TypeError, "must have an integer dtype, got torch.float32"),
        (torch.zeros(4, dtype=torch.bool), 4, TypeError, "torch.bool"),
        (torch.zeros(3, dtype=torch.int64), 4, ValueError, r"\(3,\); expected \[B\], where B div"),
        (torch.zeros(2, 2, dtype=torch.int64), 4, ValueError, r"\(2, 2\)"),
        (torch.zeros(0, dtype=torch.int64), 4, ValueError, r"\(0,\)"),
    ):
        with pytest.raises(error, match=message):
            sort_rows(ids, m, 2)
    with pytest.raises(ValueError, match="the number of slots must be non-negative, got -1"):
        sort_rows(torch.zeros(1, dtype=torch.int64), 1, -1)
