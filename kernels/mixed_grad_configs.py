"""Which config a launch takes that trains a mixed batch; see `fastlora.kernels.mixed_configs`.

Nothing here depends on the mix. Kernels that sum over rows work on runs of so many sorted positions
as give the fewest planes that fill the chip. The forward has tables of its own, too: dropout, and
factors read as parameters lie, take registers, and training has many rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastlora.kernels.configs import (
    Chip,
    KernelConfig,
    Shipped,
    block_r_of,
    cdiv,
    config_of,
    kind_of,
    remembered,
    tile_of_output,
)
from fastlora.kernels.mixed_config_tables import (
    MixedExpandTile,
    MixedLinearTile,
    MixedShrinkTile,
)
from fastlora.kernels.mixed_configs import (
    MixedExpandConfig,
    MixedLinearConfig,
    MixedShrinkConfig,
    shrink_of_tile,
)

# Row tile of the forward's shrink.
TRAIN_PIECE_ROWS = 64

# Steps down the rows below which a run is not worth a program.
_MIN_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class MixedGradBConfig(KernelConfig):
    """How `launch_mixed_lora_grad_b` runs."""

    block_m: int
    block_n: int
    block_r: int
    rank_rows_first: bool
    input_precision: str = "ieee"


@dataclass(frozen=True, kw_only=True)
class MixedGradAConfig(KernelConfig):
    """How `launch_mixed_lora_grad_a` runs."""

    block_m: int
    block_k: int
    block_r: int
    rank_rows_first: bool
    input_precision: str = "ieee"


@dataclass(frozen=True, kw_only=True)
class MixedGradReduceConfig(KernelConfig):
    """How `launch_mixed_lora_grad_reduce` runs."""

    block_m: int
    block_l: int
    block_r: int


class MixedGradTile(NamedTuple):
    """A tile of dy or x: rows of a step, columns of a program, and the BLOCK_R there are."""

    block_m: int
    columns: int
    num_warps: int
    num_stages: int
    blocks_r: tuple[int, ...]


class MixedGradTiles(NamedTuple):
    """The tiles of one kind of arithmetic.

    Attributes:
        rows: Of `mixed_lora_grad_b` and `mixed_lora_grad_a`.
        shrink: Of `mixed_lora_shrink`.
        x: Of `mixed_lora_linear`, for y and for dx, from the widest to the narrowest.
        x_add: Of `mixed_lora_expand`, for y and for dx.
    """

    rows: MixedGradTile
    shrink: MixedShrinkTile
    x: tuple[MixedLinearTile, ...]
    x_add: tuple[MixedExpandTile, ...]


_FMA = MixedGradTiles(
    MixedGradTile(32, 32, 4, 2, (16,)),
    MixedShrinkTile(64, 32, 4, 2, (16,)),
    (MixedLinearTile(64, 64, 16, 16, 8, 2),),
    (MixedExpandTile(64, 64, 16, 8),),
)
_TF32 = MixedGradTiles(
    MixedGradTile(64, 64, 4, 3, (32,)),
    MixedShrinkTile(64, 32, 4, 4, (16,)),
    (MixedLinearTile(64, 64, 32, 16, 4, 3),),
    (MixedExpandTile(64, 64, 16, 8),),
)
_MFMA_FP32 = MixedGradTiles(
    MixedGradTile(64, 64, 4, 2, (32,)),
    MixedShrinkTile(64, 32, 4, 2, (16,)),
    (MixedLinearTile(64, 64, 32, 16, 4, 2),),
    (MixedExpandTile(64, 64, 16, 8),),
)
_ADD_HALF = (MixedExpandTile(128, 128, 16, 8), MixedExpandTile(64, 64, 32, 8))
_X_HALF = (MixedLinearTile(128, 128, 32, 16, 8, 4), MixedLinearTile(64, 64, 64, 32, 8, 4))
_AMPERE = {
    "half": MixedGradTiles(
        MixedGradTile(64, 128, 8, 3, (16, 64)),
        MixedShrinkTile(64, 64, 8, 3, (16, 64)),
        _X_HALF,
        _ADD_HALF,
    ),
    "tf32": _TF32,
    "ieee": _FMA,
}
_HOPPER = {
    "half": MixedGradTiles(
        MixedGradTile(64, 128, 4, 3, (16, 64)),
        MixedShrinkTile(64, 64, 4, 4, (16, 64)),
        _X_HALF,
        _ADD_HALF,
    ),
    "tf32": _TF32,
    "ieee": _FMA,
}
_AMD = {
    "half": MixedGradTiles(
        MixedGradTile(64, 128, 4, 2, (16, 64)),
        MixedShrinkTile(64, 64, 4, 2, (16, 64)),
        (MixedLinearTile(128, 128, 64, 16, 8, 2), MixedLinearTile(64, 64, 64, 32, 4, 2)),
        _ADD_HALF,
    ),
    "tf32": _MFMA_FP32,
    "ieee": _MFMA_FP32,
}
MIXED_GRAD: dict[str, dict[str, MixedGradTiles]] = {
    "sm_80": _AMPERE,
    "sm_86": _AMPERE,
    "sm_90": _HOPPER,
    "sm_100": _HOPPER,
    "gfx942": _AMD,
    "gfx950": {kind: _AMD[kind] for kind in ("half", "ieee")},
}


@remembered
def mixed_train_shrink_config(
    chip: Chip, max_rank: int, dtype: torch.dtype, *, input_precision: str = "ieee"
) -> MixedShrinkConfig:
    """Returns the config of `launch_mixed_lora_shrink` in training, for any number of rows.

    ``input_precision``, "ieee" or "tf32", matters for fp32 only.
    """
    kind = kind_of(chip, dtype, input_precision)
    tile = MIXED_GRAD[chip.family][kind].shrink
    return shrink_of_tile(chip, kind, tile, block_r_of(max_rank, tile.blocks_r))


@remembered
def mixed_grad_b_config(
    chip: Chip, max_rank: int, dtype: torch.dtype, *, input_precision: str = "ieee"
) -> MixedGradBConfig:
    """Returns the config of `launch_mixed_lora_grad_b` for any number of rows."""
    kind = kind_of(chip, dtype, input_precision)
    tile = MIXED_GRAD[chip.family][kind].rows
    return _grad_b(chip, kind, tile, block_r_of(max_rank, tile.blocks_r))


@remembered
def mixed_grad_a_config(
    chip: Chip, max_columns: int, dtype: torch.dtype, *, input_precision: str = "ieee"
) -> MixedGradAConfig:
    """Returns the config of `launch_mixed_lora_grad_a` for any number of rows.

    ``max_columns`` are the most rank rows that an adapter may have in the launch's modules
    together.
    """
    kind = kind_of(chip, dtype, input_precision)
    tile = MIXED_GRAD[chip.family][kind].rows
    return _grad_a(chip, kind, tile, block_r_of(max_columns, tile.blocks_r))


@remembered
def mixed_grad_x_config(
    chip: Chip, m: int, k: int, dtype: torch.dtype, *, input_precision: str = "ieee"
) -> MixedLinearConfig:
    """Returns the config of `launch_mixed_lora_linear` for dx, or y, ``[m, k]``."""
    kind = kind_of(chip, dtype, input_precision)
    tile = tile_of_output(chip, m, k, MIXED_GRAD[chip.family][kind].x)
    return config_of(MixedLinearConfig, chip, kind, tile)


@remembered
def mixed_grad_x_add_config(
    chip: Chip, m: int, k: int, dtype: torch.dtype, *, input_precision: str = "ieee"
) -> MixedExpandConfig:
    """Returns the config of `launch_mixed_lora_expand` for dx, or y, ``[m, k]``."""
    kind = kind_of(chip, dtype, input_precision)
    tile = tile_of_output(chip, m, k, MIXED_GRAD[chip.family][kind].x_add)
    return config_of(MixedExpandConfig, chip, kind, tile)


def mixed_grad_reduce_config() -> MixedGradReduceConfig:
    """Returns the config of `launch_mixed_lora_grad_reduce`: one for every problem."""
    return MixedGradReduceConfig(block_m=32, block_l=64, block_r=16, num_warps=4)


def run_rows(chip: Chip, m: int, columns: int, config: MixedGradBConfig | MixedGradAConfig) -> int:
    """Returns the positions of a run: a multiple of the tile's rows, as many as fill the chip.

    Args:
        chip: Where the launch runs.
        m: Rows of the batch.
        columns: Of dy or x.
        config: Of the launch.
    """
    width = config.block_n if isinstance(config, MixedGradBConfig) else config.block_k
    # Three in four of the chip's processors, as a tile's choice asks for.
    wanted = cdiv(3 * chip.num_sms, 4 * max(cdiv(columns, width), 1))
    # Also of symbolic sizes: a compiled graph serves any number of rows.
    steps = torch.sym_max(cdiv(m, config.block_m), 1)
    runs = torch.sym_max(torch.sym_min(wanted, steps // _MIN_STEPS), 1)
    return cdiv(steps, runs) * config.block_m


def all_mixed_grad_shipped(chip: Chip) -> Iterator[Shipped]:
    """Yields every config that a launch of training may take on ``chip``, each once.

    "mixed_lora_train_shrink" and so on are the launches of the forward's kernels as training makes
    them; "mixed_lora_grad_x" is `launch_mixed_lora_linear` and "mixed_lora_grad_x_add"
    `launch_mixed_lora_expand`, as the gradient of x calls them.
    """
    for kind, tiles in MIXED_GRAD[chip.family].items():
        dtype = torch.bfloat16 if kind == "half" else torch.float32
        for block_r in tiles.rows.blocks_r:
            config_b = _grad_b(chip, kind, tiles.rows, block_r)
            yield Shipped("mixed_lora_grad_b", dtype, block_r, config_b)
            config_a = _grad_a(chip, kind, tiles.rows, block_r)
            yield Shipped("mixed_lora_grad_a", dtype, block_r, config_a)
        for block_r in tiles.shrink.blocks_r:
            config_s = shrink_of_tile(chip, kind, tiles.shrink, block_r)
            yield Shipped("mixed_lora_train_shrink", dtype, block_r, config_s)
        for tile in tiles.x:
            config_x = config_of(MixedLinearConfig, chip, kind, tile)
            for stem in ("mixed_lora_grad_x", "mixed_lora_train_linear"):
                yield Shipped(stem, dtype, 64, config_x)
        for tile_add in tiles.x_add:
            config_add = config_of(MixedExpandConfig, chip, kind, tile_add)
            for stem in ("mixed_lora_grad_x_add", "mixed_lora_train_expand"):
                yield Shipped(stem, dtype, 64, config_add)
    yield Shipped("mixed_lora_grad_reduce", torch.bfloat16, 64, mixed_grad_reduce_config())


def _rank_rows_first(chip: Chip, kind: str) -> bool:
    """Whether tensor cores take 16 rows: all but Hopper's and Blackwell's, and FMAs."""
    return kind == "half" and chip.family not in ("sm_90", "sm_100")


def _grad_b(chip: Chip, kind: str, tile: MixedGradTile, block_r: int) -> MixedGradBConfig:
    first = _rank_rows_first(chip, kind)
    return config_of(
        MixedGradBConfig,
        chip,
        kind,
        tile,
        block_n=tile.columns,
        block_r=block_r,
        rank_rows_first=first,
    )


def _grad_a(chip: Chip, kind: str, tile: MixedGradTile, block_r: int) -> MixedGradAConfig:
    first = _rank_rows_first(chip, kind)
    return config_of(
        MixedGradAConfig,
        chip,
        kind,
        tile,
        block_k=tile.columns,
        block_r=block_r,
        rank_rows_first=first,
    )
