"""The backward's config tables: valid on their chips, reachable, and of the fewest planes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.kernels.configs import Chip, is_valid
from fastlora.kernels.grad_config_tables import GRAD_A
from fastlora.kernels.grad_configs import (
    MAX_SIBLINGS,
    GradAConfig,
    GradBConfig,
    all_grad_shipped,
    grad_a_config,
    grad_b_config,
    grad_x_add_config,
    grad_x_config,
    is_valid_grad,
)
from tests.support.chips import CHIPS, H100

BF16 = torch.bfloat16


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.arch)
def test_every_choice_is_shipped_and_valid(chip: Chip) -> None:
    """Whatever the problem, the config is one that the ahead-of-time test compiled."""
    shipped = {(entry.kernel, entry.dtype, entry.config) for entry in all_grad_shipped(chip)}
    most = {c.block_r: c.siblings for _, dtype, c in shipped if isinstance(c, GradAConfig)}
    assert most
    taken = set()
    for dtype, precision in ((BF16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")):
        options = {"input_precision": precision}
        for m, n, r in itertools.product(
            (0, 1, 17, 64, 65, 300, 2000, 16384), (16, 576, 1024, 4096, 14336), (1, 17, 65, 512)
        ):
            grad_b = grad_b_config(chip, m, n, r, dtype, **options)
            taken.add(("lora_grad_b", dtype, replace(grad_b, splits=1)))
            grad_x = grad_x_config(chip, m, n, r, dtype, **options)
            taken.add(("lora_grad_x", dtype, grad_x))
            add = grad_x_add_config(chip, m, n, r, dtype, **options)
            taken.add(("lora_grad_x_add", dtype, add))
            for siblings in range(1, MAX_SIBLINGS + 1):
                grad_a = grad_a_config(chip, m, n, r, siblings, dtype, **options)
                assert grad_a.siblings == siblings
                compiled = next(
                    c.siblings
                    for _, kind, c in shipped
                    if isinstance(c, GradAConfig)
                    and kind == dtype
                    and replace(c, siblings=siblings) == replace(grad_a, splits=1)
                )
                assert siblings <= compiled
                taken.add(("lora_grad_a", dtype, replace(grad_a, splits=1, siblings=compiled)))
    assert taken <= shipped
    for kernel, dtype, config in shipped:
        if isinstance(config, (GradAConfig, GradBConfig)):
            assert is_valid_grad(chip, config, dtype.itemsize), config
        elif kernel != "plane_sums":
            assert is_valid(chip, config, dtype.itemsize), config
    # The rest of the table is for chips of other sizes; most of it is in use on this one.
    assert len(taken) >= 0.75 * (len(shipped) - 1), shipped - taken


@pytest.mark.parametrize(
    ("m", "n"), [(2048, 2048), (1024, 1024), (1024, 4096), (8192, 4096), (8192, 1024), (512, 14336)]
)
def test_grad_b_fills_the_chip_with_few_planes(m: int, n: int) -> None:
    """Planes of both kinds take at most half more than the fewest bytes of any filling grid."""
    config = grad_b_config(H100, m, n, 16, BF16)
    columns, splits = config.columns(n), config.splits
    assert 4 * columns * splits >= 3 * H100.num_sms
    fewest = min(
        q * m + p * n for q in range(1, 133) for p in range(1, 133) if 4 * q * p >= 3 * 132
    )
    assert columns * m + splits * n <= 1.5 * fewest, (columns, splits)


def test_grad_b_takes_wide_tiles_where_rows_abound() -> None:
    config = grad_b_config(H100, 16384, 4096, 16, BF16)
    assert (config.block_n, config.splits) == (256, 8)
    assert grad_b_config(H100, 64, 4096, 16, BF16).splits == 1


def test_grad_a_has_the_fewest_splits_that_fill_the_chip() -> None:
    assert grad_a_config(H100, 2048, 2048, 16, 1, BF16).splits == 4
    assert grad_a_config(H100, 2048, 14336, 16, 1, BF16).splits == 1
    # 64 rows are two steps: nothing to split.
    assert grad_a_config(H100, 64, 2048, 16, 1, BF16).splits == 1


@pytest.mark.parametrize(("siblings", "r", "block_r"), [(1, 64, 64), (3, 64, 64), (4, 64, 32)])
def test_siblings_share_the_rank_rows_of_a_tile(siblings: int, r: int, block_r: int) -> None:
    assert grad_a_config(H100, 2048, 2048, r, siblings, BF16).block_r == block_r
    (tile,) = GRAD_A["sm_90"]["half"]
    assert siblings * block_r <= tile.max_rank_rows


def test_unknown_chip_and_dtype_are_named() -> None:
    with pytest.raises(ValueError, match="sm_70"):
        grad_b_config(Chip("sm_70", 80), 1, 64, 8, BF16)
    with pytest.raises(TypeError, match="float64"):
        grad_a_config(H100, 1, 64, 8, 1, torch.float64)


def test_predicate_refuses() -> None:
    fine = GradBConfig(block_m=64, block_n=256, block_r=64, num_warps=8, num_stages=3)
    assert is_valid_grad(H100, fine, 2)
    assert not is_valid_grad(Chip("sm_86", 84), replace(fine, num_stages=4), 2)
    assert not is_valid_grad(H100, replace(fine, block_n=96), 2)
    assert not is_valid_grad(H100, replace(fine, block_r=8), 2)
    assert not is_valid_grad(H100, replace(fine, num_warps=3), 2)
