"""`mixed_lora_expand`: values against float64, in place; rows kept apart or not touched at all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.kernels.configs import chip_of  # noqa: E402
from fastlora.kernels.mixed_configs import MixedExpandConfig, mixed_expand_config  # noqa: E402
from fastlora.kernels.mixed_lora_expand import launch_mixed_lora_expand  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from mixed_problem import RANKS, MixedProblem, draw_ids  # noqa: E402

# Rows, outputs.
SHAPES = [(1, 128), (15, 33), (16, 64), (17, 130), (64, 96), (150, 70)]


def expand(
    problem: MixedProblem,
    config: MixedExpandConfig | None = None,
    splits: int = 1,
    y: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns module 0's y, from a base product and an s that are right."""
    if y is None:
        y = torch.nn.functional.linear(problem.x, problem.weights[0], problem.biases[0])
    launch_mixed_lora_expand(
        y,
        problem.shrunk(splits)[:, 0],
        *problem.route,
        *problem.tables(),
        factor_dtype=problem.factor_dtype,
        config=config or mixed_expand_config(chip_of(y.device), *y.shape, y.dtype),
    )
    return y


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_values(lab: Any, dtype: torch.dtype, m: int, n: int) -> None:
    problem = MixedProblem(lab, draw_ids(m, 8), [RANKS], 40, [n], dtype, biased=(1, 3, 7))
    problem.check(expand(problem))


@pytest.mark.parametrize("block_r", [16, 64])
@pytest.mark.parametrize("splits", [1, 4])
def test_every_chunk_and_plane(lab: Any, block_r: int, splits: int) -> None:
    ranks = [[RANKS[slot % 8] for slot in range(64)]]
    problem = MixedProblem(lab, draw_ids(64, 64), ranks, 32, [50], torch.float32, biased=(5, 9))
    config = MixedExpandConfig(block_m=32, block_n=32, block_r=block_r, num_warps=4)
    problem.check(expand(problem, config, splits))


def test_strided_y_and_fp32_factors(lab: Any, dtype: torch.dtype) -> None:
    problem = MixedProblem(lab, draw_ids(20, 8), [RANKS], 40, [36], dtype, torch.float32)
    base = torch.nn.functional.linear(problem.x, problem.weights[0], problem.biases[0])
    for layout in ("rows", "transposed", "both"):
        problem.check(expand(problem, y=lab.strided(base.clone(), layout)))


def test_rows_without_a_part_are_not_touched(lab: Any) -> None:
    """Neither rows without an adapter, nor those whose adapter leaves the module alone."""
    problem = MixedProblem(lab, draw_ids(40, 3), [(4, 0, 0)], 24, [40], torch.float32, biased=(2,))
    y = torch.zeros(40, 40, device=lab.device)
    negative_zero = torch.full_like(y, -0.0)
    expand(problem, y=negative_zero)
    untouched = [*problem.rows_of(-1), *problem.rows_of(1)]
    # A row that went through arithmetic would have lost the sign: -0 + 0 = 0.
    assert negative_zero[untouched].signbit().all()
    expand(problem, y=y)
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
        problem.check_apart(lambda: expand(problem), spoilt)


def test_rows_of_an_invalid_id_are_nan(lab: Any) -> None:
    problem = MixedProblem(lab, [0, 9, -1, 3, -7], [RANKS], 40, [36], torch.float32)
    y = expand(problem)
    assert y[[1, 4]].isnan().all()
    y[[1, 4]] = problem.expected(0, torch.float32)[[1, 4]]
    problem.check(y)


def test_no_rows(lab: Any) -> None:
    problem = MixedProblem(lab, [], [RANKS], 40, [36], torch.float32)
    assert expand(problem).shape == (0, 36)
