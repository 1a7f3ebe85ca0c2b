"""`mixed_lora_shrink`: values against float64, splits, siblings, and what stays unwritten."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.kernels.configs import KernelConfig
from tests.support.kernels.mixed_launches import check_shrunk, shrink_into
from tests.support.kernels.mixed_problem import RANKS, MixedProblem, draw_ids

# Rows, columns of x, ranks of each module.
ONE = (RANKS,)
THREE = (RANKS, (16, 0, 8, 1, 64, 3, 24, 128), (8, 8, 0, 0, 16, 1, 1, 0))
SHAPES = [(1, 256, ONE), (15, 100, THREE), (17, 72, ONE), (64, 65, THREE), (150, 200, THREE)]


def shrink(
    problem: MixedProblem, splits: int = 1, config: KernelConfig | None = None
) -> torch.Tensor:
    """Returns s ``[splits, G, M, R]`` over NaN."""
    columns = -(-problem.max_rank // 16) * 16
    s = problem.lab.poisoned(splits, len(problem.ns), problem.m, columns, dtype=torch.float32)
    shrink_into(problem, s, config)
    return s


@pytest.mark.parametrize(("m", "k", "ranks"), SHAPES)
def test_values(lab: Any, dtype: torch.dtype, m: int, k: int, ranks: Any) -> None:
    problem = MixedProblem(lab, draw_ids(m, 8), ranks, k, [8] * len(ranks), dtype)
    check_shrunk(problem, shrink(problem))


@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("block_r", [16, 64])
def test_every_split_and_rank_block(lab: Any, splits: int, block_r: int) -> None:
    # 3 blocks of K: with 2 splits one is short, with 4 one is empty.
    problem = MixedProblem(lab, draw_ids(40, 8), THREE, 90, [8] * 3, torch.float32)
    config = KernelConfig(
        block_m=16,
        block_k=32,
        block_r=block_r,
        narrow_r=16,
        num_warps=4,
        num_stages=2,
    )
    check_shrunk(problem, shrink(problem, splits, config))


def test_fp32_factors_are_rounded_to_the_dtype_of_x(lab: Any, dtype: torch.dtype) -> None:
    problem = MixedProblem(lab, draw_ids(20, 8), ONE, 72, [8], dtype, torch.float32)
    for image in problem.images:
        image += 1e-5 * torch.randn_like(image)
    check_shrunk(problem, shrink(problem))


@pytest.mark.parametrize("layout", ["rows", "transposed", "both"])
def test_strided_x(lab: Any, layout: str) -> None:
    problem = MixedProblem(lab, draw_ids(20, 8), ONE, 72, [8], torch.float32)
    problem.x = lab.strided(problem.x, layout)
    check_shrunk(problem, shrink(problem))


@pytest.mark.parametrize("slots", [1, 64])
def test_number_of_adapters(lab: Any, slots: int) -> None:
    ranks = [[RANKS[slot % 8] for slot in range(slots)]]
    problem = MixedProblem(lab, draw_ids(70, slots), ranks, 40, [8], torch.float32)
    check_shrunk(problem, shrink(problem))


def test_a_spoilt_factor_stays_in_its_own_columns(lab: Any) -> None:
    """NaN in one rank row of one adapter's lora_a reaches that column of its own rows alone."""
    problem = MixedProblem(lab, draw_ids(40, 8), THREE, 72, [8] * 3, torch.float32)
    clean = shrink(problem)
    problem.factors[1][2].lora_a[5, 3] = float("nan")
    s = shrink(problem)
    own = problem.positions_of(2)
    changed = s.isnan() & ~clean.isnan()
    assert changed[0, 1, own, 5].all()
    assert int(changed.sum()) == len(own)
    written = ~s.isnan()
    assert torch.equal(s[written], clean[written])


def test_no_rows(lab: Any) -> None:
    problem = MixedProblem(lab, [], ONE, 72, [8], torch.float32)
    assert shrink(problem).shape == (1, 1, 0, 128)


@pytest.mark.parametrize("block_r", [16, 64])
def test_a_rank_larger_than_s_stays_within_it(lab: Any, block_r: int) -> None:
    """As under a graph captured before a larger adapter came: its first columns, nothing beyond."""
    problem = MixedProblem(
        lab, draw_ids(40, 3), ((8, 40, 3), (64, 4, 24)), 72, [8] * 2, torch.float32
    )
    config = KernelConfig(
        block_m=16, block_k=32, block_r=block_r, narrow_r=16, num_warps=4, num_stages=2
    )
    whole = shrink(problem, 1, config)
    width = 16
    around = lab.poisoned(1, 2, problem.m, 80, dtype=torch.float32)
    shrink_into(problem, around[..., :width], config)
    assert around[..., width:].isnan().all()
    assert torch.equal(around[..., :width].nan_to_num(7.0), whole[..., :width].nan_to_num(7.0))
