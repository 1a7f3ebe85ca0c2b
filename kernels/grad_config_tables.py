"""The tables behind `fastlora.kernels.grad_configs`: tiles by arch family and kind of arithmetic.

Kinds and ``blocks_r`` as in `fastlora.kernels.config_tables`; rows run from the widest tile to the
narrowest. These kernels are bound by memory: a BLOCK_R that holds a rank and more costs FLOPs that
nobody waits for, and rank rows that are not there are not read.
"""

from __future__ import annotations

from typing import NamedTuple

from fastlora.kernels.config_tables import ExpandTile, LinearTile


class GradBTile(NamedTuple):
    """A tile of dy: rows of one step, columns of one program."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    blocks_r: tuple[int, ...]


class GradATile(NamedTuple):
    """A tile of x: rows of one step, columns of one program; rank rows of all its siblings."""

    block_m: int
    block_k: int
    num_warps: int
    num_stages: int
    blocks_r: tuple[int, ...]
    max_rank_rows: int


_R16 = (16,)
_R32 = (32,)
_R16_32 = (16, 32)
_R16_32_64 = (16, 32, 64)
_R16_64 = (16, 64)
_R16_64_128 = (16, 64, 128)

GradBTable = dict[str, tuple[GradBTile, ...]]
GradATable = dict[str, tuple[GradATile, ...]]
GradXTable = dict[str, tuple[LinearTile, ...]]
GradXAddTable = dict[str, tuple[ExpandTile, ...]]

_GRAD_B_FMA = (GradBTile(32, 32, 4, 2, _R16),)
_GRAD_B_TF32 = (GradBTile(64, 64, 4, 3, _R32),)
_GRAD_B_MFMA_FP32 = (GradBTile(64, 64, 4, 2, _R32),)
_GRAD_B_WIDE_MMA: GradBTable = {
    "half": (
        GradBTile(64, 256, 8, 3, _R16_64),
        GradBTile(64, 128, 8, 3, _R16_64_128),
        GradBTile(64, 64, 4, 4, _R16_64),
    ),
    "tf32": _GRAD_B_TF32,
    "ieee": _GRAD_B_FMA,
}
_GRAD_B_MMA: GradBTable = {
    "half": (
        GradBTile(64, 128, 8, 3, _R16_64),
        GradBTile(64, 64, 4, 4, _R16_64),
    ),
    "tf32": _GRAD_B_TF32,
    "ieee": _GRAD_B_FMA,
}
_GRAD_B_AMD: GradBTable = {
    "half": (
        GradBTile(64, 128, 4, 2, _R16_64),
        GradBTile(64, 64, 4, 2, _R16_64),
    ),
    "tf32": _GRAD_B_MFMA_FP32,
    "ieee": _GRAD_B_MFMA_FP32,
}
GRAD_B: dict[str, GradBTable] = {
    "sm_80": _GRAD_B_MMA,
    "sm_86": _GRAD_B_MMA,
    "sm_90": _GRAD_B_WIDE_MMA,
    "sm_100": _GRAD_B_WIDE_MMA,
    "gfx942": _GRAD_B_AMD,
    "gfx950": {"half": _GRAD_B_AMD["half"], "ieee": _GRAD_B_MFMA_FP32},
}

_GRAD_A_FMA = (GradATile(32, 32, 4, 2, _R16, 64),)
_GRAD_A_TF32 = (GradATile(32, 64, 4, 4, _R32, 128),)
_GRAD_A_MFMA_FP32 = (GradATile(32, 64, 4, 2, _R32, 128),)
_GRAD_A_NVIDIA: GradATable = {
    "half": (GradATile(32, 64, 4, 5, _R16_32_64, 192),),
    "tf32": _GRAD_A_TF32,
    "ieee": _GRAD_A_FMA,
}
# Eight warps: at four, four siblings of rank 32 spill 48 bytes on sm_120.
_GRAD_A_SMALL_SHARED: GradATable = {
    "half": (GradATile(32, 64, 8, 5, _R16_32_64, 192),),
    "tf32": _GRAD_A_TF32,
    "ieee": _GRAD_A_FMA,
}
# Unmeasured: about 8 TB/s want twice the bytes on their way that H100's 3.35 do.
_GRAD_A_SM_100: GradATable = {
    "half": (GradATile(64, 64, 8, 4, _R16_32_64, 192),),
    "tf32": _GRAD_A_TF32,
    "ieee": _GRAD_A_FMA,
}
_GRAD_A_AMD: GradATable = {
    "half": (GradATile(64, 64, 4, 2, _R16_32_64, 192),),
    "tf32": _GRAD_A_MFMA_FP32,
    "ieee": _GRAD_A_MFMA_FP32,
}
GRAD_A: dict[str, GradATable] = {
    "sm_80": _GRAD_A_NVIDIA,
    "sm_86": _GRAD_A_SMALL_SHARED,
    "sm_90": _GRAD_A_NVIDIA,
    "sm_100": _GRAD_A_SM_100,
    "gfx942": _GRAD_A_AMD,
    "gfx950": {"half": _GRAD_A_AMD["half"], "ieee": _GRAD_A_MFMA_FP32},
}

# Tiles of dx as tiles of y in `LINEAR`; under dropout two accumulators live in the epilogue.
_GRAD_X_FMA = (LinearTile(32, 32, 32, 4, 2, _R16),)
_GRAD_X_TF32 = (LinearTile(64, 64, 32, 4, 4, _R32),)
_GRAD_X_MFMA_FP32 = (LinearTile(64, 64, 32, 4, 2, _R32),)
_GRAD_X_AMD: GradXTable = {
    "half": (
        LinearTile(128, 128, 64, 8, 2, _R16_32),
        LinearTile(64, 64, 64, 4, 2, _R16_64),
    ),
    "tf32": _GRAD_X_MFMA_FP32,
    "ieee": _GRAD_X_MFMA_FP32,
}
_GRAD_X_NVIDIA: GradXTable = {
    "half": (
        LinearTile(128, 128, 64, 8, 3, _R16_32),
        LinearTile(64, 64, 64, 4, 4, _R16_64),
    ),
    "tf32": _GRAD_X_TF32,
    "ieee": _GRAD_X_FMA,
}
_GRAD_X_SMALL_SHARED: GradXTable = {
    "half": (
        LinearTile(128, 128, 32, 8, 4, _R16_32),
        LinearTile(64, 64, 64, 4, 4, _R16_64),
    ),
    "tf32": _GRAD_X_TF32,
    "ieee": _GRAD_X_FMA,
}
GRAD_X: dict[str, GradXTable] = {
    "sm_80": _GRAD_X_NVIDIA,
    "sm_86": _GRAD_X_SMALL_SHARED,
    "sm_90": _GRAD_X_NVIDIA,
    "sm_100": _GRAD_X_NVIDIA,
    "gfx942": _GRAD_X_AMD,
    "gfx950": {"half": _GRAD_X_AMD["half"], "ieee": _GRAD_X_MFMA_FP32},
}

# The update behind a GEMM of the library's, which is for many rows.
_GRAD_X_ADD_HALF = (
    ExpandTile(128, 128, 8, _R16_32),
    ExpandTile(64, 64, 4, _R16_64),
)
_GRAD_X_ADD_FP32 = (ExpandTile(64, 64, 4, _R32),)
_GRAD_X_ADD_FMA = (ExpandTile(64, 64, 8, _R16),)
_GRAD_X_ADD_NVIDIA: GradXAddTable = {
    "half": _GRAD_X_ADD_HALF,
    "tf32": _GRAD_X_ADD_FP32,
    "ieee": _GRAD_X_ADD_FMA,
}
_GRAD_X_ADD_AMD: GradXAddTable = {
    "half": _GRAD_X_ADD_HALF,
    "tf32": _GRAD_X_ADD_FP32,
    "ieee": _GRAD_X_ADD_FP32,
}
GRAD_X_ADD: dict[str, GradXAddTable] = {
    "sm_80": _GRAD_X_ADD_NVIDIA,
    "sm_86": _GRAD_X_ADD_NVIDIA,
    "sm_90": _GRAD_X_ADD_NVIDIA,
    "sm_100": _GRAD_X_ADD_NVIDIA,
    "gfx942": _GRAD_X_ADD_AMD,
    "gfx950": {"half": _GRAD_X_ADD_HALF, "ieee": _GRAD_X_ADD_FP32},
}
