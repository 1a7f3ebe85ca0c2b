"""Gradients of mixed batches: values, masks, strides, rows kept apart, runs that repeat.

Through the operators, so that configs are chosen as a layer's are.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.env import triton_interpreted
from fastlora.ops.layout import split_grad_a
from fastlora.testing import assert_within_budget
from tests.support.bytes.byte_counter import ByteCounter
from tests.support.kernels.mixed_grad_problem import RANKS, GradProblem, mix
from tests.support.kernels.mixed_problem import OPS


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize(
    ("m", "n", "k", "plan"),
    [(0, 40, 48, "fused"), (1, 64, 33, "split"), (17, 50, 70, "fused"), (127, 35, 24, "auto")],
)
def test_values(
    lab: Any, dtype: torch.dtype, m: int, n: int, k: int, plan: str, dropout: bool
) -> None:
    """Ranks 1 to 64, rsLoRA, lora_bias, base rows, an absent module and an adapter without rows."""
    problem = GradProblem(lab, mix(m), n, k, dtype, dropout=dropout)
    found = problem.run(plan)
    problem.check(found)
    for slot in set(range(len(RANKS))) - set(problem.ids):
        assert not found[f"d_lora_a {slot}"].any()
        assert not found[f"d_lora_b {slot}"].any()


@pytest.mark.parametrize("rows", [8, 48])
def test_adapters_over_several_runs(lab: Any, dtype: torch.dtype, rows: int) -> None:
    """An adapter's planes are those of all runs that hold its rows, and of no other's."""
    ids = sorted(mix(70), reverse=True)[::2] + mix(40)
    problem = GradProblem(lab, ids, 36, 40, dtype, dropout=rows == 8, run_rows=rows)
    start, stop = problem.groups.slot_start[3:5].tolist()
    assert rows == 48 or start // rows < (stop - 1) // rows
    problem.check(problem.run())


def test_grouped_layers_from_one_read_of_x(lab: Any, dtype: torch.dtype) -> None:
    """Two modules' gradients from one launch; under dropout from one each, with its own mask."""
    one = GradProblem(lab, mix(40), 20, 40, dtype, ranks=(1, 3, 8, 16, 24, 0, 16), dropout=True)
    other = GradProblem(lab, one.ids, 33, 40, dtype, ranks=(16, 0, 1, 5, 24, 8, 3), dropout=True)
    other.x, other.seeds = one.x, one.seeds + 12345
    ds = [lab.rand(40, 32, dtype=dtype) for _ in range(2)]
    both = [*one.lora_a, *other.lora_a]
    for drops in (False, True):
        seeds = torch.cat([one.seeds, other.seeds]) if drops else None
        arguments = one.grad_a_arguments(ds[0])
        with ByteCounter(x=[one.x]) if triton_interpreted() else nullcontext() as counter:
            (packed,) = OPS.lora_grad_a(
                one.x, ds, *arguments[2:4], both, seeds, one.ps + other.ps, "triton"
            )
        if counter is not None:
            count = counter.kernels["_mixed_lora_grad_a_kernel"]
            assert count.launches == 1 + drops
            moved = one.x.element_size() * 40 * sum(slot >= 0 for slot in one.ids)
            assert drops or count.loads["x"].distinct == moved
        found = iter(split_grad_a(packed, both))
        for problem, own in zip((one, other), ds, strict=True):
            for slot, r in enumerate(problem.ranks):
                at = slice(*problem.groups.slot_start[slot : slot + 2].tolist())
                rows = problem.rows_of(slot)
                near, exact = (
                    own[at, :r].to(kind).t()
                    @ (
                        problem.x[rows].to(kind)
                        * (problem.masks(slot, len(rows), kind) if drops else 1)
                    )
                    for kind in (dtype, torch.float64)
                )
                assert_within_budget(next(found), near, exact)


