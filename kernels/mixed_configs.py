"""Which config a launch for mixed batches takes; see `fastlora.kernels.configs`.

Nothing here depends on the mix: grids and configs follow from the batch's rows, the module's sizes
and the pool's largest rank, so that one CUDA graph replays any mix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastlora.kernels.configs import (
    Chip,
    ExpandConfig,
    KernelConfig,
    LinearConfig,
    Shipped,
    block_r_of,
    config_of,
    kind_of,
    remembered,
    tile_of_output,
)
from fastlora.kernels.mixed_config_tables import (
    MIXED_ADD,
    MIXED_EXPAND,
    MIXED_LINEAR,
    MIXED_SCALE,
    MIXED_SHRINK,
    MixedShrinkTile,
)


@dataclass(frozen=True, kw_only=True)
class MixedShrinkConfig(KernelConfig):
    """How `launch_mixed_lora_shrink` runs: with ``narrow_r`` columns where they suffice."""

    block_m: int
    block_k: int
    block_r: int
    narrow_r: int
    launch_dependents: bool = False
    input_precision: str = "ieee"


@dataclass(frozen=True, kw_only=True)
class MixedLinearConfig(LinearConfig):
    """How `launch_mixed_lora_linear` runs."""


@dataclass(frozen=True, kw_only=True)
class MixedExpandConfig(ExpandConfig):
    """How `launch_mixed_lora_expand` runs."""


@dataclass(frozen=True, kw_only=True)
class MixedAddConfig(KernelConfig):
    """How `launch_mixed_lora_add` runs."""

    block_m: int
    block_n: int
    block_k: int
    block_r: int
    input_precision: str = "ieee"


@dataclass(frozen=True, kw_only=True)
class MixedScaleConfig(KernelConfig):
    """How `launch_mixed_dora_scale` runs."""

    block_m: int
    block_n: int


def piece_rows(m: int) -> int:
    """Returns the row tile of the kernels that work by pieces, for a batch of ``m`` rows.

    Small against the batch, since a piece holds rows of one adapter only.
    """
    if m <= 128:
        return 16
    return 64 if m <= 2048 else 128


@remembered
def mixed_shrink_config(
    chip: Chip, m: int, columns: int, dtype: torch.dtype, *, input_precision: str = "ieee"
) -> MixedShrinkConfig:
    """Returns the config of `launch_mixed_lora_shrink` for x ``[m, K]``.

    ``columns`` are the most rank rows that an adapter may have in the launch's modules together,
    ``input_precision``, "ieee" or "tf32", matters for fp32 only.
    """
    kind = kind_of(chip, dtype, input_precision)
    rows = piece_rows(m)
    tile = next(tile for tile in MIXED_SHRINK[chip.family][kind] if tile.block_m == rows)
    return shrink_of_tile(chip, kind, tile, block_r_of(columns, tile.blocks_r))


@remembered
def mixed_linear_config(
    chip: Chip, m: int, n: int, dtype: torch.dtype, *, input_precision: str = "ieee"
) -> MixedLinearConfig:
    """Returns the config of `launch_mixed_lora_linear` for y ``[m, n]``."""
    kind = kind_of(chip, dtype, input_precision)
    tile = tile_of_output(chip, m, n, MIXED_LINEAR[chip.family][kind])
    return config_of(MixedLinearConfig, chip, kind, tile)


@remembered
def mixed_expand_config(
    chip: Chip, m: int, n: int, dtype: torch.dtype, *, input_precision: str = "ieee"
) -> MixedExpandConfig:
    """Returns the config of `launch_mixed_lora_expand` for y ``[m, n]``."""
    kind = kind_of(chip, dtype, input_precision)
    tile = tile_of_output(chip, m, n, MIXED_EXPAND[chip.family][kind])
    return config_of(MixedExpandConfig, chip, kind, tile)


@remembered
def mixed_add_config(
    chip: Chip, dtype: torch.dtype, *, input_precision: str = "ieee"
) -> MixedAddConfig:
    """Returns the config of `launch_mixed_lora_add`, one for every problem of up to 128 rows."""
    kind = kind_of(chip, dtype, input_precision)
    return config_of(MixedAddConfig, chip, kind, MIXED_ADD[chip.family][kind])


@remembered
def mixed_dora_scale_config(m: int) -> MixedScaleConfig:
    """Returns the config of `launch_mixed_dora_scale` for y ``[m, N]``, on any chip."""
    tile = next(tile for tile in MIXED_SCALE if tile.block_m == piece_rows(m))
    return MixedScaleConfig(**tile._asdict())


def all_mixed_shipped(chip: Chip) -> Iterator[Shipped]:
    """Yields every config that a launch for a mixed batch may take on ``chip``, each once."""
    family = chip.family
    for kind in MIXED_LINEAR[family]:
        dtype = torch.bfloat16 if kind == "half" else torch.float32
        for shrink in MIXED_SHRINK[family][kind]:
            for block_r in shrink.blocks_r:
                config = shrink_of_tile(chip, kind, shrink, block_r)
                yield Shipped("mixed_lora_shrink", dtype, block_r, config)
        for linear in MIXED_LINEAR[family][kind]:
            config_l = config_of(MixedLinearConfig, chip, kind, linear)
            yield Shipped("mixed_lora_linear", dtype, 64, config_l)
        for expand in MIXED_EXPAND[family][kind]:
            config_e = config_of(MixedExpandConfig, chip, kind, expand)
            yield Shipped("mixed_lora_expand", dtype, 64, config_e)
        config_a = config_of(MixedAddConfig, chip, kind, MIXED_ADD[family][kind])
        yield Shipped("mixed_lora_add", dtype, 64, config_a)
    for dtype in (torch.bfloat16, torch.float32):
        for scale in MIXED_SCALE:
            yield Shipped("mixed_dora_scale", dtype, 0, MixedScaleConfig(**scale._asdict()))


def shrink_of_tile(chip: Chip, kind: str, tile: MixedShrinkTile, block_r: int) -> MixedShrinkConfig:
    """Returns the shrink's config with so many columns at a time, or a quarter of them."""
    return config_of(
        MixedShrinkConfig,
        chip,
        kind,
        tile,
        block_r=block_r,
        narrow_r=max(16, block_r // 4),
        launch_dependents=chip.has_pdl,
    )
