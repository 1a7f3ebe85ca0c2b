"""`lora_shrink`: values against float64, splits, ranks, strides, and the dropout mask exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastlora.ops.philox_reference import philox_keep_mask
from fastlora.testing import assert_within_budget

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.kernels.chips import chip_of
from fastlora.kernels.configs import KernelConfig, choose
from fastlora.kernels.lora_shrink import (
    launch_lora_shrink,
    launch_lora_shrink_reduce,
)

# Taken pairwise: rows, columns off the tile, ranks.
SHAPES = [
    (1, 256, 8),
    (15, 100, 3),
    (16, 576, 16),
    (17, 72, 24),
    (127, 200, 64),
    (2000, 65, 1),
    (16, 520, 128),
    (33, 31, 4),
    (5, 96, 300),
]


def shrink(
    lab: Any,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    config: KernelConfig,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Returns s ``[M, R]``, through the planes and their reduction where the config splits."""
    m, r = x.shape[0], lora_a.shape[0]
    s = lab.poisoned(m, r, dtype=x.dtype)
    if config.splits == 1:
        launch_lora_shrink(s, x, lora_a, seed=seed, dropout_p=dropout_p, config=config)
        return s
    planes = lab.poisoned(config.splits, m, r, dtype=torch.float32)
    launch_lora_shrink(planes, x, lora_a, seed=seed, dropout_p=dropout_p, config=config)
    launch_lora_shrink_reduce(s, planes, config=config)
    return s


def assert_shrunk(s: torch.Tensor, x: torch.Tensor, lora_a: torch.Tensor) -> None:
    lora_a = lora_a.to(x.dtype)
    assert_within_budget(s, F.linear(x, lora_a), x.double() @ lora_a.double().t(), "s")


@pytest.mark.parametrize(("m", "k", "r"), SHAPES)
def test_values(lab: Any, dtype: torch.dtype, m: int, k: int, r: int) -> None:
    x, lora_a = lab.rand(m, k, dtype=dtype), lab.rand(r, k, dtype=dtype)
    config = choose(chip_of(x.device), "lora_shrink", dtype, m=m, k=k, r=r)
    assert_shrunk(shrink(lab, x, lora_a, config), x, lora_a)


@pytest.mark.parametrize("splits", [1, 2, 4, 8])
@pytest.mark.parametrize("block_r", [16, 32])
def test_every_split_and_rank_block(lab: Any, splits: int, block_r: int) -> None:
    # 5 blocks of K: with 4 and 8 splits some parts are short and some are empty.
    x, lora_a = lab.rand(40, 150), lab.rand(50, 150)
    config = KernelConfig(
        block_m=32, block_k=32, block_r=block_r, num_warps=4, num_stages=2, splits=splits
    )
    assert_shrunk(shrink(lab, x, lora_a, config), x, lora_a)


def test_fp32_factor_is_rounded_to_the_dtype_of_x(lab: Any, dtype: torch.dtype) -> None:
    x, lora_a = lab.rand(17, 136, dtype=dtype), lab.rand(8, 136)
    config = choose(chip_of(x.device), "lora_shrink", dtype, m=17, k=136, r=8)
    assert_shrunk(shrink(lab, x, lora_a, config), x, lora_a)


@pytest.mark.parametrize("layout", ["rows", "transposed", "both"])
def test_strided_inputs(lab: Any, layout: str) -> None:
    x, lora_a = lab.rand(19, 70), lab.rand(6, 70)
    config = choose(chip_of(x.device), "lora_shrink", torch.float32, m=19, k=70, r=6)
    s = shrink(lab, lab.strided(x, layout), lab.strided(lora_a, layout), config)
    assert_shrunk(s, x, lora_a)


def test_expanded_row(lab: Any) -> None:
    x, lora_a = lab.rand(1, 70).expand(20, 70), lab.rand(6, 70)
    config = choose(chip_of(x.device), "lora_shrink", torch.float32, m=20, k=70, r=6)
    assert_shrunk(shrink(lab, x, lora_a, config), x, lora_a)


def test_strided_output(lab: Any) -> None:
    x, lora_a = lab.rand(19, 64), lab.rand(6, 64)
    config = replace(
        choose(chip_of(x.device), "lora_shrink", torch.float32, m=19, k=64, r=6), splits=1
    )
    wide = lab.poisoned(19, 12, dtype=torch.float32)
    launch_lora_shrink(wide[:, ::2], x, lora_a, seed=None, dropout_p=0.0, config=config)
    assert_shrunk(wide[:, ::2], x, lora_a)
    assert wide[:, 1::2].isnan().all()


def test_no_rows(lab: Any) -> None:
    x, lora_a = lab.rand(0, 64), lab.rand(6, 64)
    config = choose(chip_of(x.device), "lora_shrink", torch.float32, m=0, k=64, r=6)
    assert shrink(lab, x, lora_a, config).shape == (0, 6)


@pytest.mark.parametrize("splits", [1, 4])
def test_dropout_is_the_written_mask(lab: Any, dtype: torch.dtype, splits: int) -> None:
    m, k, r, p, seed = 37, 150, 5, 0.3, -8_765_432_109_876_543
    x, lora_a = lab.rand(m, k, dtype=dtype), lab.rand(r, k, dtype=dtype)
    config = KernelConfig(
        block_m=16, block_k=32, block_r=16, num_warps=4, num_stages=2, splits=splits
    )
    s = shrink(lab, x, lora_a, config, torch.tensor([seed], device=x.device), p)
    kept = torch.where(philox_keep_mask(seed, m, k, p).to(x.device), x, 0)
    same_dtype = F.linear(kept / (1 - p), lora_a)
    truth = kept.double() / (1 - p) @ lora_a.double().t()
    assert_within_budget(s, same_dtype, truth, "s")


def test_mask_does_not_depend_on_the_tile(lab: Any) -> None:
    # lora_a = I: s is the dropped x itself, in which one wrong mask bit shows.
    m, k, p, seed = 35, 64, 0.5, 2**63 - 5
    x = lab.rand(m, k).abs() + 1
    expected = philox_keep_mask(seed, m, k, p)
    for block_m, block_k in ((16, 16), (64, 32), (32, 64)):
        config = KernelConfig(
            block_m=block_m, block_k=block_k, block_r=64, num_warps=4, num_stages=2
        )
        eye = torch.eye(k, device=x.device)
        s = shrink(lab, x, eye, config, torch.tensor([seed], device=x.device), p)
        assert torch.equal((s != 0).cpu(), expected)


def test_nan_of_a_dropped_element_does_not_pass(lab: Any) -> None:
    m, k, p, seed = 16, 32, 0.5, 7
    keep = philox_keep_mask(seed, m, k, p).to(lab.device)
    x = torch.where(keep, lab.rand(m, k), float("nan"))
    config = choose(chip_of(x.device), "lora_shrink", torch.float32, m=m, k=k, r=4)
    s = shrink(lab, x, lab.rand(4, k), config, torch.tensor([seed], device=x.device), p)
    assert s.isfinite().all()