@pytest.mark.parametrize("k", [24, 2048], ids=["whole", "split"])
def test_forward_of_an_s_that_was_made_before(lab: Any, dtype: torch.dtype, k: int) -> None:
    """As siblings share it: by a linear of its own, and by an update in place."""
    problem = GradProblem(lab, [0, 2, -1, 1, 0], 20, k, dtype, ranks=(1, 3, 8), biased=(1,))
    (s,) = OPS.lora_shrink(*problem.shrink_arguments())
    x, weight, _, rows, _, *rest = problem.forward_arguments("auto")
    (y,) = OPS.lora_linear(x, weight, None, rows, s, *rest)
    problem.check({"y": y})
    y = x @ weight.t()
    factors = problem.lora_b, problem.lora_bias, problem.scaling
    OPS.lora_expand_(y, s, rows, *factors, "triton")
    problem.check({"y": y})


def test_fp32_masters(lab: Any) -> None:
    """fp32 factors beside fp16 activations: gradients are fp32, of sums that were."""
    problem = GradProblem(lab, mix(40), 48, 64, torch.float16, torch.float32, dropout=True)
    problem.check(problem.run())


@pytest.mark.parametrize("ids", [[-1] * 20, [5] * 20, [4] * 20], ids=["base", "absent", "one"])
def test_plain_batches(lab: Any, dtype: torch.dtype, ids: list[int]) -> None:
    """No adapter at all, one without a part in the module, one for all rows."""
    problem = GradProblem(lab, ids, 36, 40, dtype)
    problem.check(problem.run("split"))


def test_rank_past_every_block(lab: Any) -> None:
    ids = [row % 5 - 1 for row in range(12)]
    problem = GradProblem(lab, ids, 20, 24, torch.float32, ranks=(130, 3, 72, 1), biased=(0,))
    problem.check(problem.run())


def test_strides(lab: Any) -> None:
    """Gradients may be expanded, and x a slice; factors may lie anywhere."""
    problem = GradProblem(lab, mix(19), 45, 50, torch.float32)
    problem.x = lab.strided(problem.x, "rows")
    problem.weight = lab.strided(problem.weight, "transposed")
    problem.lora_a[3] = lab.strided(problem.lora_a[3], "both")
    problem.lora_b[3] = lab.strided(problem.lora_b[3], "transposed")
    for dy, plan in (
        (lab.strided(problem.dy, "both"), "split"),
        (torch.ones((), device=lab.device).expand(19, 45), "fused"),
        (problem.dy[:1].expand(19, 45), "split"),
    ):
        problem.dy = dy
        problem.check(problem.run(plan))


