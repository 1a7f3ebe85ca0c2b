"""Every config that a launch may take, for what compiles and counts them ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastlora.kernels.chips import Chip, ConfigRow
from fastlora.kernels.config_tables import (
    ANY_RANK,
    CHUNKED,
    INVARIANT_BLOCK_R,
    MAX_GROUP_SIZE,
    MAX_RANK_ROWS,
    MAX_SPLITS,
    KernelConfig,
    config_of_row,
    kernel_of,
    table_of,
)
from fastlora.kernels.configs import (
    INVARIANT_ROWS,
    block_r_of,
    bucket_of,
    has_chunks,
    piece_rows,
)


class Shipped(NamedTuple):
    """One config that a launch may take: the launch, x's dtype, a rank that takes it."""

    kernel: str
    dtype: torch.dtype
    r: int
    config: KernelConfig


def all_shipped(chip: Chip) -> Iterator[Shipped]:
    """Yields every config that a launch may take on ``chip``, each once, with the hardest rank.

    Splits change the grid only, so the most splits of a shrink and a gradient without them stand
    for all; the largest group stands for others. A BLOCK_R that also serves as the chunk of
    larger ranks comes with such a rank.
    """
    made = []
    for (launch, kind), rows in table_of(chip).items():
        splits = MAX_SPLITS if kernel_of(launch) == "lora_shrink" else 1
        for row in (row for row in rows if row.num_warps):
            for block_r, r in _hardest_ranks(kernel_of(launch), row):
                group_size = _largest_group(row, block_r) if launch == "lora_grad_a" else 1
                config = config_of_row(chip, launch, kind, row, block_r, splits, group_size)
                made += [Shipped(launch, dtype, r, config) for dtype in _dtypes(launch, kind)]
    yield from dict.fromkeys(made)


def all_invariant_shipped(chip: Chip) -> Iterator[Shipped]:
    """Yields every config that a launch may take in the batch-invariant mode.

    Those of a single adapter are of rank 16: of other ranks they differ by a cache hint from what
    `all_shipped` yields.
    """
    for (launch, kind), rows in table_of(chip).items():
        if launch == "mixed_lora_shrink":
            rows = tuple(row for row in rows if row.block_m == piece_rows(INVARIANT_ROWS))
        elif launch.removeprefix("coded_") not in ("lora_linear", "mixed_lora_linear"):
            continue
        for row in bucket_of(INVARIANT_ROWS, rows):
            kernel, (dtype,) = kernel_of(launch), _dtypes(launch, kind)
            rank = row.blocks_r[-1] if launch == "mixed_lora_shrink" else INVARIANT_BLOCK_R
            block_r = block_r_of(kernel, row, rank)
            config = config_of_row(chip, launch, kind, row, block_r, batch_invariant=True)
            yield Shipped(launch, dtype, 64 if kernel in ANY_RANK else rank, config)


def _hardest_ranks(kernel: str, row: ConfigRow) -> Iterator[tuple[int, int]]:
    """Yields each BLOCK_R with a rank that takes it: one past all blocks for the chunk's."""
    for block_r in row.blocks_r or (0,):
        beyond = 4 * row.blocks_r[-1] if kernel in CHUNKED and has_chunks(row) else 0
        if kernel in ANY_RANK:
            yield block_r, 64
        else:
            yield (
                block_r,
                beyond if beyond and block_r == block_r_of(kernel, row, beyond) else block_r,
            )


def _largest_group(row: ConfigRow, block_r: int) -> int:
    """Returns how many group members one launch with this BLOCK_R takes at most."""
    narrowest = block_r == row.blocks_r[0]
    return MAX_GROUP_SIZE if narrowest else min(MAX_GROUP_SIZE, MAX_RANK_ROWS // block_r)


def _dtypes(launch: str, kind: str) -> tuple[torch.dtype, ...]:
    """Returns the dtypes of x that the ahead-of-time test compiles for a kind of arithmetic."""
    if kind != "any":
        return (torch.bfloat16 if kind == "half" else torch.float32,)
    # Sums of fp32 planes read no x, nor does what sorts rows.
    reads_no_x = launch in ("plane_sums", "mixed_lora_grad_reduce", "mixed_rows_sort")
    return (torch.bfloat16,) if reads_no_x else (torch.bfloat16, torch.float32)
