"""`lora_expand`: in place, against float64; chunks of ranks, scalings, strides, one rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastlora.ops.torch import reference
from fastlora.testing import assert_within_budget

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.kernels.chips import chip_of
from fastlora.kernels.configs import KernelConfig, choose
from fastlora.kernels.lora_expand import launch_lora_expand

# Taken pairwise: rows, outputs off the tile, ranks.
SHAPES = [
    (1, 128, 8),
    (15, 33, 3),
    (16, 64, 16),
    (17, 130, 24),
    (127, 96, 64),
    (2000, 80, 1),
    (16, 20, 128),
    (33, 257, 4),
    (5, 40, 512),
]


def check(
    y: torch.Tensor,
    s: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    config: KernelConfig | None = None,
) -> None:
    """Expands into ``y`` and compares with float64."""
    rounded = lora_b.to(s.dtype)
    truth = y.double() + (s.double() * scaling.double()) @ rounded.double().t()
    same_dtype = reference.lora_expand_(y.clone(), s, rounded, scaling)
    (m, n), r = y.shape, s.shape[1]
    config = config or choose(chip_of(y.device), "lora_expand", s.dtype, m=m, n=n, r=r)
    launch_lora_expand(y, s, lora_b, scaling, config=config)
    assert_within_budget(y, same_dtype, truth, "y")


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_values(lab: Any, dtype: torch.dtype, m: int, n: int, r: int) -> None:
    y, s = lab.rand(m, n, dtype=dtype), lab.rand(m, r, dtype=dtype)
    check(y, s, lab.rand(n, r, dtype=dtype), torch.tensor([0.75], device=y.device))


def test_every_chunk_of_ranks(lab: Any) -> None:
    config = KernelConfig(block_m=16, block_n=32, block_r=16, num_warps=4)
    scaling = torch.linspace(0.1, 2.0, 50, device=lab.device)
    check(lab.rand(20, 40), lab.rand(20, 50), lab.rand(40, 50), scaling, config)


def test_scaling_per_rank_row_and_fp32_factor(lab: Any, dtype: torch.dtype) -> None:
    scaling = torch.linspace(0.1, 2.0, 24, device=lab.device)
    check(lab.rand(17, 48, dtype=dtype), lab.rand(17, 24, dtype=dtype), lab.rand(48, 24), scaling)


@pytest.mark.parametrize("layout", ["rows", "transposed", "both"])
def test_strided(lab: Any, layout: str) -> None:
    y, s, lora_b = (
        lab.strided(tensor, layout)
        for tensor in (lab.rand(19, 45), lab.rand(19, 6), lab.rand(45, 6))
    )
    check(y, s, lora_b, torch.tensor([0.75], device=y.device))


def test_writes_nothing_but_y(lab: Any) -> None:
    wide = lab.rand(19, 60)
    before = wide.clone()
    check(wide[:, 10:55], lab.rand(19, 6), lab.rand(45, 6), torch.ones(1, device=wide.device))
    assert torch.equal(wide[:, :10], before[:, :10])
    assert torch.equal(wide[:, 55:], before[:, 55:])


def test_zero_scaling_leaves_y_bit_for_bit(lab: Any, dtype: torch.dtype) -> None:
    y = lab.rand(17, 48, dtype=dtype)
    before = y.clone()
    scaling = torch.zeros(1, device=y.device)
    check(y, lab.rand(17, 8, dtype=dtype), lab.rand(48, 8, dtype=dtype), scaling)
    assert torch.equal(y, before)


def test_no_rows(lab: Any) -> None:
    check(lab.rand(0, 48), lab.rand(0, 8), lab.rand(48, 8), torch.ones(1, device=lab.device))
