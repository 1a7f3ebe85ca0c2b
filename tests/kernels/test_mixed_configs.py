"""The config tables for mixed batches: every choice compiled ahead of time, none by the mix."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastlora.kernels.configs import Chip
from fastlora.kernels.mixed_configs import (
    all_mixed_shipped,
    mixed_add_config,
    mixed_dora_scale_config,
    mixed_expand_config,
    mixed_linear_config,
    mixed_shrink_config,
    piece_rows,
)
from tests.support.chips import CHIPS, H100

BF16 = torch.bfloat16


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.arch)
def test_every_choice_is_shipped(chip: Chip) -> None:
    """Whatever the problem, the config is one that the ahead-of-time test compiled."""
    shipped = {(entry.kernel, entry.dtype, entry.config) for entry in all_mixed_shipped(chip)}
    taken = set()
    for dtype, precision in ((BF16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")):
        for m, n, columns in itertools.product(
            (0, 1, 16, 17, 33, 64, 65, 128, 129, 300, 2048, 2049, 16384),
            (16, 576, 1024, 4096, 14336),
            (1, 16, 17, 48, 64, 192, 1536),
        ):
            shrink = mixed_shrink_config(chip, m, columns, dtype, input_precision=precision)
            assert shrink.block_m == piece_rows(m)
            linear = mixed_linear_config(chip, m, n, dtype, input_precision=precision)
            expand = mixed_expand_config(chip, m, n, dtype, input_precision=precision)
            scale = mixed_dora_scale_config(m)
            assert scale.block_m == piece_rows(m)
            taken |= {
                ("mixed_dora_scale", dtype, scale),
                ("mixed_lora_shrink", dtype, shrink),
                ("mixed_lora_linear", dtype, linear),
                ("mixed_lora_expand", dtype, expand),
            }
        add = mixed_add_config(chip, dtype, input_precision=precision)
        assert add.block_m == piece_rows(64)
        taken.add(("mixed_lora_add", dtype, add))
    assert taken <= shipped
    # The rest of the table is for chips of other sizes; most of it is in use on this one.
    assert len(taken) >= 0.75 * len(shipped), shipped - taken


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.arch)
def test_sides_of_dots(chip: Chip) -> None:
    """Powers of two from 16 up; BLOCK_R is whole blocks of columns of one adapter."""
    for entry in all_mixed_shipped(chip):
        config = entry.config
        sides = [
            getattr(config, name)
            for name in ("block_m", "block_n", "block_k", "block_r", "narrow_r")
            if hasattr(config, name)
        ]
        assert all(side >= 16 and side & (side - 1) == 0 for side in sides), config


def test_few_columns_take_a_narrow_block() -> None:
    assert mixed_shrink_config(H100, 16, 16, BF16).block_r == 16
    wide = mixed_shrink_config(H100, 16, 48, BF16)
    assert (wide.block_r, wide.narrow_r) == (64, 16)


def test_pieces_are_small_against_the_batch() -> None:
    rows = [piece_rows(m) for m in (1, 64, 128, 129, 2048, 2049)]
    assert rows == [16, 16, 16, 64, 64, 128]


@pytest.mark.parametrize(("m", "block_m"), [(1, 16), (16, 16), (17, 32), (33, 64), (64, 64)])
def test_one_tile_covers_a_small_batch(m: int, block_m: int) -> None:
    assert mixed_linear_config(H100, m, 4096, BF16).block_m == block_m
    assert mixed_expand_config(H100, m, 4096, BF16).block_m == block_m
