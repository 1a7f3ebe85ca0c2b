"""What operators make of the rows of a batch: the kind of each result, in a batch of two ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from fastlora.routing.row_facts import ROWS, RowFactsTable, RowOriginFacts, RowOriginKind
from fastlora.routing.row_rules import result_row_facts_if_changed
from fastlora.routing.row_tracking import RowOriginTracker

aten = torch.ops.aten
D = 8
TABLE = torch.linspace(-1, 1, 4 * D).view(4, D)
NUMBERS = torch.tensor([[3, 1, 0, 2], [1, 2, 3, 0]])
EXCHANGED, MIXED = torch.tensor([1, 0]), torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
BACK = MIXED.argsort()

# From the rows [2, 4, D] of a batch, and the numbers [2, 4] that came with it.
Make = Callable[[torch.Tensor, torch.Tensor], Any]
KINDS: dict[str, tuple[Make, RowOriginKind]] = {
    # Tensors that are made from no rows.
    "counted": (lambda x, n: torch.arange(4), RowOriginKind.COUNTED),
    "a copy of a counted index": (lambda x, n: torch.arange(4).clone(), RowOriginKind.COUNTED),
    "twice a counted index": (lambda x, n: torch.arange(4) * 2, RowOriginKind.CONSTANT),
    "constants": (lambda x, n: torch.ones(4) + torch.zeros(4), RowOriginKind.CONSTANT),
    "a table and constants": (lambda x, n: TABLE + torch.ones(D), RowOriginKind.TABLE),
    "rows and a table": (lambda x, n: x + TABLE, RowOriginKind.ROWS),
    "numbers from a table": (lambda x, n: TABLE[torch.arange(2)], RowOriginKind.TABLE),
    "numbers from constants": (lambda x, n: torch.ones(4)[torch.arange(2)], RowOriginKind.CONSTANT),
    "a product of constants and a table": (
        lambda x, n: torch.ones(3, 4) @ TABLE,
        RowOriginKind.TABLE,
    ),
    # Rows that an index picks.
    "exchanged": (lambda x, n: x[EXCHANGED], RowOriginKind.CHOSEN),
    "exchanged twice": (lambda x, n: x[EXCHANGED][EXCHANGED], RowOriginKind.EVEN),
    "exchanged twice, plus a table": (
        lambda x, n: x[EXCHANGED][EXCHANGED] + TABLE,
        RowOriginKind.EVEN,
    ),
    "mixed, in another dtype, and back": (
        lambda x, n: x.view(8, D)[MIXED].double()[BACK],
        RowOriginKind.EVEN,
    ),
    "mixed, through a product, and back": (
        lambda x, n: functional.linear(x.view(8, D)[MIXED], TABLE)[BACK],
        RowOriginKind.EVEN,
    ),
    "mixed, through a function, and back": (
        lambda x, n: x.view(8, D)[MIXED].tanh()[BACK],
        RowOriginKind.EVEN,
    ),
    "sorted and back": (
        lambda x, n: x.view(8, D)[(at := n.flatten().argsort(stable=True))][at.argsort()],
        RowOriginKind.ROWS,
    ),
    "mixed, and back by a copy of the index": (
        lambda x, n: x.view(8, D)[MIXED][MIXED.clone().argsort()],
        RowOriginKind.ROWS,
    ),
    "the largest in order, and back": (
        lambda x, n: (made := x[..., 0].flatten().topk(8))[0][made[1].argsort()],
        RowOriginKind.ROWS,
    ),
    "counted more often than there are samples": (
        lambda x, n: x[torch.arange(0, 1, 0.25).long()],
        RowOriginKind.CHOSEN,
    ),
    "within samples": (lambda x, n: x[:, n[0]], RowOriginKind.ROWS),
    "selected within samples": (lambda x, n: x.index_select(-2, n[0]), RowOriginKind.ROWS),
    "gathered within samples": (lambda x, n: x[..., 0].gather(1, n), RowOriginKind.ROWS),
    "gathered samples": (
        lambda x, n: x.gather(0, EXCHANGED.view(2, 1, 1).expand(2, 4, D)),
        RowOriginKind.CHOSEN,
    ),
    "a mask": (lambda x, n: x[n == 1], RowOriginKind.EVEN),
    "elements of a mask": (lambda x, n: x.masked_select(n[..., None] == 1), RowOriginKind.CHOSEN),
    "numbers of a mask": (lambda x, n: n.masked_select(n > 1), RowOriginKind.ROWS),
    "elements of a table": (
        lambda x, n: TABLE.masked_select(torch.ones(D) > 0),
        RowOriginKind.TABLE,
    ),
    "the largest in order": (
        lambda x, n: (n[:, 0] + x[:, 0, 0] * 0).topk(2)[0],
        RowOriginKind.EVEN,
    ),
    "the largest out of order": (
        lambda x, n: (n[:, 1] + x[:, 0, 0] * 0).topk(2)[0],
        RowOriginKind.CHOSEN,
    ),
    "the largest of each sample": (lambda x, n: x[..., 0].topk(2)[0], RowOriginKind.ROWS),
    "the largest of a single number": (lambda x, n: x.sum().topk(1)[0], RowOriginKind.ROWS),
    # Rows of a table, which the batch's numbers pick.
    "looked up": (lambda x, n: functional.embedding(n, TABLE), RowOriginKind.ROWS),
    "looked up by exchanged numbers": (lambda x, n: TABLE[n[EXCHANGED]], RowOriginKind.CHOSEN),
    "looked up by numbers of a mask": (lambda x, n: TABLE[n[n == 1]], RowOriginKind.EVEN),
    "looked up and back": (lambda x, n: TABLE[n[:, 0][EXCHANGED]][EXCHANGED], RowOriginKind.EVEN),
    # Weights of a choice.
    "one-hot": (lambda x, n: functional.one_hot(n, 4).float(), RowOriginKind.CHOICE),
    "rows of the identity": (lambda x, n: torch.eye(4)[n], RowOriginKind.CHOICE),
    "a weighted choice": (lambda x, n: (n == 1).float() * x[..., 0], RowOriginKind.CHOICE),
    "a product of rows": (lambda x, n: x * x, RowOriginKind.ROWS),
    "a condition between constants": (
        lambda x, n: torch.where(n == 1, 1.0, 0.0),
        RowOriginKind.CHOICE,
    ),
    "a condition between rows": (
        lambda x, n: torch.where(n == 1, x[..., 0], 0.0),
        RowOriginKind.ROWS,
    ),
    "numbers at places that data chose": (
        lambda x, n: torch.zeros(2, 4).scatter(1, n[:, :1], 1.0),
        RowOriginKind.CHOICE,
    ),
    "an index in another dtype": (lambda x, n: n.int(), RowOriginKind.ROWS),
    "an even index in another dtype": (lambda x, n: n[n == 1].int(), RowOriginKind.EVEN),
    # Parts that are joined.
    "joined in order": (
        lambda x, n: torch.cat([x[torch.tensor([0])], x[torch.tensor([1])]]),
        RowOriginKind.EVEN,
    ),
    "joined behind no rows": (
        lambda x, n: torch.cat([x[:0], x[torch.tensor([0])], x[torch.tensor([1])]]),
        RowOriginKind.EVEN,
    ),
    "joined out of order": (
        lambda x, n: torch.cat([x[torch.tensor([1])], x[torch.tensor([0])]]),
        RowOriginKind.CHOSEN,
    ),
    "joined with rows that are lost": (
        lambda x, n: torch.cat([x[EXCHANGED], x[EXCHANGED].flatten(1).sum(1).view(2, 1, 1) + x]),
        RowOriginKind.CHOSEN,
    ),
    "joined beside each other": (
        lambda x, n: torch.cat([x[EXCHANGED], x[EXCHANGED]], -1)[EXCHANGED],
        RowOriginKind.CHOSEN,
    ),
    "stacked, of two samples each": (
        lambda x, n: torch.stack([x.view(8, D)[MIXED[1:3]].view(1, 2, D)] * 2).view(4, D)[1:3],
        RowOriginKind.CHOSEN,
    ),
    "rows of a stack": (
        lambda x, n: torch.stack([x.view(8, D)[MIXED[1:3]].view(1, 2, D)] * 2).view(4, D)[
            torch.tensor([1, 2])
        ],
        RowOriginKind.EVEN,
    ),
    # Rows that are put into a tensor.
    "copied over rows": (lambda x, n: x.clone().copy_(x[EXCHANGED]), RowOriginKind.CHOSEN),
    "copied over numbers": (
        lambda x, n: torch.zeros(2, 4, D).copy_(x[EXCHANGED]),
        RowOriginKind.CHOSEN,
    ),
    "placed back": (
        lambda x, n: torch.zeros(8, D).scatter(
            0, MIXED[:, None].expand(-1, D), x.view(8, D)[MIXED]
        ),
        RowOriginKind.ROWS,
    ),
    "placed by another index": (
        lambda x, n: torch.zeros(2, 8, D)[0].index_copy(0, MIXED, x.view(8, D)[BACK]),
        RowOriginKind.CHOSEN,
    ),
    "placed by the numbers of samples": (
        lambda x, n: torch.zeros(2, D).index_copy(0, torch.arange(2), x[:, 0]),
        RowOriginKind.ROWS,
    ),
    "placed in one of two buffers": (
        lambda x, n: torch.zeros(2, 2, D)[1].copy_(x[:, 0]),
        RowOriginKind.ROWS,
    ),
}
# The second operator puts samples in order where the first one put the others.
OVER: dict[str, tuple[Callable[..., torch.Tensor], RowOriginKind]] = {
    "scatter": (lambda to, at, rows: to.scatter(0, _wide(at), rows), RowOriginKind.EVEN),
    "index_copy": (lambda to, at, rows: to.index_copy(0, at, rows), RowOriginKind.EVEN),
    "index_put": (lambda to, at, rows: to.index_put((at,), rows), RowOriginKind.EVEN),
    "index_add": (lambda to, at, rows: to.index_add(0, at, rows), RowOriginKind.CHOSEN),
    "scatter_add": (lambda to, at, rows: to.scatter_add(0, _wide(at), rows), RowOriginKind.CHOSEN),
    "scatter_reduce": (
        lambda to, at, rows: to.scatter_reduce(0, _wide(at), rows, "sum"),
        RowOriginKind.CHOSEN,
    ),
    "index_put that adds": (
        lambda to, at, rows: to.index_put((at,), rows, accumulate=True),
        RowOriginKind.CHOSEN,
    ),
}


def _wide(index: torch.Tensor) -> torch.Tensor:
    return index[:, None].expand(-1, D)


def _kind(make: Make) -> RowOriginKind:
    order = RowOriginTracker(2, [TABLE])
    x, numbers = torch.randn(2, 4, D), NUMBERS.clone()
    with order:
        return order.row_origin_kind(make(x, numbers))


@pytest.mark.parametrize("case", KINDS)
def test_the_kind_of_a_result(case: str) -> None:
    make, kind = KINDS[case]
    assert _kind(make) is kind


@pytest.mark.parametrize("operator", OVER)
def test_rows_that_are_put_over_others(operator: str) -> None:
    put, kind = OVER[operator]

    def make(x: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        rows = x[:, 0][numbers[:, 0].argsort()]  # of the samples 1 and 0
        held = put(torch.zeros(2, D), torch.arange(2) * 1, rows)
        return put(held, EXCHANGED, rows)

    assert _kind(make) is kind


def test_the_inverse_of_another_index_does_not_restore_the_order() -> None:
    def make(first: torch.Tensor, second: torch.Tensor) -> Make:
        return lambda x, n: x.view(8, D)[first][second.argsort()]

    for first, second, kind in (
        (MIXED, MIXED, RowOriginKind.ROWS),
        (MIXED, BACK, RowOriginKind.CHOSEN),
        (BACK, MIXED, RowOriginKind.CHOSEN),
    ):
        assert _kind(make(first, second)) is kind


# By their operators, the argument that brings the rows: the others come from the batch as well.
ROWS_FROM = {
    aten.mm: 0,
    aten.bmm: 0,
    aten.linear: 0,
    aten.mv: 0,
    aten.convolution: 0,
    aten.addmm: 1,
    aten.baddbmm: 1,
    aten.addmv: 1,
    aten._scaled_dot_product_flash_attention_for_cpu: 0,
    aten._scaled_dot_product_flash_attention: 0,
    aten._scaled_dot_product_efficient_attention: 0,
    aten._scaled_dot_product_cudnn_attention: 0,
    aten._scaled_dot_product_fused_attention_overrideable: 0,
    aten._scaled_dot_product_attention_math: 0,
}


@pytest.mark.parametrize("operator", ROWS_FROM, ids=str)
def test_a_product_has_the_rows_of_one_argument(operator: Any) -> None:
    """Attention of a GPU included, whose operators need not run for this."""
    for chosen in range(3):
        known = RowFactsTable(2)
        operands = [torch.randn(2, 4, D) for _ in range(3)]
        known.put(operands[chosen], RowOriginFacts(RowOriginKind.CHOSEN))
        facts = result_row_facts_if_changed(
            known, operator.default, (*operands, True), {}, torch.empty(1)
        )
        assert facts is not None
        assert (facts.kind is RowOriginKind.CHOSEN) == (chosen == ROWS_FROM[operator])


def test_an_operator_of_operators_keeps_what_chose_its_rows() -> None:
    known, rows = RowFactsTable(2), torch.randn(2, D)
    known.put(rows, RowOriginFacts(RowOriginKind.CHOSEN))
    facts = result_row_facts_if_changed(
        known, torch.ops.higher_order.cond, (rows,), {}, torch.empty(2, D)
    )
    assert facts is not None and facts.kind is RowOriginKind.CHOSEN


def test_weights_of_a_choice_choose_rows_of_the_whole_batch_alone() -> None:
    for shape, kind in (
        ((3, 8), RowOriginKind.CHOSEN),
        ((1, 3, 8), RowOriginKind.CHOSEN),
        ((2, 3, 4), RowOriginKind.ROWS),
    ):
        known = RowFactsTable(2)
        weights, rows = torch.ones(shape), torch.ones(*shape[:-2], shape[-1], D)
        known.put(weights, RowOriginFacts(RowOriginKind.CHOICE))
        operator = aten.mm.default if len(shape) == 2 else aten.bmm.default
        facts = result_row_facts_if_changed(known, operator, (weights, rows), {}, torch.empty(1))
        assert facts is not None and facts.kind is kind, shape


def test_a_table_of_the_model_that_reaches_a_layer_alone() -> None:
    """Repeated for each sample it is one of the batch, which values show in a matrix."""
    for shape, alone in (
        ((D,), True),
        ((1, 3, D), True),
        ((2, 4, D), False),
        ((4, 4, D), False),
        ((4, 2, D), False),
        ((0, 4, D), False),
    ):
        table = torch.ones(shape)
        assert RowOriginTracker(2, [table]).is_shared_table(table) is alone, shape
    different = torch.arange(4.0 * D).view(4, D)
    assert RowOriginTracker(2, [different]).is_shared_table(different)
    assert not RowOriginTracker(2, [different]).is_shared_table(different.clone())
    assert not RowOriginTracker(2).is_shared_table(different)
    of_each_sample = torch.arange(8.0 * D).view(2, 4, D)
    assert not RowOriginTracker(2, [of_each_sample]).is_shared_table(of_each_sample)


def test_marks_of_storages_that_are_gone_are_dropped() -> None:
    known = RowFactsTable(2)
    kept = torch.ones(3)
    known.put(kept, RowOriginFacts(RowOriginKind.CHOSEN))
    for _ in range(5000):
        known.put(torch.empty(1), RowOriginFacts(RowOriginKind.CHOSEN))
    assert len(known._by_storage) <= 4096
    assert known.facts_of(kept).kind is RowOriginKind.CHOSEN
    known.put(kept, ROWS)
    assert known.facts_of(kept).kind is RowOriginKind.ROWS


def test_marks_are_searched_again_when_twice_as_many_have_gathered() -> None:
    """A search visits every mark, so one search per new mark would take quadratic time."""
    known = RowFactsTable(2)
    kept = [torch.empty(1) for _ in range(4097)]
    for tensor in kept:
        known.put(tensor, RowOriginFacts(RowOriginKind.CONSTANT))
    for _ in range(50):
        known.put(torch.empty(1), RowOriginFacts(RowOriginKind.CONSTANT))
    assert len(known._by_storage) == 4097 + 50
