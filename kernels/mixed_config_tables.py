"""The tables behind `fastlora.kernels.mixed_configs`: tiles by arch family and kind of arithmetic.

Kinds as in `fastlora.kernels.config_tables`; rows run from the widest tile to the narrowest.
BLOCK_R is the columns of rank rows that one dot takes, of several adapters side by side where they
fit, so a tile has one that serves every rank. No tile spills a register (the ahead-of-time test).
"""

from __future__ import annotations

from typing import NamedTuple


class MixedLinearTile(NamedTuple):
    """A tile of y, and how the K loop runs: of the base product, or of s in `mixed_lora_add`."""

    block_m: int
    block_n: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int


class MixedShrinkTile(NamedTuple):
    """Rows of s, and how their K loop runs, with the smallest BLOCK_R that holds the columns."""

    block_m: int
    block_k: int
    num_warps: int
    num_stages: int
    blocks_r: tuple[int, ...]


class MixedExpandTile(NamedTuple):
    """A tile of y that is read, added to and written."""

    block_m: int
    block_n: int
    block_r: int
    num_warps: int


class MixedScaleTile(NamedTuple):
    """A tile of y that is read, scaled and written."""

    block_m: int
    block_n: int
    num_warps: int


MixedLinearTable = dict[str, tuple[MixedLinearTile, ...]]
MixedShrinkTable = dict[str, tuple[MixedShrinkTile, ...]]
MixedExpandTable = dict[str, tuple[MixedExpandTile, ...]]
MixedAddTable = dict[str, MixedLinearTile]

# fp32 without tensor cores: every product is an FMA in registers, so tiles are small.
_LINEAR_FMA = (
    MixedLinearTile(64, 64, 16, 16, 8, 2),
    MixedLinearTile(16, 32, 32, 16, 4, 2),
)
_LINEAR_TF32 = (
    MixedLinearTile(64, 64, 32, 16, 4, 4),
    MixedLinearTile(16, 32, 64, 32, 4, 4),
)
_LINEAR_MFMA_FP32 = (
    MixedLinearTile(64, 64, 32, 16, 4, 2),
    MixedLinearTile(16, 32, 64, 32, 4, 2),
)
_LINEAR_HOPPER = (
    MixedLinearTile(128, 128, 64, 32, 8, 4),
    MixedLinearTile(64, 128, 128, 64, 8, 4),
    MixedLinearTile(64, 64, 128, 128, 8, 4),
    MixedLinearTile(32, 64, 128, 64, 8, 4),
    MixedLinearTile(32, 32, 128, 64, 4, 5),
    MixedLinearTile(16, 64, 128, 64, 4, 5),
    MixedLinearTile(16, 32, 256, 64, 4, 4),
    MixedLinearTile(16, 16, 256, 64, 4, 8),
)
MIXED_LINEAR: dict[str, MixedLinearTable] = {
    "sm_80": {
        "half": (
            MixedLinearTile(128, 128, 64, 16, 8, 3),
            MixedLinearTile(64, 64, 64, 64, 8, 4),
            MixedLinearTile(32, 64, 128, 64, 8, 4),
            MixedLinearTile(32, 32, 128, 64, 4, 4),
            MixedLinearTile(16, 64, 128, 64, 4, 4),
            MixedLinearTile(16, 32, 256, 64, 4, 4),
            MixedLinearTile(16, 16, 256, 64, 4, 4),
        ),
        "tf32": _LINEAR_TF32,
        "ieee": _LINEAR_FMA,
    },
    "sm_86": {
        "half": (
            MixedLinearTile(128, 128, 32, 32, 8, 4),
            MixedLinearTile(64, 64, 64, 32, 8, 4),
            MixedLinearTile(32, 64, 64, 64, 8, 4),
            MixedLinearTile(32, 32, 128, 64, 4, 4),
            MixedLinearTile(16, 64, 128, 64, 4, 4),
            MixedLinearTile(16, 32, 128, 64, 4, 5),
            MixedLinearTile(16, 16, 256, 64, 4, 4),
        ),
        "tf32": _LINEAR_TF32,
        "ieee": _LINEAR_FMA,
    },
    "sm_90": {"half": _LINEAR_HOPPER, "tf32": _LINEAR_TF32, "ieee": _LINEAR_FMA},
    "sm_100": {"half": _LINEAR_HOPPER, "tf32": _LINEAR_TF32, "ieee": _LINEAR_FMA},
    "gfx942": {
        "half": (
            MixedLinearTile(128, 128, 64, 32, 8, 2),
            MixedLinearTile(64, 64, 64, 64, 4, 2),
            MixedLinearTile(32, 64, 128, 64, 4, 2),
            MixedLinearTile(32, 32, 128, 64, 4, 2),
            MixedLinearTile(16, 64, 128, 64, 4, 2),
            MixedLinearTile(16, 32, 128, 64, 4, 2),
        ),
        "tf32": _LINEAR_MFMA_FP32,
        "ieee": _LINEAR_MFMA_FP32,
    },
    "gfx950": {
        "half": (
            MixedLinearTile(128, 128, 64, 32, 8, 2),
            MixedLinearTile(64, 64, 128, 64, 4, 2),
            MixedLinearTile(32, 64, 128, 64, 4, 2),
            MixedLinearTile(32, 32, 128, 64, 4, 2),
            MixedLinearTile(16, 64, 256, 64, 4, 2),
            MixedLinearTile(16, 32, 256, 64, 4, 2),
        ),
        "ieee": _LINEAR_MFMA_FP32,
    },
}

