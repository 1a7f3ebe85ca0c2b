"""The dense masked plan of a mixed batch: equal to the others, apart, replayed, chosen, refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastlora
from fastlora.env import triton_interpreted
from fastlora.ops import plans
from fastlora.validation import ImplementationError

pytest.importorskip("triton", reason="triton is not installed")

from tests.support.bytes.byte_counter import ByteCounter
from tests.support.kernels.mixed_operators import OPS, linear, linear_arguments, shrink_arguments
from tests.support.kernels.mixed_problem import MixedProblem, draw_ids

RANKS = (1, 3, 8, 16, 24, 5, 0)
interpreted = pytest.mark.skipif(not triton_interpreted(), reason="counts in the interpreter")


@pytest.mark.parametrize("biased", [(), (1, 6)], ids=["plain", "lora_bias"])
@pytest.mark.parametrize(("m", "n", "k"), [(0, 40, 48), (1, 64, 48), (37, 50, 100), (130, 33, 65)])
def test_values(lab: Any, dtype: torch.dtype, m: int, n: int, k: int, biased: Any) -> None:
    """As near to float64 as the other plans."""
    problem = MixedProblem(lab, draw_ids(m, 7), [RANKS], k, [n], dtype, biased=biased)
    for plan in ("dense", "fused", "split"):
        problem.check(linear(problem, plan=plan))


def test_factors_wider_than_rows(lab: Any) -> None:
    """fp32 factors of fp16 rows, and invalid ids beside them."""
    problem = MixedProblem(
        lab, draw_ids(20, 7), [RANKS], 48, [40], torch.float16, factor_dtype=torch.float32
    )
    problem.check(linear(problem, plan="dense"))
    y = linear(problem, plan="dense")
    problem.regroup([9, *problem.ids[1:]])
    spoilt = linear(problem, plan="dense")
    assert spoilt[0].isnan().all() and torch.equal(spoilt[1:], y[1:])


def test_siblings_may_have_made_s(lab: Any) -> None:
    """Where they did, lora_a is not gathered again."""
    ranks = (RANKS, (8, 0, 16, 1, 24, 3, 2))
    problem = MixedProblem(lab, draw_ids(33, 7), ranks, 100, [64, 33], torch.float32, biased=(1,))
    s = OPS.mixed_lora_shrink(*shrink_arguments(problem))
    for g in range(2):
        problem.check(linear(problem, g, s, "dense"), g)
        problem.check(linear(problem, g, plan="dense"), g)


@pytest.mark.parametrize("operand", ["x", "lora_a", "lora_b", "lora_bias"])
def test_nothing_leaks_between_rows(lab: Any, operand: str) -> None:
    """A NaN or an infinity in one adapter or one row, the adapter's in use or not."""
    problem = MixedProblem(
        lab, draw_ids(24, 4), [(8, 3, 16, 0)], 48, [40], torch.float32, biased=(1,)
    )
    spoilt = problem.x[5] if operand == "x" else getattr(problem.factors[0][1], operand)
    element = spoilt.view(-1)[spoilt.numel() // 2 :][:1]
    problem.check_apart(lambda: linear(problem, plan="dense"), element)
    problem.regroup([0, 2, 3, -1] * 6)
    clean = linear(problem, plan="dense")
    if operand != "x":
        element.fill_(float("nan"))
        assert torch.equal(linear(problem, plan="dense"), clean)


@interpreted
def test_launches_do_not_depend_on_the_mix(lab: Any) -> None:
    """The same kernels and grids from the same buffers, whoever is in the batch."""
    problem = MixedProblem(lab, [0] * 24, [RANKS], 48, [40], torch.float32, biased=(1,))
    recorded: list[Any] = []
    for ids in ([0] * 24, [-1] * 24, draw_ids(24, 7), [*range(7)] * 3 + [0, 1, 2]):
        problem.regroup(ids)
        with ByteCounter() as counter:
            y = linear(problem, plan="dense")
        problem.check(y)
        recorded.append({name: count.grids for name, count in counter.kernels.items()})
    assert {name: len(grids) for name, grids in recorded[0].items()} == {
        "_mixed_lora_expand_kernel": 3
    }
    assert all(launches == recorded[0] for launches in recorded)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_cuda_graph_replays_any_mix(lab: Any) -> None:
    problem = MixedProblem(lab, [0] * 24, [RANKS], 48, [40], torch.float32, biased=(1,))
    linear(problem, plan="dense")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(problem, plan="dense")
    for seed in range(3):
        problem.regroup(draw_ids(24, 7, seed))
        problem.x.copy_(torch.randn_like(problem.x))
        problem.scaling.uniform_()
        graph.replay()
        problem.check(y)


def test_opcheck(lab: Any) -> None:
    """The operator's schema and fake hold for this plan too."""
    problem = MixedProblem(lab, draw_ids(20, 7), [RANKS], 48, [40], torch.float32)
    arguments = linear_arguments(problem, 0, None, "dense")
    torch.library.opcheck(
        OPS.mixed_lora_linear.default, arguments, test_utils=["test_schema", "test_faketensor"]
    )


def put_rows(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, launch: str, rows: tuple[Any, ...]
) -> None:
    """Puts measured rows into the table of the device's chip, for fp32."""
    from fastlora.kernels import chips, configs

    table = configs.TABLES[chips.chip_of(device).family]
    monkeypatch.setitem(table, (launch, "ieee"), (*rows, *table[launch, "ieee"]))
    # Which remembers nothing.
    monkeypatch.setattr(configs, "plan_of", configs.plan_of.__wrapped__)


def test_who_chooses(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call, else ``FASTLORA_PLAN``, else the table; a plan of other batches is passed over."""
    from fastlora.kernels.chips import Row

    x, weight = lab.rand(20, 48), lab.rand(40, 48)
    assert plans.choose_mixed_plan("auto", x, weight, 200) == "fused"
    assert plans.choose_mixed_plan("auto", lab.rand(65, 48), weight, 200) == "split"
    rows = (Row(max_m=32, max_r=128, plan="dense"), Row(plan="split"))
    put_rows(monkeypatch, x.device, "mixed_lora_linear", rows)
    found = [plans.choose_mixed_plan("auto", x, weight, r) for r in (128, 129)]
    assert found == ["dense", "split"]
    monkeypatch.setattr(plans, "_PLAN", "dense")
    assert plans.choose_mixed_plan("auto", x, weight, 1000) == "dense"
    assert plans.choose_mixed_plan("fused", x, weight, 128) == "fused"
    assert plans.choose_plan("auto", x, weight, 8) == "fused"
    monkeypatch.setattr(plans, "_PLAN", "augmented")
    assert plans.choose_mixed_plan("auto", x, weight, 128) == "dense"
    with pytest.raises(ValueError, match="plan must be one of auto, .* got 'augmented'"):
        plans.choose_mixed_plan("augmented", x, weight, 128)


def test_who_chooses_in_training(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same order; what training does not have is passed over, be it named by call or not."""
    from fastlora.kernels.chips import Row

    x, weight = lab.rand(20, 48), lab.rand(40, 48)
    choose = plans.choose_mixed_train_plan
    assert [choose(plan, x, weight, 64) for plan in ("auto", "split", "augmented")] == [
        *("fused", "split", "fused"),
    ]
    assert choose("auto", lab.rand(65, 48), weight, 64) == "split"
    rows = (Row(max_r=64, plan="split"), Row(plan="fused"))
    put_rows(monkeypatch, x.device, "mixed_lora_train_linear", rows)
    assert [choose("auto", x, weight, r) for r in (64, 65)] == ["split", "fused"]
    monkeypatch.setattr(plans, "_PLAN", "split")
    assert [choose(plan, x, weight, 65) for plan in ("auto", "fused")] == ["split", "fused"]
    monkeypatch.setattr(plans, "_PLAN", "dense")
    assert choose("auto", x, weight, 65) == "fused"


def test_what_is_refused(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many rank rows, named by the call or by the environment, and the invariant mode."""
    large = MixedProblem(lab, [0, 4], [(64, 1, 1, 1, 8)], 48, [40], torch.float32)
    message = "5 slots of rank 64, 320 rank rows; expected at most 256"
    with pytest.raises(ValueError, match=message):
        linear(large, plan="dense")
    small = MixedProblem(lab, [0, 1], [(8, 1)], 48, [40], torch.float32)
    with fastlora.batch_invariant(), pytest.raises(ImplementationError, match="'dense' cannot"):
        linear(small, plan="dense")
    monkeypatch.setattr(plans, "_PLAN", "dense")
    with pytest.raises(ValueError, match=message):
        linear(large)
    small.check(linear(small))
