"""The tables of a mixed batch's backward: every choice compiled ahead of time, runs that fill."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastlora.kernels.configs import Chip, cdiv
from fastlora.kernels.mixed_grad_configs import (
    TRAIN_PIECE_ROWS,
    all_mixed_grad_shipped,
    mixed_grad_a_config,
    mixed_grad_b_config,
    mixed_grad_reduce_config,
    mixed_grad_x_add_config,
    mixed_grad_x_config,
    mixed_train_shrink_config,
    run_rows,
)
from tests.support.chips import CHIPS, H100

BF16 = torch.bfloat16


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.arch)
def test_every_choice_is_shipped(chip: Chip) -> None:
    """Whatever the problem, the config is one that the ahead-of-time test compiled."""
    shipped = {(entry.kernel, entry.dtype, entry.config) for entry in all_mixed_grad_shipped(chip)}
    taken = {("mixed_lora_grad_reduce", BF16, mixed_grad_reduce_config())}
    for dtype, precision in ((BF16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")):
        for rank in (1, 16, 17, 64, 200):
            given = (chip, rank, dtype)
            b = mixed_grad_b_config(*given, input_precision=precision)
            a = mixed_grad_a_config(*given, input_precision=precision)
            taken |= {("mixed_lora_grad_b", dtype, b), ("mixed_lora_grad_a", dtype, a)}
            shrink = mixed_train_shrink_config(*given, input_precision=precision)
            assert shrink.block_m == TRAIN_PIECE_ROWS
            taken.add(("mixed_lora_train_shrink", dtype, shrink))
        for m, k in itertools.product((1, 64, 65, 300, 2048, 16384), (16, 576, 4096, 14336)):
            sizes = (chip, m, k, dtype)
            x = mixed_grad_x_config(*sizes, input_precision=precision)
            add = mixed_grad_x_add_config(*sizes, input_precision=precision)
            for stem in ("mixed_lora_grad_x", "mixed_lora_train_linear"):
                taken.add((stem, dtype, x))
            for stem in ("mixed_lora_grad_x_add", "mixed_lora_train_expand"):
                taken.add((stem, dtype, add))
    assert taken == shipped


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.arch)
def test_sides_of_dots(chip: Chip) -> None:
    for entry in all_mixed_grad_shipped(chip):
        names = ("block_m", "block_n", "block_k", "block_l", "block_r")
        sides = [getattr(entry.config, n) for n in names if hasattr(entry.config, n)]
        assert all(side >= 16 and side & (side - 1) == 0 for side in sides), entry.config


@pytest.mark.parametrize("columns", [192, 576, 4096, 14336])
@pytest.mark.parametrize("m", [0, 1, 63, 130, 2048, 8192])
def test_runs_are_the_fewest_that_fill_the_chip(m: int, columns: int) -> None:
    """Whole tiles of rows; one run fewer would leave more than a quarter of the chip idle."""
    config = mixed_grad_b_config(H100, 16, BF16)
    rows = run_rows(H100, m, columns, config)
    tiles, runs = cdiv(columns, config.block_n), max(cdiv(m, rows), 1)
    assert rows % config.block_m == 0
    assert runs == 1 or 4 * (runs - 1) * tiles < 3 * H100.num_sms
    # It fills the chip to a run, or none of its runs could be two of two steps each.
    assert 4 * (runs + 1) * tiles >= 3 * H100.num_sms or rows < 4 * config.block_m
