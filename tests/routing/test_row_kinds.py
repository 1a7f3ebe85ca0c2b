"""What operators make of the rows of a batch: the kind of each result, in a batch of two ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from fastlora.routing.row_facts import ROWS, Facts, Kind, RowFacts
from fastlora.routing.row_order import RowOrder
from fastlora.routing.row_rules import facts_of_result

aten = torch.ops.aten
D = 8
TABLE = torch.linspace(-1, 1, 4 * D).view(4, D)
NUMBERS = torch.tensor([[3, 1, 0, 2], [1, 2, 3, 0]])
EXCHANGED, MIXED = torch.tensor([1, 0]), torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
BACK = MIXED.argsort()

# From the rows [2, 4, D] of a batch, and the numbers [2, 4] that came with it.
Make = Callable[[torch.Tensor, torch.Tensor], Any]
KINDS: dict[str, tuple[Make, Kind]] = {
    # Tensors that are made from no rows.
    "counted": (lambda x, n: torch.arange(4), Kind.COUNTED),
    "a copy of a counted index": (lambda x, n: torch.arange(4).clone(), Kind.COUNTED),
    "twice a counted index": (lambda x, n: torch.arange(4) * 2, Kind.CONSTANT),
    "constants": (lambda x, n: torch.ones(4) + torch.zeros(4), Kind.CONSTANT),
    "a table and constants": (lambda x, n: TABLE + torch.ones(D), Kind.TABLE),
    "rows and a table": (lambda x, n: x + TABLE, Kind.ROWS),
    "numbers from a table": (lambda x, n: TABLE[torch.arange(2)], Kind.TABLE),
    "numbers from constants": (lambda x, n: torch.ones(4)[torch.arange(2)], Kind.CONSTANT),
    "a product of constants and a table": (lambda x, n: torch.ones(3, 4) @ TABLE, Kind.TABLE),
    # Rows that an index picks.
    "exchanged": (lambda x, n: x[EXCHANGED], Kind.CHOSEN),
    "exchanged twice": (lambda x, n: x[EXCHANGED][EXCHANGED], Kind.EVEN),
    "mixed, in another dtype, and back": (
        lambda x, n: x.view(8, D)[MIXED].double()[BACK],
        Kind.EVEN,
    ),
    "mixed, through a product, and back": (
        lambda x, n: functional.linear(x.view(8, D)[MIXED], TABLE)[BACK],
        Kind.EVEN,
    ),
    "mixed, through a function, and back": (
        lambda x, n: x.view(8, D)[MIXED].tanh()[BACK],
        Kind.EVEN,
    ),
    "sorted and back": (
        lambda x, n: x.view(8, D)[(at := n.flatten().argsort(stable=True))][at.argsort()],
        Kind.ROWS,
    ),
    "counted more often than there are samples": (
        lambda x, n: x[torch.arange(0, 1, 0.25).long()],
        Kind.CHOSEN,
    ),
    "within samples": (lambda x, n: x[:, n[0]], Kind.ROWS),
    "gathered within samples": (lambda x, n: x[..., 0].gather(1, n), Kind.ROWS),
    "gathered samples": (
        lambda x, n: x.gather(0, EXCHANGED.view(2, 1, 1).expand(2, 4, D)),
        Kind.CHOSEN,
    ),
    "a mask": (lambda x, n: x[n == 1], Kind.EVEN),
    "elements of a mask": (lambda x, n: x.masked_select(n[..., None] == 1), Kind.CHOSEN),
    "numbers of a mask": (lambda x, n: n.masked_select(n > 1), Kind.ROWS),
    "elements of a table": (lambda x, n: TABLE.masked_select(torch.ones(D) > 0), Kind.TABLE),
    "the largest in order": (lambda x, n: (n[:, 0] + x[:, 0, 0] * 0).topk(2)[0], Kind.EVEN),
    "the largest out of order": (lambda x, n: (n[:, 1] + x[:, 0, 0] * 0).topk(2)[0], Kind.CHOSEN),
    "the largest of each sample": (lambda x, n: x[..., 0].topk(2)[0], Kind.ROWS),
    # Rows of a table, which the batch's numbers pick.
    "looked up": (lambda x, n: functional.embedding(n, TABLE), Kind.ROWS),
    "looked up by exchanged numbers": (lambda x, n: TABLE[n[EXCHANGED]], Kind.CHOSEN),
    "looked up by numbers of a mask": (lambda x, n: TABLE[n[n == 1]], Kind.EVEN),
    "looked up and back": (lambda x, n: TABLE[n[:, 0][EXCHANGED]][EXCHANGED], Kind.EVEN),
    # Weights of a choice.
    "one-hot": (lambda x, n: functional.one_hot(n, 4).float(), Kind.CHOICE),
    "rows of the identity": (lambda x, n: torch.eye(4)[n], Kind.CHOICE),
    "a weighted choice": (lambda x, n: (n == 1).float() * x[..., 0], Kind.CHOICE),
    "a product of rows": (lambda x, n: x * x, Kind.ROWS),
    "a condition between constants": (lambda x, n: torch.where(n == 1, 1.0, 0.0), Kind.CHOICE),
    "a condition between rows": (lambda x, n: torch.where(n == 1, x[..., 0], 0.0), Kind.ROWS),
    "numbers at places that data chose": (
        lambda x, n: torch.zeros(2, 4).scatter(1, n[:, :1], 1.0),
        Kind.CHOICE,
    ),
    "an index in another dtype": (lambda x, n: n.int(), Kind.ROWS),
    "an even index in another dtype": (lambda x, n: n[n == 1].int(), Kind.EVEN),
    # Parts that are joined.
    "joined in order": (
        lambda x, n: torch.cat([x[torch.tensor([0])], x[torch.tensor([1])]]),
        Kind.EVEN,
    ),
    "joined behind no rows": (
        lambda x, n: torch.cat([x[:0], x[torch.tensor([0])], x[torch.tensor([1])]]),
        Kind.EVEN,
    ),
    "joined out of order": (
        lambda x, n: torch.cat([x[torch.tensor([1])], x[torch.tensor([0])]]),
        Kind.CHOSEN,
    ),
    "joined with rows that are lost": (
        lambda x, n: torch.cat([x[EXCHANGED], x[EXCHANGED].flatten(1).sum(1).view(2, 1, 1) + x]),
        Kind.CHOSEN,
    ),
    "joined beside each other": (
        lambda x, n: torch.cat([x[EXCHANGED], x[EXCHANGED]], -1)[EXCHANGED],
        Kind.CHOSEN,
    ),
    "stacked, of two samples each": (
        lambda x, n: torch.stack([x.view(8, D)[MIXED[1:3]].view(1, 2, D)] * 2).view(4, D)[1:3],
        Kind.CHOSEN,
    ),
    "rows of a stack": (
        lambda x, n: torch.stack([x.view(8, D)[MIXED[1:3]].view(1, 2, D)] * 2).view(4, D)[
            torch.tensor([1, 2])
        ],
        Kind.EVEN,
    ),
    # Rows that are put into a tensor.
    "copied over rows": (lambda x, n: x.clone().copy_(x[EXCHANGED]), Kind.CHOSEN),
    "copied over numbers": (lambda x, n: torch.zeros(2, 4, D).copy_(x[EXCHANGED]), Kind.CHOSEN),
    "placed back": (
        lambda x, n: torch.zeros(8, D).scatter(
            0, MIXED[:, None].expand(-1, D), x.view(8, D)[MIXED]
        ),
        Kind.ROWS,
    ),
    "placed by another index": (
        lambda x, n: torch.zeros(2, 8, D)[0].index_copy(0, MIXED, x.view(8, D)[BACK]),
        Kind.CHOSEN,
    ),
    "placed by the numbers of samples": (
        lambda x, n: torch.zeros(2, D).index_copy(0, torch.arange(2), x[:, 0]),
        Kind.ROWS,
    ),
    "placed in one of two buffers": (
        lambda x, n: torch.zeros(2, 2, D)[1].copy_(x[:, 0]),
        Kind.ROWS,
    ),
}
# The second operator puts samples in order where the first one put the others.
OVER: dict[str, tuple[Callable[..., torch.Tensor], Kind]] = {
    "scatter": (lambda to, at, rows: to.scatter(0, _wide(at), rows), Kind.EVEN),
    "index_copy": (lambda to, at, rows: to.index_copy(0, at, rows), Kind.EVEN),
    "index_put": (lambda to, at, rows: to.index_put((at,), rows), Kind.EVEN),
    "index_add": (lambda to, at, rows: to.index_add(0, at, rows), Kind.CHOSEN),
    "scatter_add": (lambda to, at, rows: to.scatter_add(0, _wide(at), rows), Kind.CHOSEN),
    "scatter_reduce": (
        lambda to, at, rows: to.scatter_reduce(0, _wide(at), rows, "sum"),
        Kind.CHOSEN,
    ),
    "index_put that adds": (
        lambda to, at, rows: to.index_put((at,), rows, accumulate=True),
        Kind.CHOSEN,
    ),
}


def _wide(index: torch.Tensor) -> torch.Tensor:
    return index[:, None].expand(-1, D)


def _kind(make: Make) -> Kind:
    order = RowOrder(2, [TABLE])
    x, numbers = torch.randn(2, 4, D), NUMBERS.clone()
    with order:
        return order.kind_of(make(x, numbers))


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
        known = RowFacts(2)
        operands = [torch.randn(2, 4, D) for _ in range(3)]
        known.put(operands[chosen], Facts(Kind.CHOSEN))
        facts = facts_of_result(known, operator.default, (*operands, True), {}, torch.empty(1))
        assert facts is not None
        assert (facts.kind is Kind.CHOSEN) == (chosen == ROWS_FROM[operator])


def test_an_operator_of_operators_keeps_what_chose_its_rows() -> None:
    known, rows = RowFacts(2), torch.randn(2, D)
    known.put(rows, Facts(Kind.CHOSEN))
    facts = facts_of_result(known, torch.ops.higher_order.cond, (rows,), {}, torch.empty(2, D))
    assert facts is not None and facts.kind is Kind.CHOSEN


def test_weights_of_a_choice_choose_rows_of_the_whole_batch_alone() -> None:
    for shape, kind in (((3, 8), Kind.CHOSEN), ((1, 3, 8), Kind.CHOSEN), ((2, 3, 4), Kind.ROWS)):
        known = RowFacts(2)
        weights, rows = torch.ones(shape), torch.ones(*shape[:-2], shape[-1], D)
        known.put(weights, Facts(Kind.CHOICE))
        operator = aten.mm.default if len(shape) == 2 else aten.bmm.default
        facts = facts_of_result(known, operator, (weights, rows), {}, torch.empty(1))
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
        assert RowOrder(2, [table]).is_lone_table(table) is alone, shape
    different = torch.arange(4.0 * D).view(4, D)
    assert RowOrder(2, [different]).is_lone_table(different)
    assert not RowOrder(2, [different]).is_lone_table(different.clone())
    assert not RowOrder(2).is_lone_table(different)
    of_each_sample = torch.arange(8.0 * D).view(2, 4, D)
    assert not RowOrder(2, [of_each_sample]).is_lone_table(of_each_sample)


def test_marks_of_storages_that_are_gone_are_dropped() -> None:
    known = RowFacts(2)
    kept = torch.ones(3)
    known.put(kept, Facts(Kind.CHOSEN))
    for _ in range(5000):
        known.put(torch.empty(1), Facts(Kind.CHOSEN))
    assert len(known._marks) <= 4096
    assert known.of(kept).kind is Kind.CHOSEN
    known.put(kept, ROWS)
    assert known.of(kept).kind is Kind.ROWS
