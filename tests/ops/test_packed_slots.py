"""Packed factors of slots whose adapters change one by one, against a loop over adapters."""

from __future__ import annotations

import random
from types import NoneType
from unittest import mock

import pytest
import torch

from fastlora.ops.factors import Factors
from fastlora.ops.rows import Rows, sort_rows
from fastlora.ops.torch import (
    packed,
    packed_choice,
    packed_forward,
    packed_plans,
    packed_slots,
    products,
)
from fastlora.ops.torch.packed_plans import (
    DensePlan,
    PaddedRowBlocksPlan,
    PerAdapterPlan,
    PerSamplePlan,
    Plan,
    RowUpdateTerms,
)
from fastlora.ops.torch.packed_slots import PackedSlots
from fastlora.testing import assert_within_budget

K = 48
Adapter = list[Factors | None]


def random_adapter(ranks: list[int], widths: list[int], dtype: torch.dtype) -> Adapter:
    """Factors for each slice, of rank 0 for a slice that is not adapted."""
    return [
        Factors(torch.randn(r, K).to(dtype) / 7, torch.randn(n, r).to(dtype) / 7, 0.5 + r / 8)
        if r
        else None
        for r, n in zip(ranks, widths, strict=True)
    ]


def by_row(
    y: torch.Tensor, x: torch.Tensor, ids: list[int], adapters: list[Adapter], widths: list[int]
) -> torch.Tensor:
    """y plus each row's update, one adapter at a time."""
    y, ends = y.clone(), torch.tensor(widths).cumsum(0).tolist()
    for slot, adapter in enumerate(adapters):
        of_slot = torch.tensor(ids) == slot
        for own, n, end in zip(adapter, widths, ends, strict=True):
            if own is not None:
                s = own.scaling * (x[of_slot] @ own.lora_a.to(x.dtype).t())
                y[of_slot, end - n : end] += s @ own.lora_b.to(x.dtype).t()
    return y


def add(
    pack: PackedSlots, y: torch.Tensor, x: torch.Tensor, rows: Rows
) -> tuple[torch.Tensor, Plan | None]:
    """The result of adding the updates to a copy of y, and the plan."""
    if pack.factors is None:
        return y, None
    # y is in the middle of a larger tensor, as the outputs of one slice of a layer are.
    whole = torch.full((y.shape[0], y.shape[1] + 8), 7.0, dtype=y.dtype)
    part = whole[:, 4:-4]
    part.copy_(y)
    plan = packed_plans.cached_plan(rows, rows.slot_index, pack.factors, {})
    assert packed_forward.add_(part, x, rows.slot_index, pack.factors, plan) is part
    assert (whole[:, :4] == 7).all() and (whole[:, -4:] == 7).all()
    contiguous = y.clone()
    packed_forward.add_(contiguous, x, rows.slot_index, pack.factors, plan)
    torch.testing.assert_close(contiguous, part, equal_nan=True)
    return contiguous, plan


