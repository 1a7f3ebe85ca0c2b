"""The batch-invariant mode: a row's bits in many batches, at many places, beside many adapters.

On a GPU the dots are the GPU's, and this is where bit equality is claimed. In the interpreter they
are replaced by ones that are as hostile as the mode allows hardware to be: an element is a chain
over K whose order goes by the tile's shape, and every dot moves its whole accumulator, by zeros
too. What passes there is our part: that a row meets the same dots, in the same order, with its rank
rows in the same places. Outside of the mode the same dots change rows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

import fastlora
from fastlora import env
from fastlora.functional import lora_add, lora_linear
from fastlora.ops.rows import sort_rows
from fastlora.ops.triton.rows_argument import rows_argument_for_address_tables
from fastlora.testing import assert_within_budget
from fastlora.validation import ImplementationError

pytest.importorskip("triton", reason="triton is not installed")

from tests.support.kernels.mixed_problem import OPS, THREE, MixedProblem, draw_ids

INTERPRETED = env.triton_interpreted()
NATIVE = torch.cuda.is_available() and not INTERPRETED


# ------------------------------------------------------------------------------ mixed batches


def batch(
    problem: MixedProblem,
    rows: Sequence[int],
    plan: str = "invariant",
    grouped: bool = False,
    max_rank: int | None = None,
    slots: Sequence[int] | None = None,
) -> torch.Tensor:
    """Returns module 0's y of a batch of some of the problem's rows, in the order given.

    Args:
        problem: With three modules.
        rows: Rows of ``problem.x``.
        plan: As for the operator.
        grouped: Whether the three modules share a shrink.
        max_rank: Largest rank there may be; the problem's if it is None.
        slots: Where each of the tables' columns comes from: another order of the adapters.
    """
    slots = range(problem.slots) if slots is None else slots
    place = {slot: column for column, slot in enumerate(slots)}
    ids = torch.tensor([place.get(problem.ids[row], -1) for row in rows], dtype=torch.int64)
    batch = sort_rows(ids.to(problem.x.device), len(rows), len(slots))
    own = rows_argument_for_address_tables(batch, plan == "invariant")
    max_rank = max_rank or problem.max_rank
    columns = torch.tensor(slots, device=problem.x.device)
    tables = [table[:, columns] for table in problem.all_tables]
    if not grouped:
        tables = [table[:1] for table in tables]
    return OPS.lora_linear_at(
        *(problem.x[list(rows)], problem.weights[0], problem.biases[0], own, None, tables),
        *(0, max_rank, problem.factor_dtype, plan, [0, 3] if grouped else None),
    )[0]


def batches(problem: MixedProblem, sizes: Sequence[int]) -> Iterator[tuple[list[int], Any]]:
    """Yields rows and options of `batch`: of all sizes, orders, sharings and orders of slots."""
    chance = random.Random(0)
    for index, size in enumerate(sizes):
        rows = [chance.randrange(problem.m) for _ in range(size)]
        slots = chance.sample(range(problem.slots), problem.slots)
        largest = (None, 192)[index // 2 % 2]
        yield rows, {"grouped": index % 2 == 1, "max_rank": largest, "slots": slots}


def changed_rows(problem: MixedProblem, sizes: Sequence[int], plan: str) -> int:
    """Returns how many rows differ in a bit from what they are in the batch of all rows."""
    everything = batch(problem, range(problem.m), plan)
    changed = 0
    for rows, options in batches(problem, sizes):
        y = batch(problem, rows, plan, **options)
        changed += int((y != everything[rows]).any(1).sum())
    return changed


def mixed_problem(lab: Any, m: int, n: int, k: int, dtype: torch.dtype) -> MixedProblem:
    return MixedProblem(lab, draw_ids(m, 8), THREE, k, [n, 24, 33], dtype, biased=(1, 3, 7))


@pytest.mark.drawn(1 / 2)
@pytest.mark.usefixtures("dots")
def test_rows_of_a_mixed_batch(lab: Any, dtype: torch.dtype) -> None:
    problem = mixed_problem(lab, 70, 72, 530, dtype)
    sizes = (1, 1, 1, 1, 2, 3, 15, 17, 64, 90)
    assert changed_rows(problem, sizes, "invariant") == 0


@pytest.mark.skipif(not INTERPRETED, reason="what the GPU does outside of the mode is its own")
@pytest.mark.usefixtures("dots")
def test_these_batches_change_rows_outside_of_the_mode(lab: Any) -> None:
    problem = mixed_problem(lab, 70, 72, 530, torch.float32)
    assert changed_rows(problem, (1, 17, 64), "fused") > 60


@pytest.mark.skipif(not INTERPRETED, reason="compares plans by the interpreter's dots")
@pytest.mark.usefixtures("dots")
@pytest.mark.parametrize("own_blocks", [False, True])
def test_the_place_of_rank_rows_matters(
    lab: Any, monkeypatch: pytest.MonkeyPatch, own_blocks: bool
) -> None:
    """One tile of the mode, but adapters side by side in a dot, or no selection: rows change."""
    from dataclasses import replace

    from fastlora.kernels import configs

    original = configs.choose

    def weakened(chip: Any, launch: str, *args: Any, **options: Any) -> Any:
        config = original(chip, launch, *args, **options)
        if launch != "mixed_lora_linear":
            return config
        return replace(config, batch_invariant=False, block_r=16 if own_blocks else 64)

    monkeypatch.setattr(configs, "choose", weakened)
    assert changed_rows(mixed_problem(lab, 20, 72, 40, torch.float32), (1, 2, 17), "invariant")


@pytest.mark.usefixtures("dots")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_changes_no_other_row(lab: Any) -> None:
    problem = mixed_problem(lab, 40, 40, 24, torch.float32)
    clean = batch(problem, range(40))
    own = problem.rows_of(1)
    others = [row for row in range(40) if row not in own]
    for value in (float("nan"), float("inf")):
        problem.factors[0][1].lora_b[:, 5] = value
        y = batch(problem, range(40))
        assert torch.equal(y[others], clean[others])
        assert not y[own, 5].isfinite().any()


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize(("m", "n", "k"), [(0, 40, 48), (1, 64, 48), (37, 50, 1100), (130, 33, 65)])
def test_values_of_a_mixed_batch(lab: Any, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    problem = mixed_problem(lab, m, n, k, dtype)
    problem.check(batch(problem, range(m)))
    problem.check(batch(problem, range(m), grouped=True))


def test_rows_of_an_invalid_id_are_nan(lab: Any) -> None:
    problem = mixed_problem(lab, 20, 36, 40, torch.float32)
    ids, problem.ids = problem.ids, [8, *problem.ids[1:]]
    rows = sort_rows(torch.tensor(problem.ids, device=problem.x.device), 20, 8)
    (y,) = OPS.lora_linear_at(
        *(problem.x, problem.weights[0], problem.biases[0]),
        *(rows_argument_for_address_tables(rows, True), None, problem.all_tables),
        *(0, problem.max_rank, problem.factor_dtype, "invariant"),
    )
    problem.ids = ids
    assert y[0].isnan().all()
    y[0] = problem.expected(0, torch.float32)[0]
    problem.check(y)


# -------------------------------------------------------------------------------- one adapter


def one_adapter(lab: Any, m: int, n: int, k: int, r: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "x": lab.rand(m, k, dtype=dtype),
        "weight": lab.rand(n, k, dtype=dtype) / k**0.5,
        "lora_a": lab.rand(r, k, dtype=dtype) / k**0.5,
        "lora_b": lab.rand(n, r, dtype=dtype) / r**0.5,
        "scaling": 1.7,
        "bias": lab.rand(n, dtype=dtype),
    }


def changed_rows_of_one(tensors: dict[str, Any], sizes: Sequence[int], plan: str) -> int:
    """As `changed_rows`; x also comes as a slice of wider rows, and transposed."""
    x = tensors.pop("x")
    everything = lora_linear(x, **tensors, impl="triton", plan=plan)
    chance, changed = random.Random(0), 0
    for index, size in enumerate(sizes):
        rows = [chance.randrange(x.shape[0]) for _ in range(size)]
        own = x[rows]
        if index % 3 == 1:
            own = torch.cat([own, own], 1)[:, : own.shape[1]]
        elif index % 3 == 2:
            own = own.t().contiguous().t()
        y = lora_linear(own, **tensors, impl="triton", plan=plan)
        changed += int((y != everything[rows]).any(1).sum())
    return changed


@pytest.mark.drawn(1 / 2)
@pytest.mark.usefixtures("dots")
@pytest.mark.parametrize(("n", "k", "r"), [(72, 530, 24), (40, 64, 1), (33, 100, 130)])
def test_rows_of_one_adapter(lab: Any, dtype: torch.dtype, n: int, k: int, r: int) -> None:
    tensors = one_adapter(lab, 90, n, k, r, dtype)
    assert changed_rows_of_one(tensors, (1, 1, 1, 2, 17, 64, 90), "invariant") == 0


@pytest.mark.skipif(not INTERPRETED, reason="what the GPU does outside of the mode is its own")
@pytest.mark.usefixtures("dots")
def test_these_sizes_change_rows_of_one_adapter_outside_of_the_mode(lab: Any) -> None:
    tensors = one_adapter(lab, 90, 72, 530, 24, torch.float32)
    assert changed_rows_of_one(tensors, (1, 2, 17), "fused") == 20


@pytest.mark.parametrize(("m", "n", "k", "r"), [(0, 40, 48, 4), (1, 64, 530, 1), (90, 33, 65, 130)])
def test_values_of_one_adapter(
    lab: Any, dtype: torch.dtype, m: int, n: int, k: int, r: int
) -> None:
    tensors = one_adapter(lab, m, n, k, r, dtype)
    exact = {name: t.double() if name != "scaling" else t for name, t in tensors.items()}
    assert_within_budget(
        lora_linear(**tensors, impl="triton", plan="invariant"),
        lora_linear(**tensors, impl="eager"),
        lora_linear(**exact, impl="eager"),
    )


def test_training_has_the_forward_of_inference(lab: Any) -> None:
    tensors = one_adapter(lab, 20, 40, 530, 8, torch.float32)
    with fastlora.batch_invariant():
        expected = lora_linear(**tensors)
        tensors["lora_b"].requires_grad_()
        y = lora_linear(**tensors)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert tensors["lora_b"].grad.isfinite().all()


def test_errors_of_functions(lab: Any) -> None:
    tensors = one_adapter(lab, 2, 8, 48, 4, torch.float32)
    with fastlora.batch_invariant(), pytest.raises(ImplementationError, match="plan='split'"):
        lora_linear(**tensors, plan="split")
    with (
        fastlora.batch_invariant(),
        pytest.raises(ImplementationError, match="operation that produced y"),
    ):
        lora_add(lab.rand(2, 8), tensors["x"], tensors["lora_a"], tensors["lora_b"], 1.0)


# ------------------------------------------------------------------------------------- on a GPU


@pytest.mark.skipif(not NATIVE, reason="bit equality is claimed of GPUs only, and none is here")
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1024, 4096), (576, 1536)])
def test_bit_equality_on_a_gpu(lab: Any, dtype: torch.dtype, n: int, k: int) -> None:
    """Sizes of models, up to 2,048 rows, by the GPU's own arithmetic."""
    problem = mixed_problem(lab, 2048, n, k, dtype)
    sizes = (*[1] * 16, 2, 8, 16, 17, 64, 65, 128, 129, 512, 1000, 2048)
    assert changed_rows(problem, sizes, "invariant") == 0
    for r in (8, 64, 160):
        tensors = one_adapter(lab, 2048, n, k, r, dtype)
        assert changed_rows_of_one(tensors, sizes, "invariant") == 0
