"""What holds for every kernel that adds into y: layouts; rows kept apart or not touched at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.support.kernels.mixed_launches import add, expand
from tests.support.kernels.mixed_problem import RANKS, MixedProblem, draw_ids

Update = Callable[..., torch.Tensor]


@pytest.fixture(params=[add, expand], ids=["add", "expand"])
def update(request: pytest.FixtureRequest) -> Update:
    """Launches one of the kernels."""
    launch: Update = request.param
    return launch


def test_strides_and_fp32_factors(lab: Any, update: Update, dtype: torch.dtype) -> None:
    problem = MixedProblem(lab, draw_ids(20, 8), [RANKS], 40, [36], dtype, torch.float32)
    base = torch.nn.functional.linear(problem.x, problem.weights[0], problem.biases[0])
    x = problem.x
    for layout in ("rows", "transposed", "both"):
        problem.x = lab.strided(x, layout)
        problem.check(update(problem, y=lab.strided(base.clone(), layout)))


def test_rows_without_a_part_are_not_touched(lab: Any, update: Update) -> None:
    """Neither rows without an adapter, nor those whose adapter leaves the module alone."""
    problem = MixedProblem(lab, draw_ids(40, 3), [(4, 0, 0)], 24, [40], torch.float32, biased=(2,))
    y = torch.zeros(40, 40, device=lab.device)
    negative_zero = torch.full_like(y, -0.0)
    update(problem, y=negative_zero)
    untouched = [*problem.rows_of(-1), *problem.rows_of(1)]
    # A row that went through arithmetic would have lost the sign: -0 + 0 = 0.
    assert negative_zero[untouched].signbit().all()
    update(problem, y=y)
    assert (y[problem.rows_of(0)] != 0).all() and (y[problem.rows_of(2)] != 0).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_rows_are_kept_apart(lab: Any, update: Update) -> None:
    problem = MixedProblem(
        lab, draw_ids(40, 5), [(3, 8, 24, 16, 1)], 24, [40], torch.float32, biased=(1, 2)
    )
    factors = problem.factors[0][1]
    for spoilt in (
        factors.lora_b[5, 3:4],
        factors.lora_a[7, 2:3],
        factors.lora_bias[11:12],
        problem.x[problem.rows_of(2)[0], 4:5],
    ):
        problem.check_apart(lambda: update(problem), spoilt)


def test_rows_of_an_invalid_id_are_nan(lab: Any, update: Update) -> None:
    problem = MixedProblem(lab, [0, 9, -1, 3, -7], [RANKS], 40, [36], torch.float32)
    y = update(problem)
    assert y[[1, 4]].isnan().all()
    y[[1, 4]] = problem.expected(0, torch.float32)[[1, 4]]
    problem.check(y)


def test_no_rows(lab: Any, update: Update) -> None:
    problem = MixedProblem(lab, [], [RANKS], 40, [36], torch.float32)
    assert update(problem).shape == (0, 36)