MIXES = {
    # slots, slices, ranks of a slot, samples, tokens of each, dtype, plans that must occur
    "decode": (4, 3, (8,), 16, 1, torch.float32, {DensePlan, RowUpdateTerms}),
    "decode of large ranks": (
        4,
        3,
        (64,),
        16,
        1,
        torch.float32,
        {PaddedRowBlocksPlan, PerAdapterPlan},
    ),
    "more rows": (4, 3, (8,), 40, 1, torch.float32, {PaddedRowBlocksPlan, NoneType}),
    "decode of mixed ranks": (6, 2, (3, 64, 8), 20, 1, torch.float32, {PerAdapterPlan}),
    "many slots": (16, 1, (8,), 64, 1, torch.float32, {RowUpdateTerms, PerAdapterPlan}),
    "many slots, bf16": (16, 3, (16,), 64, 1, torch.bfloat16, {PaddedRowBlocksPlan}),
    "one row": (5, 4, (16,), 1, 1, torch.float32, {DensePlan, PerAdapterPlan}),
    "prefill": (4, 3, (16, 16, 4), 6, 70, torch.float32, {PerSamplePlan, PerAdapterPlan}),
    "prefill, bf16": (4, 3, (16, 16, 12), 6, 70, torch.bfloat16, {PerSamplePlan, PerAdapterPlan}),
    "many tokens": (4, 2, (24,), 500, 1, torch.float32, {PaddedRowBlocksPlan}),
}


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize("case", MIXES)
def test_slots_change_one_by_one(case: str) -> None:
    """Every mix gets its adapters' updates, while adapters are loaded, evicted, and replaced."""
    count, slices, ranks, samples, tokens, dtype, expected = MIXES[case]
    chance, widths = random.Random(case), [40, 8, 24, 16][:slices]
    torch.manual_seed(len(case))
    pack, adapters = PackedSlots(count, K, widths, dtype), [[None] * slices for _ in range(count)]
    plans, largest, packs = set(), 0, 0
    with mock.patch.multiple(packed_choice, _MATRIX_UNIT=frozenset(), _HAS_FAST_SUMS=True):
        for step in range(20):
            slot = step if step < count else chance.randrange(count)
            if step >= count and chance.random() < 0.3:
                adapters[slot] = [None] * slices
                pack.clear_slot(slot)
            else:
                rank = chance.choice(ranks)
                own = [chance.choice([rank, rank, 0]) for _ in widths]
                adapters[slot] = random_adapter(own, widths, torch.float32)
                pack.set_slot(slot, adapters[slot])
            present = [f.lora_a.shape[0] for a in adapters for f in a if f is not None]
            packs += max(present, default=0) not in (0, largest)
            largest = max(present, default=0)
            assert pack.num_full_packings == packs
            ids = [chance.randint(-1, count - 1) for _ in range(samples)]
            if step % 4 == 3:  # one adapter and rows without an adapter
                ids = [-1 if slot < 0 else ids[0] for slot in ids]
            rows = sort_rows(torch.tensor(ids), samples * tokens, count)
            spread = [slot for slot in ids for _ in range(tokens)]
            x = torch.randn(samples * tokens, K).to(dtype)
            y = torch.randn(samples * tokens, sum(widths)).to(dtype)
            made, plan = add(pack, y, x, rows)
            plans.add(type(plan))
            if isinstance(plan, PaddedRowBlocksPlan):
                plans.add(type(plan.terms))
            base = torch.tensor([slot < 0 for slot in spread])
            assert torch.equal(made[base], y[base])
            assert_within_budget(
                made,
                by_row(y, x, spread, adapters, widths),
                by_row(y.double(), x.double(), spread, adapters, widths),
            )
    assert expected <= plans


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [8, 64])
def test_nan_stays_in_the_rows_of_its_adapter(rank: int, dtype: torch.dtype) -> None:
    """Also where the rank rows of several adapters are in one product, and until it is replaced."""
    widths = [40, 24]
    adapters = [random_adapter([rank, rank], widths, dtype) for _ in range(4)]
    pack = PackedSlots(4, K, widths, dtype)
    for slot, own in enumerate(adapters):
        pack.set_slot(slot, own)
    rows = sort_rows(torch.arange(-1, 4), 5, 4)
    x, y = torch.randn(5, K, dtype=dtype), torch.randn(5, 64, dtype=dtype)
    finite, plan = add(pack, y, x, rows)
    assert not isinstance(plan, PerAdapterPlan)
    ids, others = [-1, 0, 1, 2, 3], torch.tensor([0, 1, 2, 4])
    plain = by_row(y, x, ids, adapters, widths)
    truth = by_row(y.double(), x.double(), ids, adapters, widths)
    for side in ("lora_a", "lora_b"):
        broken = adapters[2][1]._replace(**{side: getattr(adapters[2][1], side).clone()})
        getattr(broken, side)[3, 3] = float("nan")
        pack.set_slot(2, [adapters[2][0], broken])
        made, _ = add(pack, y, x, rows)
        assert made[3, 40:].isnan().any() and made[3, :40].isfinite().all()
        assert_within_budget(made[others], plain[others], truth[others])
    pack.set_slot(2, adapters[2])
    assert torch.equal(add(pack, y, x, rows)[0], finite)


