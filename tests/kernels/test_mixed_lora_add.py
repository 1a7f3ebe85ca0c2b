"""`mixed_lora_add`: values against float64, in place; rows kept apart or not touched at all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.kernels.configs import chip_of  # noqa: E402
from fastlora.kernels.mixed_configs import MixedAddConfig, mixed_add_config  # noqa: E402
from fastlora.kernels.mixed_lora_add import launch_mixed_lora_add  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from mixed_problem import RANKS, MixedProblem, draw_ids  # noqa: E402

# Rows, outputs, columns of x.
SHAPES = [(1, 128, 256), (15, 33, 100), (16, 64, 72), (17, 130, 65), (64, 96, 200)]


def add(
    problem: MixedProblem, config: MixedAddConfig | None = None, y: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns module 0's y, from a base product that is right."""
    if y is None:
        y = torch.nn.functional.linear(problem.x, problem.weights[0], problem.biases[0])
    config = config or mixed_add_config(chip_of(y.device), y.dtype)
    launch_mixed_lora_add(
        y,
        problem.x,
        *problem.route,
        problem.groups.pieces(config.block_m),
        problem.lora_a_address[0],
        *problem.tables(),
        factor_dtype=problem.factor_dtype,
        config=config,
    )
    return y


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_values(lab: Any, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    problem = MixedProblem(lab, draw_ids(m, 8), [RANKS], k, [n], dtype, biased=(1, 3, 7))
    problem.check(add(problem))


@pytest.mark.parametrize("slots", [1, 64])
def test_number_of_adapters(lab: Any, slots: int) -> None:
    ranks = [[RANKS[slot % 8] for slot in range(slots)]]
    problem = MixedProblem(lab, draw_ids(64, slots), ranks, 40, [48], torch.float32)
    problem.check(add(problem))


def test_every_chunk(lab: Any) -> None:
    problem = MixedProblem(lab, draw_ids(40, 8), [RANKS], 50, [50], torch.float32, biased=(0,))
    config = MixedAddConfig(
        block_m=16, block_n=32, block_k=16, block_r=16, num_warps=4, num_stages=2
    )
    problem.check(add(problem, config))


def test_strides_and_fp32_factors(lab: Any, dtype: torch.dtype) -> None:
    problem = MixedProblem(lab, draw_ids(20, 8), [RANKS], 40, [36], dtype, torch.float32)
    base = torch.nn.functional.linear(problem.x, problem.weights[0], problem.biases[0])
    x = problem.x
    for layout in ("rows", "transposed", "both"):
        problem.x = lab.strided(x, layout)
        problem.check(add(problem, y=lab.strided(base.clone(), layout)))


def test_rows_without_a_part_are_not_touched(lab: Any) -> None:
    problem = MixedProblem(lab, draw_ids(40, 3), [(4, 0, 0)], 24, [40], torch.float32, biased=(2,))
    y = torch.zeros(40, 40, device=lab.device)
    negative_zero = torch.full_like(y, -0.0)
    add(problem, y=negative_zero)
    untouched = [*problem.rows_of(-1), *problem.rows_of(1)]
    # A row that went through arithmetic would have lost the sign: -0 + 0 = 0.
    assert negative_zero[untouched].signbit().all()
    add(problem, y=y)
    assert (y[problem.rows_of(0)] != 0).all() and (y[problem.rows_of(2)] != 0).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_rows_are_kept_apart(lab: Any) -> None:
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
        problem.check_apart(lambda: add(problem), spoilt)


def test_rows_of_an_invalid_id_are_nan(lab: Any) -> None:
    problem = MixedProblem(lab, [0, 9, -1, 3, -7], [RANKS], 40, [36], torch.float32)
    y = add(problem)
    assert y[[1, 4]].isnan().all()
    y[[1, 4]] = problem.expected(0, torch.float32)[[1, 4]]
    problem.check(y)


def test_no_rows(lab: Any) -> None:
    problem = MixedProblem(lab, [], [RANKS], 40, [36], torch.float32)
    assert add(problem).shape == (0, 36)
