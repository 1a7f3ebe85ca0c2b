"""The config tables: valid on their chips, reachable, and picked as the launch sizes ask."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from fastlora.kernels.configs import (
    MAX_SPLITS,
    Chip,
    LinearConfig,
    all_shipped,
    expand_config,
    is_valid,
    linear_config,
    shrink_config,
)
from tests.support.chips import CHIPS, H100

BF16 = torch.bfloat16


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.arch)
def test_every_choice_is_shipped_and_valid(chip: Chip) -> None:
    """Whatever the problem, the config is one that the ahead-of-time test compiled."""
    shipped = {
        (entry.dtype, entry.config) for entry in all_shipped(chip) if entry.kernel != "lora_dropout"
    }
    taken = set()
    for dtype, precision in ((BF16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")):
        for m, n, k, r in itertools.product(
            (0, 1, 16, 17, 33, 64, 65, 300, 2000, 16384), (16, 576, 1024, 4096, 14336),
            (16, 576, 4096), (1, 16, 17, 64, 100, 128, 512),
        ):  # fmt: skip
            for config in (
                replace(
                    shrink_config(chip, m, k, r, dtype, input_precision=precision),
                    splits=MAX_SPLITS,
                ),
                linear_config(chip, m, n, k, r, dtype, input_precision=precision),
                expand_config(chip, m, n, r, dtype, input_precision=precision),
            ):
                taken.add((dtype, config))
    assert taken <= shipped
    for dtype, config in shipped:
        assert is_valid(chip, config, dtype.itemsize), config
    # The rest of the table is for chips of other sizes; most of it is in use on this one.
    assert len(taken) >= 0.75 * len(shipped), shipped - taken


def test_half_types_share_their_configs() -> None:
    assert linear_config(H100, 1, 4096, 4096, 16, torch.float16) == linear_config(
        H100, 1, 4096, 4096, 16, BF16
    )


def test_decode_fills_the_chip_with_narrow_tiles() -> None:
    for n, block_n in ((1024, 16), (4096, 32), (14336, 64)):
        assert linear_config(H100, 1, n, 4096, 16, BF16).block_n == block_n


@pytest.mark.parametrize(("m", "block_m"), [(1, 16), (16, 16), (17, 32), (33, 64), (64, 64)])
def test_one_tile_covers_a_small_batch(m: int, block_m: int) -> None:
    assert linear_config(H100, m, 4096, 4096, 16, BF16).block_m == block_m
    assert shrink_config(H100, m, 4096, 16, BF16).block_m == block_m
    assert expand_config(H100, m, 4096, 16, BF16).block_m == block_m


def test_large_batches_take_large_tiles() -> None:
    config = linear_config(H100, 8192, 4096, 4096, 16, BF16)
    assert (config.block_m, config.block_n) == (128, 256)
    assert shrink_config(H100, 8192, 4096, 16, BF16).block_m == 128


def test_the_fewest_splits_that_fill_the_chip() -> None:
    assert shrink_config(H100, 1, 4096, 16, BF16).splits == MAX_SPLITS
    assert shrink_config(H100, 2048, 4096, 16, BF16).splits == 8
    assert shrink_config(H100, 8192, 4096, 16, BF16).splits == 2
    assert shrink_config(H100, 65536, 4096, 16, BF16).splits == 1
    # 256 columns are two steps of the K loop: nothing to split.
    assert shrink_config(H100, 1, 256, 16, BF16).splits == 1


def test_long_ranks_go_in_short_chunks() -> None:
    assert linear_config(H100, 1, 4096, 4096, 128, BF16).block_r == 128
    assert linear_config(H100, 1, 4096, 4096, 129, BF16).block_r == 32


def test_unknown_chip_and_dtype_are_named() -> None:
    with pytest.raises(ValueError, match="sm_70"):
        linear_config(Chip("sm_70", 80), 1, 64, 64, 8, BF16)
    with pytest.raises(TypeError, match="float64"):
        linear_config(H100, 1, 64, 64, 8, torch.float64)


def test_predicate_refuses() -> None:
    fine = LinearConfig(block_m=128, block_n=128, block_k=64, block_r=16, num_warps=8, num_stages=4)
    assert is_valid(H100, fine, 2)
    assert not is_valid(Chip("gfx942", 304), fine, 2)  # 96 KiB of buffers, 64 KiB of LDS
    assert not is_valid(H100, replace(fine, block_n=96), 2)
    assert not is_valid(H100, replace(fine, block_r=8), 2)
    assert not is_valid(H100, replace(fine, num_warps=3), 2)