def test_only_the_units_of_the_batch_are_multiplied() -> None:
    """One adapter in 16 slots costs what one in one slot does, wherever it is."""
    adapter = random_adapter([64], [40], torch.float32)
    packs = [PackedSlots(slots, K, [40], torch.float32) for slots in (1, 16)]
    for pack, slots in zip(packs, ((0,), range(16)), strict=True):
        for slot in slots:
            pack.set_slot(slot, adapter)
    x, y, ids = torch.randn(16, K), torch.randn(16, 40), torch.randint(0, 2, (16,))
    shapes = []
    for pack, slots, slot in zip(packs, (1, 16), (0, 11), strict=True):
        rows = sort_rows(torch.where(ids == 0, slot, -1), 16, slots)
        assert pack.factors is not None
        plan = packed_plans.cached_plan(rows, rows.slot_index, pack.factors, {})
        with (
            mock.patch.object(packed_forward.products, "mm", wraps=products.mm) as shrink,
            mock.patch.object(packed_forward.products, "addmm_", wraps=products.addmm_) as expand,
        ):
            packed_forward.add_(y.clone(), x, rows.slot_index, pack.factors, plan)
        (a, b), (_, s, c) = shrink.call_args.args, expand.call_args.args
        assert shrink.call_count == expand.call_count == 1
        shapes.append([tuple(t.shape) for t in (a, b, s, c)])
    assert shapes[0] == shapes[1] == [(16, K), (K, 64), (16, 64), (64, 40)]


def test_slices_share_the_shrink() -> None:
    """The products for three slices: one shrink, and one expand for each that is adapted."""
    widths = [40, 8, 24]
    for rank, ids in ((8, range(-1, 4)), (64, range(-1, 4)), (64, [2] * 5)):
        pack = PackedSlots(4, K, widths, torch.float32)
        for slot in range(4):
            pack.set_slot(slot, random_adapter([rank, 0, rank], widths, torch.float32))
        rows = sort_rows(torch.tensor(list(ids)), 5, 4)
        assert pack.factors is not None
        plan = packed_plans.cached_plan(rows, rows.slot_index, pack.factors, {})
        names = ("mm", "bmm", "addmm_")
        counted = {name: mock.Mock(wraps=getattr(packed_forward.products, name)) for name in names}
        with (
            mock.patch.multiple(packed_forward.products, **counted),
            mock.patch.object(torch, "embedding_bag", wraps=torch.embedding_bag) as sums,
        ):
            packed_forward.add_(
                torch.randn(5, 72), torch.randn(5, K), rows.slot_index, pack.factors, plan
            )
            calls = [each.call_count for each in (*counted.values(), sums)]
        assert sum(calls) == 3, (rank, calls)


def test_a_layer_of_several_slices_with_an_equal_number_of_rows_for_each_adapter() -> None:
    """The blocks of the plan are full, and the base product is of all slices."""
    torch.manual_seed(3)
    widths, slots, rank = [40, 24], 16, 64
    adapters = [random_adapter([rank, rank], widths, torch.float32) for _ in range(slots)]
    pack = PackedSlots(slots, K, widths, torch.float32)
    for slot, own in enumerate(adapters):
        pack.set_slot(slot, own)
    ids = torch.arange(slots).repeat(16)
    rows = sort_rows(ids, len(ids), slots)
    assert pack.factors is not None
    with mock.patch.object(packed_choice, "_MATRIX_UNIT", frozenset()):
        plan = packed_plans.cached_plan(rows, rows.slot_index, pack.factors, {})
    assert isinstance(plan, PaddedRowBlocksPlan) and plan.exact
    x, weight, bias = torch.randn(len(ids), K), torch.randn(64, K), torch.randn(64)
    made = packed_forward.linear(x, weight, bias, rows.slot_index, pack.factors, plan)
    base = torch.nn.functional.linear(x, weight, bias)
    truth = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert_within_budget(
        made,
        by_row(base, x, ids.tolist(), adapters, widths),
        by_row(truth, x.double(), ids.tolist(), adapters, widths),
    )


