"""`mixed_lora_add`: values against float64, in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.kernels.configs import KernelConfig
from tests.support.kernels.mixed_launches import add
from tests.support.kernels.mixed_problem import RANKS, MixedProblem, draw_ids

# Rows, outputs, columns of x.
SHAPES = [(1, 128, 256), (15, 33, 100), (16, 64, 72), (17, 130, 65), (64, 96, 200)]


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
    config = KernelConfig(block_m=16, block_n=32, block_k=16, block_r=16, num_warps=4, num_stages=2)
    problem.check(add(problem, config))
