"""`mixed_lora_expand`: values against float64, in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.kernels.configs import KernelConfig
from tests.support.kernels.mixed_launches import expand
from tests.support.kernels.mixed_problem import RANKS, MixedProblem, draw_ids

# Rows, outputs.
SHAPES = [(1, 128), (15, 33), (16, 64), (17, 130), (64, 96), (150, 70)]


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_values(lab: Any, dtype: torch.dtype, m: int, n: int) -> None:
    problem = MixedProblem(lab, draw_ids(m, 8), [RANKS], 40, [n], dtype, biased=(1, 3, 7))
    problem.check(expand(problem))


@pytest.mark.parametrize("block_r", [16, 64])
@pytest.mark.parametrize("splits", [1, 4])
def test_every_chunk_and_plane(lab: Any, block_r: int, splits: int) -> None:
    ranks = [[RANKS[slot % 8] for slot in range(64)]]
    problem = MixedProblem(lab, draw_ids(64, 64), ranks, 32, [50], torch.float32, biased=(5, 9))
    config = KernelConfig(block_m=32, block_n=32, block_r=block_r, num_warps=4)
    problem.check(expand(problem, config, splits))
