"""`mixed_rows_sort`: one launch writes, entry for entry, what many operations make."""

from __future__ import annotations

import random

import pytest
import torch

from fastlora.ops.rows import Rows, piece_starts_length, sort_rows

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.kernels.mixed_rows_sort import MAX_IDS, can_sort
from fastlora.ops import execution_mode
from fastlora.ops.triton.sorting import sort_rows_into
from tests.support.kernels.lab import Lab


def sizes(m: int, slots: int, block_m: int) -> tuple[int, ...]:
    entries = piece_starts_length(m, slots, block_m) if block_m else 0
    return m, m, min(m, slots + 2), slots + 1, 1, entries


def check(lab: Lab, ids: torch.Tensor, m: int, slots: int, block_m: int) -> None:
    """Compares every entry with rows that PyTorch sorted on a CPU; none is left unwritten."""
    empty = [torch.full((size,), -99, dtype=torch.int32) for size in sizes(m, slots, block_m)]
    empty[4] = torch.full((1,), True)
    made = sort_rows_into(
        ids.to(lab.device), slots, tuple(t.to(lab.device) for t in empty), block_m
    )
    assert made is not None
    rows: Rows = sort_rows(ids, m, slots, torch.device("cpu"))
    expected = [*rows.operator_arguments(), rows.invalid]
    expected.append(rows.piece_starts(block_m) if block_m else empty[5])
    for found, wanted in zip(made, expected, strict=True):
        assert torch.equal(found.cpu(), wanted), (found, wanted)


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize(
    ("count", "each", "slots"),
    [(1, 1, 0), (1, 1, 5), (17, 3, 3), (40, 1, 64), (130, 1, 7), (5, 300, 3), (3, 700, 1100)],
)
def test_every_entry(lab: Lab, count: int, each: int, slots: int) -> None:
    """Few and many rows of an id, slots past a step, all rows of one slot, none of any."""
    chance = random.Random(count + slots)
    last = slots - 1
    for block_m, low, high in ((0, -1, last), (16, -4, last + 4), (64, -1, -1), (16, last, last)):
        dtype = chance.choice([torch.int64, torch.int32, torch.int16])
        ids = torch.tensor([chance.randint(low, high) for _ in range(count)], dtype=dtype)
        check(lab, ids, count * each, slots, block_m)


def test_as_many_ids_as_there_may_be(lab: Lab) -> None:
    ids = torch.randint(-2, 10, (MAX_IDS,), generator=torch.Generator().manual_seed(0))
    check(lab, ids, MAX_IDS, 9, 128)


def test_ids_with_a_stride(lab: Lab) -> None:
    ids = torch.tensor([[2, 9], [-1, 9], [0, 9], [2, 9]])[:, 0]
    check(lab, ids, 8, 3, 16)


def test_more_ids_are_left_to_pytorch() -> None:
    assert can_sort(MAX_IDS, 4096) and not can_sort(MAX_IDS + 1, 1)
    assert not can_sort(0, 1) and not can_sort(4, 2**21)


def test_rows_come_with_their_pieces(monkeypatch: pytest.MonkeyPatch, lab: Lab) -> None:
    """Where kernels run, one launch sorts rows and makes the pieces that decode asks for."""
    if lab.device.type == "cpu":
        monkeypatch.setattr(execution_mode, "KERNEL_DEVICES", ("cpu",))
    ids = torch.tensor([3, -1, 0, 3, 7, 0], device=lab.device)
    with torch.profiler.profile() as profile:
        rows = sort_rows(ids, 24, 4)
        pieces = rows.piece_starts(16)
    launched = {event.key for event in profile.key_averages()}
    assert not launched & {"aten::sort", "aten::cumsum", "aten::searchsorted", "aten::scatter_"}
    monkeypatch.setattr(execution_mode, "KERNEL_DEVICES", ())
    plain = sort_rows(ids.cpu(), 24, 4)
    assert torch.equal(pieces.cpu(), plain.piece_starts(16))
    assert [t.tolist() for t in rows.operator_arguments()] == [
        t.tolist() for t in plain.operator_arguments()
    ]