@pytest.mark.parametrize("ranks", [(4, 8), (8, 4)], ids=["same storage", "larger storage"])
def test_an_adapter_that_cannot_be_copied(ranks: tuple[int, int]) -> None:
    """It is in no slot afterwards, and the other slots keep their adapters."""
    torch.manual_seed(4)
    widths, (rank, other) = [40, 24], ranks
    pack, none = PackedSlots(2, K, widths, torch.float32), [None, None]
    adapters = [random_adapter([4, 4], widths, torch.float32), none]
    adapters[1] = random_adapter([other, other], widths, torch.float32)
    for slot, own in enumerate(adapters):
        pack.set_slot(slot, own)
    given, copied = random_adapter([rank, rank], widths, torch.float32), []

    def copy_one(factors: Factors, dtype: torch.dtype) -> torch.Tensor:
        if copied:
            raise torch.OutOfMemoryError("planted")
        copied.append(factors)
        return packed.unrounded_scaled_lora_b_rank_rows(factors, dtype)

    with (
        mock.patch.object(packed_slots, "unrounded_scaled_lora_b_rank_rows", copy_one),
        pytest.raises(torch.OutOfMemoryError, match="planted"),
    ):
        pack.set_slot(0, given)
    rows, x, y = sort_rows(torch.tensor([0, 1, -1]), 3, 2), torch.randn(3, K), torch.randn(3, 64)
    # New storage leaves the adapter that was in the slot. Otherwise, a part of it is overwritten.
    expected = [adapters[0] if rank > other else none, adapters[1]]
    wanted = by_row(y, x, [0, 1, -1], expected, widths)
    torch.testing.assert_close(add(pack, y, x, rows)[0], wanted)
    pack.set_slot(0, given)
    wanted = by_row(y, x, [0, 1, -1], [given, adapters[1]], widths)
    torch.testing.assert_close(add(pack, y, x, rows)[0], wanted)


def test_factors_that_do_not_fit_are_named() -> None:
    pack, (own,) = PackedSlots(2, K, [40], torch.float32), random_adapter([4], [40], torch.float32)
    assert own is not None
    with pytest.raises(ValueError, match="factors for 2 slices, expected 1"):
        pack.set_slot(0, [own, own])
    for wrong in (own._replace(lora_a=own.lora_a[:, 1:]), own._replace(lora_b=own.lora_b[1:])):
        with pytest.raises(ValueError, match=r"expected \(R, 48\) and \(40, R\)"):
            pack.set_slot(0, [wrong])
    for field in ({"lora_bias": torch.zeros(40)}, {"dropout_p": 0.1}):
        with pytest.raises(ValueError, match="lora_bias, dropout, or a magnitude"):
            pack.set_slot(0, [own._replace(**field)])
    assert pack.factors is None and pack.num_full_packings == 0


def test_slots_change_inside_and_outside_of_inference_mode() -> None:
    """An engine loads adapters in a step, and between steps."""
    pack = PackedSlots(2, K, [40], torch.float32)
    adapters = [random_adapter([rank], [40], torch.float32) for rank in (8, 16, 4)]
    with torch.inference_mode():
        pack.set_slot(0, adapters[0])
    pack.set_slot(1, adapters[2])
    with torch.inference_mode():
        pack.set_slot(1, adapters[1])
    pack.set_slot(0, adapters[2])
    assert pack.num_full_packings == 2
    x, y, ids = torch.randn(5, K), torch.randn(5, 40), [0, 1, -1, 1, 0]
    rows = sort_rows(torch.tensor(ids), 5, 2)
    expected = by_row(y, x, ids, [adapters[2], adapters[1]], [40])
    torch.testing.assert_close(add(pack, y, x, rows)[0], expected)
