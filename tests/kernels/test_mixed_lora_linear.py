"""`mixed_lora_linear`: values against float64, biases, strides, chunks, and rows kept apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.kernels.configs import KernelConfig
from tests.support.kernels.mixed_launches import linear
from tests.support.kernels.mixed_problem import RANKS, MixedProblem, draw_ids

# Rows, outputs, columns of x.
SHAPES = [(1, 128, 256), (15, 33, 100), (16, 64, 72), (17, 130, 65), (64, 96, 200), (150, 70, 31)]
SMALL = KernelConfig(block_m=16, block_n=32, block_k=32, block_r=32, num_warps=4, num_stages=2)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_values(lab: Any, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    problem = MixedProblem(lab, draw_ids(m, 8), [RANKS], k, [n], dtype, biased=(1, 3, 7))
    problem.check(linear(problem))


@pytest.mark.parametrize("slots", [1, 2, 64])
def test_number_of_adapters(lab: Any, dtype: torch.dtype, slots: int) -> None:
    ranks = [[RANKS[slot % 8] for slot in range(slots)]]
    problem = MixedProblem(lab, draw_ids(64, slots), ranks, 40, [48], dtype)
    problem.check(linear(problem))


@pytest.mark.parametrize("block_r", [16, 32, 64])
@pytest.mark.parametrize("splits", [1, 3, 4])
def test_every_chunk_and_plane(lab: Any, block_r: int, splits: int) -> None:
    problem = MixedProblem(
        lab, draw_ids(40, 8), [RANKS], 32, [50], torch.float32, biased=range(0, 8, 2)
    )
    config = KernelConfig(
        block_m=32, block_n=32, block_k=32, block_r=block_r, num_warps=4, num_stages=2
    )
    problem.check(linear(problem, config, splits=splits))


@pytest.mark.parametrize("ids", [[-1] * 20, [7] * 20, [6] * 20, [0, -1] * 10])
def test_plain_batches(lab: Any, dtype: torch.dtype, ids: list[int]) -> None:
    """No adapter at all, one without a part in the module, one for all rows, every other row."""
    problem = MixedProblem(lab, ids, [RANKS], 40, [36], dtype, biased=(1,))
    problem.check(linear(problem))


def test_siblings_of_different_widths(lab: Any, dtype: torch.dtype) -> None:
    ranks = (RANKS, (16, 0, 8, 1, 64, 3, 24, 128), (8, 8, 0, 0, 16, 1, 1, 0))
    problem = MixedProblem(lab, draw_ids(33, 8), ranks, 40, [64, 24, 33], dtype, biased=(2, 5))
    for g in range(3):
        problem.check(linear(problem, g=g, splits=2), g)


def test_fp32_factors(lab: Any, dtype: torch.dtype) -> None:
    problem = MixedProblem(
        lab, draw_ids(20, 8), [RANKS], 40, [36], dtype, torch.float32, biased=(0, 4)
    )
    problem.check(linear(problem))


def test_strides(lab: Any) -> None:
    for layout in ("rows", "transposed", "both"):
        problem = MixedProblem(lab, draw_ids(19, 8), [RANKS], 70, [45], torch.float32)
        y = lab.strided(lab.poisoned(19, 45, dtype=torch.float32), layout)
        problem.x = lab.strided(problem.x, layout)
        problem.weights[0] = lab.strided(problem.weights[0], layout)
        problem.biases[0] = lab.rand(90)[::2]
        problem.check(linear(problem, y=y))


def test_without_a_bias(lab: Any) -> None:
    problem = MixedProblem(lab, draw_ids(20, 8), [RANKS], 40, [36], torch.float32)
    biases, problem.biases = problem.biases, [None]
    y = linear(problem)
    problem.biases = [torch.zeros_like(biases[0])]
    problem.check(y)


def test_one_rounding(lab: Any) -> None:
    """base + delta is rounded once: fp16 makes 2048 + 1 a 2048, and 2048 + (1 + 1) a 2050."""
    problem = MixedProblem(lab, [0] * 16, [[1]], 16, [16], torch.float16)
    problem.x.zero_()
    problem.x[:, 0] = 1.0
    problem.weights[0].zero_()
    problem.weights[0][:, 0] = 2048.0
    problem.biases[0].fill_(1.0)
    problem.factors[0][0].lora_a.fill_(1.0)
    problem.factors[0][0].lora_b.fill_(1.0)
    problem.scaling.fill_(1.0)
    assert (linear(problem) == 2050).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_rows_are_kept_apart(lab: Any) -> None:
    """Whatever is not finite in one adapter's factors or in one row stays in its own rows."""
    problem = MixedProblem(
        lab, draw_ids(40, 5), [(3, 8, 24, 16, 1)], 24, [40], torch.float32, biased=(1, 2)
    )
    factors = problem.factors[0][1]
    for spoilt in (
        factors.lora_b[5, 3:4],
        factors.lora_b[0, 39:],
        factors.lora_a[7, 2:3],
        factors.lora_bias[11:12],
        problem.scaling[0, 3:4],
        problem.x[17, 4:5],
    ):
        problem.check_apart(lambda: linear(problem), spoilt)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_a_factor_past_the_range_of_fp16_stays_in_its_own_rows(lab: Any) -> None:
    problem = MixedProblem(lab, draw_ids(20, 3), [(3, 8, 16)], 24, [40], torch.float16)
    clean = linear(problem)
    problem.scaling[0, 1] = 1e6
    y = linear(problem)
    own = problem.rows_of(1)
    others = [row for row in range(20) if row not in own]
    assert torch.equal(y[others], clean[others])
    assert not y[own].isfinite().any()


def test_rows_of_an_invalid_id_are_nan(lab: Any) -> None:
    ids = draw_ids(20, 8)
    problem = MixedProblem(lab, [*ids[:5], 8, *ids[5:], -2], [RANKS], 40, [36], torch.float32)
    bad = [5, 21]
    assert problem.groups.invalid
    y = linear(problem)
    assert y[bad].isnan().all()
    y[bad] = problem.expected(0, torch.float32)[bad]
    problem.check(y)


@pytest.mark.parametrize("group_m", [1, 3])
def test_program_order_covers_every_tile(lab: Any, group_m: int) -> None:
    problem = MixedProblem(lab, draw_ids(75, 8), [RANKS], 16, [100], torch.float32)
    config = KernelConfig(
        block_m=16,
        block_n=32,
        block_k=16,
        block_r=16,
        num_warps=4,
        num_stages=2,
        group_m=group_m,
    )
    problem.check(linear(problem, config))


def test_no_rows(lab: Any) -> None:
    problem = MixedProblem(lab, [], [RANKS], 40, [36], torch.float32)
    assert linear(problem, SMALL).shape == (0, 36)
