"""Dense products of a mixed batch, a contender in ``bench/``: values, rows apart, replayed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastlora.env import triton_interpreted

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.bench.mixed_dense import dense_linear
from tests.support.bytes.byte_counter import ByteCounter
from tests.support.kernels.mixed_problem import MixedProblem, draw_ids

RANKS = (1, 3, 8, 16, 24, 5, 0)
interpreted = pytest.mark.skipif(not triton_interpreted(), reason="counts in the interpreter")


def dense(problem: MixedProblem, g: int = 0, s: torch.Tensor | None = None) -> torch.Tensor:
    """One module's y."""
    return dense_linear(
        *(problem.x, problem.weights[g], problem.biases[g], problem.route),
        *(None if s is None else s[:, g], problem.lora_a_address[g], problem.tables(g)),
        max_rank=problem.max_rank,
        factor_dtype=problem.factor_dtype,
    )


@pytest.mark.parametrize("biased", [(), (1, 6)], ids=["plain", "lora_bias"])
@pytest.mark.parametrize(("m", "n", "k"), [(0, 40, 48), (1, 64, 48), (37, 50, 100), (130, 33, 65)])
def test_values(lab: Any, dtype: torch.dtype, m: int, n: int, k: int, biased: Any) -> None:
    problem = MixedProblem(lab, draw_ids(m, 7), [RANKS], k, [n], dtype, biased=biased)
    problem.check(dense(problem))


def test_factors_wider_than_rows(lab: Any) -> None:
    """fp32 factors of fp16 rows, and invalid ids beside them."""
    problem = MixedProblem(
        lab, draw_ids(20, 7), [RANKS], 48, [40], torch.float16, factor_dtype=torch.float32
    )
    problem.check(dense(problem))
    y = dense(problem)
    problem.regroup([9, *problem.ids[1:]])
    spoilt = dense(problem)
    assert spoilt[0].isnan().all() and torch.equal(spoilt[1:], y[1:])


def test_other_layers_of_a_group_may_have_made_s(lab: Any) -> None:
    """Where they did, lora_a is not gathered again."""
    ranks = (RANKS, (8, 0, 16, 1, 24, 3, 2))
    problem = MixedProblem(lab, draw_ids(33, 7), ranks, 100, [64, 33], torch.float32, biased=(1,))
    s = problem.shared_s()
    for g in range(2):
        problem.check(dense(problem, g, s), g)
        problem.check(dense(problem, g), g)


@pytest.mark.parametrize("operand", ["x", "lora_a", "lora_b", "lora_bias"])
def test_nothing_leaks_between_rows(lab: Any, operand: str) -> None:
    """A NaN or an infinity in one adapter or one row, the adapter's in use or not."""
    problem = MixedProblem(
        lab, draw_ids(24, 4), [(8, 3, 16, 0)], 48, [40], torch.float32, biased=(1,)
    )
    spoilt = problem.x[5] if operand == "x" else getattr(problem.factors[0][1], operand)
    element = spoilt.view(-1)[spoilt.numel() // 2 :][:1]
    problem.check_apart(lambda: dense(problem), element)
    problem.regroup([0, 2, 3, -1] * 6)
    clean = dense(problem)
    if operand != "x":
        element.fill_(float("nan"))
        assert torch.equal(dense(problem), clean)


@interpreted
def test_launches_do_not_depend_on_the_mix(lab: Any) -> None:
    """The same kernels and grids from the same buffers, whoever is in the batch."""
    problem = MixedProblem(lab, [0] * 24, [RANKS], 48, [40], torch.float32, biased=(1,))
    recorded: list[Any] = []
    for ids in ([0] * 24, [-1] * 24, draw_ids(24, 7), [*range(7)] * 3 + [0, 1, 2]):
        problem.regroup(ids)
        with ByteCounter() as counter:
            y = dense(problem)
        problem.check(y)
        recorded.append({name: count.grids for name, count in counter.kernels.items()})
    assert {name: len(grids) for name, grids in recorded[0].items()} == {
        "_mixed_lora_expand_kernel": 3
    }
    assert all(launches == recorded[0] for launches in recorded)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_cuda_graph_replays_any_mix(lab: Any) -> None:
    problem = MixedProblem(lab, [0] * 24, [RANKS], 48, [40], torch.float32, biased=(1,))
    dense(problem)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dense(problem)
    for seed in range(3):
        problem.regroup(draw_ids(24, 7, seed))
        problem.x.copy_(torch.randn_like(problem.x))
        problem.scaling.uniform_()
        graph.replay()
        problem.check(y)


def test_too_many_rank_rows_raise(lab: Any) -> None:
    large = MixedProblem(lab, [0, 4], [(64, 1, 1, 1, 8)], 48, [40], torch.float32)
    message = "5 slots of rank 64 are 320 rank rows, expected at most 256"
    with pytest.raises(ValueError, match=message):
        dense(large)
