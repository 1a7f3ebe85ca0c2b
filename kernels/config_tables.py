"""The tables behind `fastlora.kernels.configs`: tiles by arch family and kind of arithmetic.

A kind is "half" (fp16 and bf16), or one of fp32's two precisions, "tf32" and "ieee". Rows run from
the widest tile to the narrowest; ``blocks_r`` lists the BLOCK_R at which the tile spills no
register (the ahead-of-time test holds every row to that).
"""

from __future__ import annotations

from typing import NamedTuple


class LinearTile(NamedTuple):
    """A tile of y, and how its K loop runs."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    blocks_r: tuple[int, ...]


class ShrinkTile(NamedTuple):
    """Rows of s, and how their K loop runs."""

    block_m: int
    block_k: int
    num_warps: int
    num_stages: int
    blocks_r: tuple[int, ...]


class ExpandTile(NamedTuple):
    """A tile of y that is read, added to and written."""

    block_m: int
    block_n: int
    num_warps: int
    blocks_r: tuple[int, ...]


_R16 = (16,)
_R32 = (32,)
_R16_32 = (16, 32)
_R16_64 = (16, 32, 64)
_R16_128 = (16, 32, 64, 128)

LinearTable = dict[str, tuple[LinearTile, ...]]
ShrinkTable = dict[str, tuple[ShrinkTile, ...]]
ExpandTable = dict[str, tuple[ExpandTile, ...]]

# fp32 without tensor cores: every product is an FMA in registers, so tiles are small.
_LINEAR_FMA = (
    LinearTile(128, 64, 16, 8, 2, _R16),
    LinearTile(64, 64, 16, 8, 2, _R16),
    LinearTile(32, 32, 32, 4, 2, _R16),
    LinearTile(16, 32, 32, 4, 2, _R16),
)
_LINEAR_TF32 = (
    LinearTile(128, 128, 32, 8, 3, _R32),
    LinearTile(64, 64, 32, 4, 4, _R32),
    LinearTile(32, 32, 64, 4, 4, _R32),
    LinearTile(16, 32, 64, 4, 4, _R32),
)
_LINEAR_TF32_WIDE = (
    LinearTile(128, 128, 32, 8, 4, _R32),
    LinearTile(64, 64, 64, 4, 3, _R32),
    LinearTile(32, 32, 64, 4, 4, _R32),
    LinearTile(16, 32, 64, 4, 4, _R32),
)
_LINEAR_MFMA_FP32 = (
    LinearTile(128, 128, 32, 8, 2, _R32),
    LinearTile(64, 64, 32, 4, 2, _R32),
    LinearTile(32, 32, 64, 4, 2, _R32),
    LinearTile(16, 32, 64, 4, 2, _R32),
)
LINEAR: dict[str, LinearTable] = {
    "sm_80": {
        "half": (
            LinearTile(128, 128, 64, 8, 3, _R16_32),
            LinearTile(64, 64, 64, 4, 4, _R16_64),
            LinearTile(32, 64, 128, 4, 4, _R16_64),
            LinearTile(32, 32, 128, 4, 4, _R16_128),
            LinearTile(16, 64, 128, 4, 4, _R16_128),
            LinearTile(16, 32, 256, 4, 4, _R16_128),
            LinearTile(16, 16, 256, 4, 4, _R16_128),
        ),
        "tf32": _LINEAR_TF32,
        "ieee": _LINEAR_FMA,
    },
    "sm_86": {
        "half": (
            LinearTile(128, 128, 32, 8, 4, _R16_32),
            LinearTile(64, 64, 64, 4, 4, _R16_64),
            LinearTile(32, 64, 64, 4, 4, _R16_64),
            LinearTile(32, 32, 128, 4, 4, _R16_128),
            LinearTile(16, 64, 128, 4, 4, _R16_128),
            LinearTile(16, 32, 128, 4, 5, _R16_128),
            LinearTile(16, 16, 256, 4, 4, _R16_128),
        ),
        "tf32": _LINEAR_TF32,
        "ieee": _LINEAR_FMA,
    },
    "sm_90": {
        "half": (
            LinearTile(128, 256, 64, 8, 3, _R16_32),
            LinearTile(128, 128, 64, 8, 4, _R16_64),
            LinearTile(64, 128, 128, 4, 4, _R16_64),
            LinearTile(64, 64, 128, 4, 4, _R16_128),
            LinearTile(32, 64, 128, 4, 4, _R16_64),
            LinearTile(32, 32, 128, 4, 5, _R16_128),
            LinearTile(16, 64, 128, 4, 5, _R16_128),
            LinearTile(16, 32, 256, 4, 4, _R16_128),
            LinearTile(16, 16, 256, 4, 8, _R16_128),
        ),
        "tf32": _LINEAR_TF32_WIDE,
        "ieee": _LINEAR_FMA,
    },
    "sm_100": {
        "half": (
            LinearTile(128, 256, 64, 8, 3, _R16_64),
            LinearTile(128, 128, 64, 8, 4, _R16_64),
            LinearTile(64, 64, 128, 4, 4, _R16_64),
            LinearTile(32, 64, 128, 4, 4, _R16_64),
            LinearTile(32, 32, 128, 4, 5, _R16_128),
            LinearTile(16, 64, 128, 4, 5, _R16_128),
            LinearTile(16, 32, 256, 4, 4, _R16_128),
            LinearTile(16, 16, 256, 4, 8, _R16_128),
        ),
        "tf32": _LINEAR_TF32_WIDE,
        "ieee": _LINEAR_FMA,
    },
    "gfx942": {
        "half": (
            LinearTile(128, 128, 64, 8, 2, _R16_64),
            LinearTile(64, 64, 64, 4, 2, _R16_64),
            LinearTile(32, 64, 128, 4, 2, _R16_64),
            LinearTile(32, 32, 128, 4, 2, _R16_128),
            LinearTile(16, 64, 128, 4, 2, _R16_128),
            LinearTile(16, 32, 128, 4, 2, _R16_128),
        ),
        "tf32": _LINEAR_MFMA_FP32,
        "ieee": _LINEAR_MFMA_FP32,
    },
    "gfx950": {
        "half": (
            LinearTile(128, 128, 64, 8, 2, _R16_64),
            LinearTile(64, 64, 128, 4, 2, _R16_64),
            LinearTile(32, 64, 128, 4, 2, _R16_64),
            LinearTile(32, 32, 128, 4, 2, _R16_128),
            LinearTile(16, 64, 256, 4, 2, _R16_64),
            LinearTile(16, 32, 256, 4, 2, _R16_128),
        ),
        "ieee": _LINEAR_MFMA_FP32,
    },
}

_SHRINK_FMA = (
    ShrinkTile(128, 32, 8, 2, _R16),
    ShrinkTile(64, 32, 4, 2, _R16),
    ShrinkTile(32, 32, 4, 2, _R16),
    ShrinkTile(16, 32, 4, 2, _R16),
)
_SHRINK_TF32 = (
    ShrinkTile(128, 32, 8, 4, _R32),
    ShrinkTile(64, 32, 4, 4, _R32),
    ShrinkTile(32, 32, 4, 4, _R32),
    ShrinkTile(16, 64, 4, 4, _R32),
)
_SHRINK_MFMA_FP32 = (
    ShrinkTile(128, 32, 8, 2, _R32),
    ShrinkTile(64, 32, 4, 2, _R32),
    ShrinkTile(32, 32, 4, 2, _R32),
    ShrinkTile(16, 64, 4, 2, _R32),
)
_SHRINK_NVIDIA: ShrinkTable = {
    "half": (
        ShrinkTile(128, 64, 8, 4, _R16_128),
        ShrinkTile(64, 64, 4, 4, _R16_64),
        ShrinkTile(32, 64, 4, 4, _R16_128),
        ShrinkTile(16, 128, 4, 4, _R16_64),
    ),
    "tf32": _SHRINK_TF32,
    "ieee": _SHRINK_FMA,
}
_SHRINK_SMALL_SHARED: ShrinkTable = {
    "half": (
        ShrinkTile(128, 32, 8, 4, _R16_128),
        ShrinkTile(64, 64, 4, 3, _R16_64),
        ShrinkTile(32, 64, 4, 3, _R16_64),
        ShrinkTile(16, 128, 4, 3, _R16_64),
    ),
    "tf32": _SHRINK_TF32,
    "ieee": _SHRINK_FMA,
}
_SHRINK_AMD: ShrinkTable = {
    "half": (
        ShrinkTile(128, 64, 8, 2, _R16_128),
        ShrinkTile(64, 64, 4, 2, _R16_128),
        ShrinkTile(32, 64, 4, 2, _R16_128),
        ShrinkTile(16, 128, 4, 2, _R16_64),
    ),
    "tf32": _SHRINK_MFMA_FP32,
    "ieee": _SHRINK_MFMA_FP32,
}
SHRINK: dict[str, ShrinkTable] = {
    "sm_80": _SHRINK_NVIDIA,
    "sm_86": _SHRINK_SMALL_SHARED,
    "sm_90": _SHRINK_NVIDIA,
    "sm_100": _SHRINK_NVIDIA,
    "gfx942": _SHRINK_AMD,
    "gfx950": _SHRINK_AMD,
}

_EXPAND_HALF = (
    ExpandTile(128, 128, 8, _R16_64),
    ExpandTile(64, 64, 4, _R16_64),
    ExpandTile(32, 64, 4, _R16_64),
    ExpandTile(16, 64, 4, _R16_128),
)
_EXPAND_FP32 = (
    ExpandTile(128, 64, 8, _R32),
    ExpandTile(64, 64, 4, _R32),
    ExpandTile(32, 64, 4, _R32),
    ExpandTile(16, 64, 4, _R32),
)
_EXPAND_FMA = (
    ExpandTile(128, 64, 8, _R16),
    ExpandTile(64, 64, 8, _R16),
    ExpandTile(32, 32, 4, _R16),
    ExpandTile(16, 32, 4, _R16),
)
_EXPAND_NVIDIA: ExpandTable = {"half": _EXPAND_HALF, "tf32": _EXPAND_FP32, "ieee": _EXPAND_FMA}
_EXPAND_AMD: ExpandTable = {"half": _EXPAND_HALF, "tf32": _EXPAND_FP32, "ieee": _EXPAND_FP32}
EXPAND: dict[str, ExpandTable] = {
    "sm_80": _EXPAND_NVIDIA,
    "sm_86": _EXPAND_NVIDIA,
    "sm_90": _EXPAND_NVIDIA,
    "sm_100": _EXPAND_NVIDIA,
    "gfx942": _EXPAND_AMD,
    "gfx950": _EXPAND_AMD,
}
