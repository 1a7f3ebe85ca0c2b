"""Which config a launch of a backward kernel takes: `fastlora.kernels.configs` for gradients.

`lora_grad_b` and `lora_grad_a` reduce over rows (and ds over columns): programs that share a sum
write a plane each. The choice takes, of the tiles of the row bucket that fill the chip, the one
whose planes are fewest in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from fastlora.kernels.configs import (
    Chip,
    ExpandConfig,
    KernelConfig,
    LinearConfig,
    Shipped,
    block_r_of,
    cdiv,
    chunk_r_of,
    config_of,
    fills,
    hardest_ranks,
    kind_of,
    remembered,
    tile_of_output,
)
from fastlora.kernels.grad_config_tables import (
    GRAD_A,
    GRAD_B,
    GRAD_X,
    GRAD_X_ADD,
    GradATile,
    GradBTile,
)

# Siblings of one read of x.
MAX_SIBLINGS = 4
# Their tensor cores take 64 rows at least: the columns of dy and x are more than rank rows, so they
# are the rows of a gradient's tile. Elsewhere rank rows are, and dy and x meet their dots
# untransposed: only then does Triton 3.9 copy them asynchronously there (sm_80, dy of 64 x 128:
# 15 copies of 3 stages instead of the 3 of s, and 118 registers instead of 148).
_WIDE_MMA = ("sm_90", "sm_100")
# Steps down the rows below which a split is not worth a program.
_MIN_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class GradBConfig(KernelConfig):
    """How `launch_lora_grad_b` runs; `rank_rows_first`: d_lora_b in tiles of ``[R, N]``."""

    block_m: int
    block_n: int
    block_r: int
    splits: int = 1
    rank_rows_first: bool = False
    input_precision: str = "ieee"

    def columns(self, n: int) -> int:
        """Returns how many programs share a row of dy ``[M, n]``: the planes of ds."""
        return cdiv(n, self.block_n)


@dataclass(frozen=True, kw_only=True)
class GradAConfig(KernelConfig):
    """How `launch_lora_grad_a` runs; `rank_rows_first`: d_lora_a in tiles of ``[R, K]``."""

    block_m: int
    block_k: int
    block_r: int
    siblings: int
    splits: int = 1
    rank_rows_first: bool = False
    input_precision: str = "ieee"


_GradTile = TypeVar("_GradTile", GradBTile, GradATile)


def _of_bucket(m: int, tiles: Sequence[_GradTile]) -> list[_GradTile]:
    """Returns the tiles with the fewest rows that hold m, or with the most."""
    rows = {tile.block_m for tile in tiles}
    bucket = min((block_m for block_m in rows if m <= block_m), default=max(rows))
    return [tile for tile in tiles if tile.block_m == bucket]


def _splits(chip: Chip, m: int, block_m: int, programs: int) -> int:
    """Returns the fewest splits of m rows, a power of two, that fill the chip."""
    splits = 1
    most = cdiv(m, block_m) // _MIN_STEPS
    while not fills(chip, splits * programs) and 2 * splits <= most:
        splits *= 2
    return splits


@remembered
def grad_b_config(
    chip: Chip, m: int, n: int, r: int, dtype: torch.dtype, *, input_precision: str = "ieee"
) -> GradBConfig:
    """Returns the config of `launch_lora_grad_b` for dy ``[m, n]`` and lora_b ``[n, r]``."""
    kind = kind_of(chip, dtype, input_precision)

    def made(tile: GradBTile) -> tuple[tuple[int, bool, int], GradBTile, int, int]:
        block_r = block_r_of(r, tile.blocks_r)
        columns, reads = cdiv(n, tile.block_n), cdiv(r, block_r)
        splits = _splits(chip, m, tile.block_m, columns * reads)
        planes = (columns * m if columns > 1 else 0) + (splits * n if splits > 1 else 0)
        return (reads, not fills(chip, columns * reads * splits), planes), tile, block_r, splits

    candidates = [made(tile) for tile in _of_bucket(m, GRAD_B[chip.family][kind])]
    _, tile, block_r, splits = min(candidates, key=lambda candidate: candidate[0])
    return _grad_b(chip, kind, tile, block_r, splits)


@remembered
def grad_a_config(
    chip: Chip,
    m: int,
    k: int,
    r: int,
    siblings: int,
    dtype: torch.dtype,
    *,
    input_precision: str = "ieee",
) -> GradAConfig:
    """Returns the config of `launch_lora_grad_a` for x ``[m, k]`` and the largest rank ``r``."""
    kind = kind_of(chip, dtype, input_precision)

    def made(tile: GradATile) -> tuple[tuple[int, bool, int], GradATile, int, int]:
        block_r = block_r_of(r, _blocks_of_siblings(tile, siblings))
        columns, reads = cdiv(k, tile.block_k), cdiv(r, block_r)
        splits = _splits(chip, m, tile.block_m, columns * reads)
        return (reads, not fills(chip, columns * reads * splits), splits), tile, block_r, splits

    candidates = [made(tile) for tile in _of_bucket(m, GRAD_A[chip.family][kind])]
    _, tile, block_r, splits = min(candidates, key=lambda candidate: candidate[0])
    return _grad_a(chip, kind, tile, block_r, siblings, splits)


@remembered
def grad_x_config(
    chip: Chip, m: int, k: int, r: int, dtype: torch.dtype, *, input_precision: str = "ieee"
) -> LinearConfig:
    """Returns the config of `launch_lora_linear` for dx ``[m, k]`` and lora_a ``[r, k]``."""
    kind = kind_of(chip, dtype, input_precision)
    tile = tile_of_output(chip, m, k, GRAD_X[chip.family][kind])
    return config_of(LinearConfig, chip, kind, tile, block_r=chunk_r_of(r, tile.blocks_r))


@remembered
def grad_x_add_config(
    chip: Chip, m: int, k: int, r: int, dtype: torch.dtype, *, input_precision: str = "ieee"
) -> ExpandConfig:
    """Returns the config of `launch_lora_expand` for dx ``[m, k]`` and lora_a ``[r, k]``."""
    kind = kind_of(chip, dtype, input_precision)
    tile = tile_of_output(chip, m, k, GRAD_X_ADD[chip.family][kind])
    return config_of(ExpandConfig, chip, kind, tile, block_r=chunk_r_of(r, tile.blocks_r))


def plane_sums_config() -> KernelConfig:
    """Returns the config of `launch_plane_sums`: one for every problem."""
    return KernelConfig(num_warps=4)


def is_valid_grad(chip: Chip, config: GradBConfig | GradAConfig, width: int) -> bool:
    """Whether ``config`` can run on ``chip`` with operands of ``width`` bytes an element.

    As `configs.is_valid`: sides of dots, and the buffers of the loop over rows.
    """
    columns = config.block_n if isinstance(config, GradBConfig) else config.block_k
    sides = (config.block_m, columns, config.block_r)
    stages = max(config.num_stages - 1, 1)
    buffers = stages * config.block_m * columns * width
    if isinstance(config, GradBConfig):
        buffers += columns * config.block_r * width
    powers = all(side >= 16 and side & (side - 1) == 0 for side in sides)
    return powers and config.num_warps in (1, 2, 4, 8) and buffers <= chip.shared_limit


def all_grad_shipped(chip: Chip) -> Iterator[Shipped]:
    """Yields every config that a backward launch may take on ``chip``, each once.

    Splits change the grid only, so the config without them stands for all; the most siblings stand
    for fewer. "lora_grad_x" is `launch_lora_linear` and "lora_grad_x_add" `launch_lora_expand`, as
    the gradient of x calls them.
    """
    for kind in GRAD_B[chip.family]:
        dtype = torch.bfloat16 if kind == "half" else torch.float32
        for grad_b in GRAD_B[chip.family][kind]:
            for r in grad_b.blocks_r:
                yield Shipped("lora_grad_b", dtype, r, _grad_b(chip, kind, grad_b, r, 1))
        for grad_a in GRAD_A[chip.family][kind]:
            for r in grad_a.blocks_r:
                siblings = _most_siblings(grad_a, r)
                config_a = _grad_a(chip, kind, grad_a, r, siblings, 1)
                yield Shipped("lora_grad_a", dtype, r, config_a)
        for grad_x in GRAD_X[chip.family][kind]:
            for block_r, r in hardest_ranks(grad_x.blocks_r):
                config_x = config_of(LinearConfig, chip, kind, grad_x, block_r=block_r)
                yield Shipped("lora_grad_x", dtype, r, config_x)
        for expand in GRAD_X_ADD[chip.family][kind]:
            for block_r, r in hardest_ranks(expand.blocks_r):
                config_add = config_of(ExpandConfig, chip, kind, expand, block_r=block_r)
                yield Shipped("lora_grad_x_add", dtype, r, config_add)
    yield Shipped("plane_sums", torch.bfloat16, 0, plane_sums_config())


def _blocks_of_siblings(tile: GradATile, siblings: int) -> tuple[int, ...]:
    """Returns the BLOCK_R at which a tile holds the rank rows of so many siblings."""
    fitting = tuple(block for block in tile.blocks_r if siblings * block <= tile.max_rank_rows)
    return fitting or tile.blocks_r[:1]


def _most_siblings(tile: GradATile, block_r: int) -> int:
    """Returns the most siblings that one launch with this BLOCK_R may have."""
    narrowest = block_r == tile.blocks_r[0]
    return MAX_SIBLINGS if narrowest else min(MAX_SIBLINGS, tile.max_rank_rows // block_r)


def _grad_b(chip: Chip, kind: str, tile: GradBTile, block_r: int, splits: int) -> GradBConfig:
    first = chip.family not in _WIDE_MMA
    return config_of(
        GradBConfig, chip, kind, tile, block_r=block_r, splits=splits, rank_rows_first=first
    )


def _grad_a(
    chip: Chip, kind: str, tile: GradATile, block_r: int, siblings: int, splits: int
) -> GradAConfig:
    return config_of(
        GradAConfig,
        chip,
        kind,
        tile,
        block_r=block_r,
        siblings=siblings,
        splits=splits,
        rank_rows_first=chip.family not in _WIDE_MMA,
    )