@pytest.mark.parametrize(
    ("plan", "dropout"), [("split", False), ("fused", True)], ids=["split", "fused-dropout"]
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_rows_stay_separate(lab: Any, plan: str, dropout: bool) -> None:
    """Whatever is not finite in an adapter, or in a row of x or dy, reaches nobody else."""
    ranks = (1, 3, 8, 16, 24)
    ids = [row % 6 - 1 for row in range(20)]
    problem = GradProblem(lab, ids, 20, 24, torch.float32, ranks=ranks, dropout=dropout)
    in_a, in_b = problem.lora_a[4][23, 3:4], problem.lora_b[3][5, 2:3]
    in_x, in_dy = problem.x[problem.rows_of(3)[0], 4:5], problem.dy[problem.rows_of(4)[-1], 19:]
    for spoilt in (in_b, in_x) if dropout else (in_a, in_dy):
        problem.check_apart(lambda: problem.run(plan), spoilt)


def test_repeats_bit_for_bit(lab: Any, request: pytest.FixtureRequest) -> None:
    """What operators allocate and do not write is never read: NaN there would show."""
    ids = [0, 2, -1, 1, 0]  # and slot 3 has no rows; two splits of K
    problem = GradProblem(lab, ids, 24, 520, torch.float32, ranks=(1, 3, 8, 16), biased=(1,))
    first = problem.run("split")
    request.getfixturevalue("poisoned")
    again = problem.run("split")
    assert all(torch.equal(tensor, first[name]) for name, tensor in again.items())
    problem.check(again)


def test_masks_are_held_exactly(lab: Any) -> None:
    """Ones through every kernel that drops: an element is dropped where PyTorch's integers say."""
    problem = GradProblem(lab, mix(50), 16, 40, torch.float32, dropout=True)
    problem.x.fill_(1.0)
    problem.weight.zero_()
    for slot, r in enumerate(problem.ranks):
        problem.lora_a[slot].zero_()
        for row in range(r):
            problem.lora_a[slot][row, row % 40] = 1.0  # s is x's first columns
    y, s = OPS.lora_linear(*problem.forward_arguments("fused"))
    ds = torch.ones_like(s)
    starts = problem.groups.slot_start.tolist()
    order = problem.groups.order.tolist()
    (gradients,) = OPS.lora_grad_a(*problem.grad_a_arguments(ds))
    for plan in ("fused", "split"):
        dx = OPS.lora_grad_x(*problem.grad_x_arguments(ds, plan))
        for slot, r in enumerate(problem.ranks):
            at = slice(starts[slot], starts[slot + 1])
            rows = order[at]
            mask = problem.masks(slot, len(rows), torch.float32)
            width = min(r, 40)
            # Ones and zeros but for 1 / (1 - p); dx sums the rank rows that lead to a column.
            exact = problem.masks(slot, len(rows), torch.float64)
            assert_within_budget(s[at, :width], mask[:, :width], exact[:, :width])
            assert torch.equal(s[at, :width] != 0, mask[:, :width] != 0)
            times = problem.lora_a[slot].sum(0)
            assert_within_budget(dx[rows], mask * times, exact * times)
            assert torch.equal(dx[rows] != 0, mask * times != 0)
    for slot, gradient in enumerate(split_grad_a(gradients, problem.lora_a)):
        mask = problem.masks(slot, len(problem.rows_of(slot)), torch.float64)
        kept = (mask.sum(0) * (1 - problem.ps[slot])).round()
        counted = (gradient * (1 - problem.ps[slot])).round()
        assert (counted == kept).all()  # every rank row counts the rows that kept a column


def test_rows_of_an_invalid_id(lab: Any) -> None:
    """They are NaN in dx and in no gradient of an adapter."""
    ids = mix(20)
    problem = GradProblem(lab, [*ids[:5], 9, *ids[5:], -2], 36, 40, torch.float32)
    assert problem.groups.invalid
    for plan in ("fused", "split"):
        found = problem.run(plan)
        for name in ("y", "dx"):
            assert found[name][[5, 21]].isnan().all()
            found[name][[5, 21]] = problem.results(torch.float32)[name][[5, 21]]
        problem.check(found)


def test_what_is_not_asked_for_is_not_written(lab: Any) -> None:
    """ds alone, for a backward that no factor of lora_b takes part in; dx without a base."""
    problem = GradProblem(lab, mix(30), 36, 40, torch.float32, dropout=True)
    _, s = OPS.lora_linear(*problem.forward_arguments("fused"))
    both, *_ = OPS.lora_grad_b(*problem.grad_b_arguments(s))
    alone, packed, _ = OPS.lora_grad_b(*problem.grad_b_arguments(s, factors=False))
    assert not packed.numel()
    for slot, r in enumerate(problem.ranks):
        at = slice(*problem.groups.slot_start[slot : slot + 2].tolist())
        assert torch.equal(both[at, :r], alone[at, :r])
    dx = OPS.lora_grad_x(*problem.grad_x_arguments(both, "auto", base=False))
    whole = OPS.lora_grad_x(*problem.grad_x_arguments(both, "split"))
    torch.testing.assert_close(dx + problem.dy @ problem.weight, whole)
    assert not dx[problem.rows_of(-1)].any()


def test_eager_branch(lab: Any, dtype: torch.dtype) -> None:
    """The operators' PyTorch branch gives the same; its dropout is its own but kept in backward."""
    problem = GradProblem(lab, mix(30), 36, 40, dtype)
    problem.check(problem.run(impl="eager"))
    problem = GradProblem(lab, [0] * 64, 36, 40, torch.float32, ranks=(16,), dropout=True)
    problem.weight.zero_()
    found = problem.run(impl="eager")
    # Without a base, dx is zero exactly where x was dropped: y and all gradients had that mask.
    kept = found["dx"] != 0
    assert not kept.all() and kept.any()
    with mock.patch.object(
        problem, "masks", lambda slot, count, dtype: kept.to(dtype) / (1 - problem.ps[slot])
    ):
        problem.check(found)
