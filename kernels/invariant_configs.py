"""Which config a launch takes in the batch-invariant mode: none of them knows the batch.

Whatever the batch, a launch takes what a batch of `INVARIANT_ROWS` rows would take outside of the
mode, so tile, instruction, splits of K and cache hints follow from N, K, rank, dtype and chip
alone. 64 rows are the fewest that Hopper's and Blackwell's matrix instructions hold: a compromise
that costs decode (tiles of 64 rows where 16 would do, so fewer programs) and prefill (64 rows where
128 or 256 columns more would reuse more). The price is unmeasured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from fastlora.kernels.configs import (
    LINEAR,
    Chip,
    LinearConfig,
    Shipped,
    ShrinkConfig,
    linear_config,
    remembered,
    shrink_config,
)
from fastlora.kernels.mixed_configs import (
    MixedLinearConfig,
    MixedShrinkConfig,
    mixed_linear_config,
    mixed_shrink_config,
    piece_rows,
)

INVARIANT_ROWS = 64
# Row tile of the shrink of a mixed batch.
INVARIANT_PIECE_ROWS = piece_rows(INVARIANT_ROWS)
# More columns than any BLOCK_R: the widest is taken.
_ALL_COLUMNS = 4096
# Rank rows of one dot in a mixed batch: a block of one adapter, never two adapters side by side.
_BLOCK_R = 16


@remembered
def invariant_shrink_config(
    chip: Chip, k: int, r: int, dtype: torch.dtype, *, input_precision: str = "ieee"
) -> ShrinkConfig:
    """Returns the config of `launch_lora_shrink` for any x ``[M, k]`` and lora_a ``[r, k]``."""
    return shrink_config(chip, INVARIANT_ROWS, k, r, dtype, input_precision=input_precision)


@remembered
def invariant_linear_config(
    chip: Chip, n: int, k: int, r: int, dtype: torch.dtype, *, input_precision: str = "ieee"
) -> LinearConfig:
    """Returns the config of `launch_lora_linear` for any x ``[M, k]`` and lora_b ``[n, r]``."""
    usual = linear_config(chip, INVARIANT_ROWS, n, k, r, dtype, input_precision=input_precision)
    return replace(usual, batch_invariant=True)


@remembered
def invariant_mixed_shrink_config(
    chip: Chip, dtype: torch.dtype, *, input_precision: str = "ieee"
) -> MixedShrinkConfig:
    """Returns the config of `launch_mixed_lora_shrink`: one BLOCK_R for all ranks and siblings."""
    usual = mixed_shrink_config(
        chip, INVARIANT_ROWS, _ALL_COLUMNS, dtype, input_precision=input_precision
    )
    return replace(usual, narrow_r=usual.block_r)


@remembered
def invariant_mixed_linear_config(
    chip: Chip, n: int, dtype: torch.dtype, *, input_precision: str = "ieee"
) -> MixedLinearConfig:
    """Returns the config of `launch_mixed_lora_linear` for any y ``[M, n]``."""
    usual = mixed_linear_config(chip, INVARIANT_ROWS, n, dtype, input_precision=input_precision)
    return replace(usual, block_r=_BLOCK_R, batch_invariant=True)


def all_invariant_shipped(chip: Chip) -> Iterator[Shipped]:
    """Yields every config that a launch may take in the mode, of a single adapter at rank 16.

    Those of other ranks differ in the mode by a cache hint from what `all_shipped` yields.
    """
    for kind in LINEAR[chip.family]:
        dtype = torch.bfloat16 if kind == "half" else torch.float32
        precision = "tf32" if kind == "tf32" else "ieee"
        shrink = invariant_mixed_shrink_config(chip, dtype, input_precision=precision)
        made = [Shipped("mixed_lora_shrink", dtype, shrink.block_r, shrink)]
        for n in (2**power for power in range(4, 20)):
            mixed = invariant_mixed_linear_config(chip, n, dtype, input_precision=precision)
            single = invariant_linear_config(chip, n, n, _BLOCK_R, dtype, input_precision=precision)
            made.append(Shipped("mixed_lora_linear", dtype, 64, mixed))
            made.append(Shipped("lora_linear", dtype, _BLOCK_R, single))
        yield from dict.fromkeys(made)