_R16 = (16,)
_R16_OR_64 = (16, 64)
_SHRINK_FMA = (
    MixedShrinkTile(128, 32, 8, 2, _R16),
    MixedShrinkTile(64, 32, 4, 2, _R16),
    MixedShrinkTile(16, 32, 4, 2, _R16),
)
_SHRINK_TF32 = (
    MixedShrinkTile(128, 32, 8, 4, _R16),
    MixedShrinkTile(64, 32, 4, 4, _R16),
    MixedShrinkTile(16, 64, 4, 4, _R16),
)
_SHRINK_MFMA_FP32 = (
    MixedShrinkTile(128, 32, 8, 2, _R16),
    MixedShrinkTile(64, 32, 4, 2, _R16),
    MixedShrinkTile(16, 64, 4, 2, _R16),
)
_SHRINK_NVIDIA: MixedShrinkTable = {
    "half": (
        MixedShrinkTile(128, 64, 8, 4, _R16_OR_64),
        MixedShrinkTile(64, 64, 4, 4, _R16_OR_64),
        MixedShrinkTile(16, 128, 4, 4, _R16_OR_64),
    ),
    "tf32": _SHRINK_TF32,
    "ieee": _SHRINK_FMA,
}
_SHRINK_SMALL_SHARED: MixedShrinkTable = {
    "half": (
        MixedShrinkTile(128, 32, 8, 4, _R16_OR_64),
        MixedShrinkTile(64, 64, 4, 3, _R16_OR_64),
        MixedShrinkTile(16, 128, 4, 3, _R16_OR_64),
    ),
    "tf32": _SHRINK_TF32,
    "ieee": _SHRINK_FMA,
}
_SHRINK_AMD: MixedShrinkTable = {
    "half": (
        MixedShrinkTile(128, 64, 8, 2, _R16_OR_64),
        MixedShrinkTile(64, 64, 4, 2, _R16_OR_64),
        MixedShrinkTile(16, 128, 4, 2, _R16_OR_64),
    ),
    "tf32": _SHRINK_MFMA_FP32,
    "ieee": _SHRINK_MFMA_FP32,
}
MIXED_SHRINK: dict[str, MixedShrinkTable] = {
    "sm_80": _SHRINK_NVIDIA,
    "sm_86": _SHRINK_SMALL_SHARED,
    "sm_90": _SHRINK_NVIDIA,
    "sm_100": _SHRINK_NVIDIA,
    "gfx942": _SHRINK_AMD,
    "gfx950": _SHRINK_AMD,
}

_EXPAND_HALF = (
    MixedExpandTile(128, 128, 16, 8),
    MixedExpandTile(64, 64, 32, 8),
    MixedExpandTile(32, 64, 32, 4),
    MixedExpandTile(16, 64, 64, 4),
)
_EXPAND_FP32 = (
    MixedExpandTile(64, 64, 16, 8),
    MixedExpandTile(16, 64, 16, 4),
)
_EXPAND_FMA = (
    MixedExpandTile(64, 64, 16, 8),
    MixedExpandTile(16, 32, 16, 4),
)
_EXPAND_NVIDIA: MixedExpandTable = {
    "half": _EXPAND_HALF,
    "tf32": _EXPAND_FP32,
    "ieee": _EXPAND_FMA,
}
_EXPAND_AMD: MixedExpandTable = {
    "half": _EXPAND_HALF,
    "tf32": _EXPAND_FP32,
    "ieee": _EXPAND_FP32,
}
MIXED_EXPAND: dict[str, MixedExpandTable] = {
    "sm_80": _EXPAND_NVIDIA,
    "sm_86": _EXPAND_NVIDIA,
    "sm_90": _EXPAND_NVIDIA,
    "sm_100": _EXPAND_NVIDIA,
    "gfx942": _EXPAND_AMD,
    "gfx950": _EXPAND_AMD,
}

_ADD_NVIDIA: MixedAddTable = {
    "half": MixedLinearTile(16, 128, 128, 32, 4, 4),
    "tf32": MixedLinearTile(16, 64, 64, 16, 4, 3),
    "ieee": MixedLinearTile(16, 32, 32, 16, 4, 2),
}
_ADD_SMALL_SHARED = {**_ADD_NVIDIA, "half": MixedLinearTile(16, 128, 128, 32, 4, 3)}
_ADD_AMD: MixedAddTable = {
    "half": MixedLinearTile(16, 128, 128, 32, 4, 2),
    "tf32": MixedLinearTile(16, 64, 64, 16, 4, 2),
    "ieee": MixedLinearTile(16, 64, 64, 16, 4, 2),
}
MIXED_ADD: dict[str, MixedAddTable] = {
    "sm_80": _ADD_NVIDIA,
    "sm_86": _ADD_SMALL_SHARED,
    "sm_90": _ADD_NVIDIA,
    "sm_100": _ADD_NVIDIA,
    "gfx942": _ADD_AMD,
    "gfx950": _ADD_AMD,
}

# No dot: one tile a piece for every chip and dtype, 32 elements a thread of 32 lanes.
MIXED_SCALE = (
    MixedScaleTile(128, 64, 8),
    MixedScaleTile(64, 128, 8),
    MixedScaleTile(16, 256, 4),
)
