"""Which config a launch takes: by chip, dtype, row bucket, problem and rank.

The `*_config` functions take the widest tile of the row bucket that still fills the chip and add
what depends on the problem: BLOCK_R, and the splits of the K axis. Everything here is arithmetic on
the host, done inside the opaque ops: no kernel, no tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from fastlora.env import triton_interpreted
from fastlora.kernels.config_tables import (
    EXPAND,
    LINEAR,
    SHRINK,
    ShrinkTile,
)

# Ranks past a tile's largest BLOCK_R go in chunks of at most this many: the loop over chunks hoists
# its addresses into registers.
_MAX_CHUNK_R = 32
# Each plane is read back by every column of linear's tiles, so the shrink splits no further.
MAX_SPLITS = 8
# Steps of the K loop below which a split is not worth a program.
_MIN_STEPS = 2

_KIB = 1024
# Shared memory (LDS) that one program may use.
_SHARED_LIMITS = {
    "sm_80": 163 * _KIB,
    "sm_86": 99 * _KIB,
    "sm_90": 227 * _KIB,
    "sm_100": 227 * _KIB,
    "gfx942": 64 * _KIB,
    "gfx950": 160 * _KIB,
}
_FAMILIES = {
    "interpreter": "gfx942",  # the widest fp32 tiles: the interpreter pays by the operation
    "sm_80": "sm_80",
    "sm_86": "sm_86",
    "sm_87": "sm_80",
    "sm_89": "sm_86",
    "sm_90": "sm_90",
    "sm_100": "sm_100",
    "sm_103": "sm_100",
    "sm_120": "sm_86",
    "sm_121": "sm_86",
    "gfx942": "gfx942",
    "gfx950": "gfx950",
}
_PDL_ARCHS = ("sm_90", "sm_100", "sm_103", "sm_120", "sm_121")


class Chip(NamedTuple):
    """What a config depends on: the arch, as in "sm_90" or "gfx942", and the processors it has."""

    arch: str
    num_sms: int

    @property
    def is_supported(self) -> bool:
        """Whether the tables cover this chip."""
        return self.arch in _FAMILIES

    @property
    def family(self) -> str:
        """The arch whose tables this chip uses; `ValueError` for a chip that has none."""
        if not self.is_supported:
            raise ValueError(f"no configs for {self.arch!r}, expected one of {sorted(_FAMILIES)}")
        return _FAMILIES[self.arch]

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory that one program may use."""
        return _SHARED_LIMITS[self.family]

    @property
    def max_registers(self) -> int | None:
        """Registers a thread may use; None on AMD, where the compiler has no such option.

        Left alone, ptxas stores a register or two to memory to reach the next step of occupancy
        (triton 3.9: 8 or 16 bytes in 12 of 580 kernels; in none once the limit is said).
        """
        return None if self.family.startswith("gfx") else 255

    @property
    def has_pdl(self) -> bool:
        """Whether a kernel may be launched as a programmatic dependent of the one before."""
        return self.arch in _PDL_ARCHS


def chip_of(device: torch.device) -> Chip:
    """Returns the chip behind a CUDA or ROCm device, or the interpreter's stand-in."""
    if triton_interpreted():
        return Chip("interpreter", 4)
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _gpu(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return Chip(arch, properties.multi_processor_count)


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """What every kernel's config has: the options that Triton takes beside the arguments."""

    num_warps: int
    num_stages: int = 1
    max_registers: int | None = None

    @property
    def launch_options(self) -> dict[str, int]:
        """The keyword arguments of a launch that are no kernel arguments."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options


@dataclass(frozen=True, kw_only=True)
class ShrinkConfig(KernelConfig):
    """How `launch_lora_shrink` and `launch_lora_shrink_reduce` run."""

    block_m: int
    block_k: int
    block_r: int
    splits: int = 1
    launch_dependents: bool = False
    input_precision: str = "ieee"


@dataclass(frozen=True, kw_only=True)
class LinearConfig(KernelConfig):
    """How `launch_lora_linear` runs."""

    block_m: int
    block_n: int
    block_k: int
    block_r: int
    group_m: int = 8
    input_precision: str = "ieee"
    batch_invariant: bool = False


@dataclass(frozen=True, kw_only=True)
class ExpandConfig(KernelConfig):
    """How `launch_lora_expand` runs."""

    block_m: int
    block_n: int
    block_r: int
    input_precision: str = "ieee"


@dataclass(frozen=True, kw_only=True)
class DropoutConfig(KernelConfig):
    """How `launch_lora_dropout` runs."""

    block_m: int
    block_k: int


class Shipped(NamedTuple):
    """One config that a launch may take: the kernel's stem, x's dtype, a rank that takes it."""

    kernel: str
    dtype: torch.dtype
    r: int
    config: KernelConfig


# Each choice is a pure function of its arguments, asked for on every launch.
remembered = functools.lru_cache(maxsize=4096)


@remembered
def shrink_config(
    chip: Chip, m: int, k: int, r: int, dtype: torch.dtype, *, input_precision: str = "ieee"
) -> ShrinkConfig:
    """Returns the config of `launch_lora_shrink` for x ``[m, k]`` and lora_a ``[r, k]``.

    ``input_precision``, "ieee" or "tf32", matters for fp32 only. Split into the fewest parts that
    fill the chip.
    """
    kind = kind_of(chip, dtype, input_precision)

    def programs(tile: ShrinkTile) -> int:
        return cdiv(m, tile.block_m) * cdiv(r, block_r_of(r, tile.blocks_r))

    tile = widest_that_fills(chip, m, SHRINK[chip.family][kind], lambda t: MAX_SPLITS * programs(t))
    most = min(MAX_SPLITS, cdiv(k, tile.block_k) // _MIN_STEPS)
    splits = 1
    while not fills(chip, splits * programs(tile)) and 2 * splits <= most:
        splits *= 2
    return _shrink(chip, kind, tile, block_r_of(r, tile.blocks_r), splits)


@remembered
def linear_config(
    chip: Chip, m: int, n: int, k: int, r: int, dtype: torch.dtype, *, input_precision: str = "ieee"
) -> LinearConfig:
    """Returns the config of `launch_lora_linear` for x ``[m, k]`` and lora_b ``[n, r]``."""
    kind = kind_of(chip, dtype, input_precision)
    tile = tile_of_output(chip, m, n, LINEAR[chip.family][kind])
    return config_of(LinearConfig, chip, kind, tile, block_r=chunk_r_of(r, tile.blocks_r))


@remembered
def expand_config(
    chip: Chip, m: int, n: int, r: int, dtype: torch.dtype, *, input_precision: str = "ieee"
) -> ExpandConfig:
    """Returns the config of `launch_lora_expand` for y ``[m, n]`` and lora_b ``[n, r]``."""
    kind = kind_of(chip, dtype, input_precision)
    tile = tile_of_output(chip, m, n, EXPAND[chip.family][kind])
    return config_of(ExpandConfig, chip, kind, tile, block_r=chunk_r_of(r, tile.blocks_r))


def dropout_config(chip: Chip, m: int, k: int, dtype: torch.dtype) -> DropoutConfig:
    """Returns the config of `launch_lora_dropout` for x ``[m, k]``: one for every problem."""
    return DropoutConfig(block_m=8, block_k=256, num_warps=4)


def is_valid(chip: Chip, config: ShrinkConfig | LinearConfig | ExpandConfig, width: int) -> bool:
    """Whether ``config`` can run on ``chip`` with operands of ``width`` bytes an element.

    Sides of a dot are powers of two from 16 up, and the buffers of the K loop fit the chip's shared
    memory, a factor counted as the fp32 that it may be. What the compiler adds to them is known
    only after it ran: the ahead-of-time test compares that with the limit.
    """
    rows = config.block_m
    sides = [rows, config.block_r]
    buffers = 0
    if isinstance(config, ExpandConfig):
        sides.append(config.block_n)
    else:
        sides.append(config.block_k)
        # At least: Ampere and AMD keep the stage in use in registers, Hopper does not.
        stages = max(config.num_stages - 1, 1)
        per_column = rows * width
        if isinstance(config, LinearConfig):
            sides.append(config.block_n)
            per_column += config.block_n * width
        else:
            per_column += config.block_r * 4
        buffers = stages * config.block_k * per_column
    powers = all(side >= 16 and side & (side - 1) == 0 for side in sides)
    return powers and config.num_warps in (1, 2, 4, 8) and buffers <= chip.shared_limit


def all_shipped(chip: Chip) -> Iterator[Shipped]:
    """Yields every config that a launch may take on ``chip``, each once, with the hardest rank.

    Of a split shrink the most splits stand for all: the kernel is the same. A BLOCK_R that also
    serves as the chunk of larger ranks comes with such a rank.
    """
    family = chip.family
    for kind in LINEAR[family]:
        dtype = torch.bfloat16 if kind == "half" else torch.float32
        for shrink in SHRINK[family][kind]:
            for r in shrink.blocks_r:
                config = _shrink(chip, kind, shrink, r, MAX_SPLITS)
                yield Shipped("lora_shrink", dtype, r, config)
        for linear in LINEAR[family][kind]:
            for block_r, r in hardest_ranks(linear.blocks_r):
                config_l = config_of(LinearConfig, chip, kind, linear, block_r=block_r)
                yield Shipped("lora_linear", dtype, r, config_l)
        for expand in EXPAND[family][kind]:
            for block_r, r in hardest_ranks(expand.blocks_r):
                config_e = config_of(ExpandConfig, chip, kind, expand, block_r=block_r)
                yield Shipped("lora_expand", dtype, r, config_e)
    for dtype in (torch.bfloat16, torch.float32):
        yield Shipped("lora_dropout", dtype, 0, dropout_config(chip, 1, 1, dtype))


class _HasRows(Protocol):
    @property
    def block_m(self) -> int: ...


class _HasColumns(_HasRows, Protocol):
    @property
    def block_n(self) -> int: ...


_Tile = TypeVar("_Tile", bound=_HasRows)
_OutputTile = TypeVar("_OutputTile", bound=_HasColumns)
_Config = TypeVar("_Config", bound=KernelConfig)


def tile_of_output(chip: Chip, m: int, n: int, tiles: Sequence[_OutputTile]) -> _OutputTile:
    """Returns `widest_that_fills` for kernels with a program for each tile of y ``[m, n]``."""
    return widest_that_fills(chip, m, tiles, lambda t: cdiv(m, t.block_m) * cdiv(n, t.block_n))


def widest_that_fills(
    chip: Chip, m: int, tiles: Sequence[_Tile], programs: Callable[[_Tile], int]
) -> _Tile:
    """Returns the first tile of m's bucket whose programs fill the chip, or else the last one.

    Up to 64 rows the tile covers all of them; beyond, 64-row tiles are the way to more programs.
    """
    rows = [tile.block_m for tile in tiles]
    bucket = min((block_m for block_m in rows if m <= block_m), default=max(rows))
    candidates = [tile for tile in tiles if min(bucket, 64) <= tile.block_m <= bucket]
    return next((tile for tile in candidates if fills(chip, programs(tile))), candidates[-1])


def fills(chip: Chip, programs: int) -> bool:
    """Whether at least three in four of the chip's processors get a program."""
    return 4 * programs >= 3 * chip.num_sms


def kind_of(chip: Chip, dtype: torch.dtype, input_precision: str) -> str:
    if dtype in (torch.float16, torch.bfloat16):
        return "half"
    if dtype != torch.float32:
        raise TypeError(f"x has dtype {dtype}, expected float16, bfloat16 or float32")
    return input_precision if input_precision in LINEAR[chip.family] else "ieee"


def config_of(
    config: type[_Config], chip: Chip, kind: str, tile: NamedTuple, **rest: Any
) -> _Config:
    """Returns a config with a tile's sizes, the chip's registers and the kind's precision.

    Args:
        config: Its class. Fields that the tile has too, by name, are the tile's.
        chip: Where the launch runs.
        kind: Of arithmetic, from `kind_of`.
        tile: Of one of the tables.
        rest: The fields that follow from the problem and the chip.
    """
    names = {field.name for field in fields(config)}
    sizes = {name: size for name, size in tile._asdict().items() if name in names}
    precision = "tf32" if kind == "tf32" else "ieee"
    return config(**sizes, **rest, max_registers=chip.max_registers, input_precision=precision)


def _shrink(chip: Chip, kind: str, tile: ShrinkTile, block_r: int, splits: int) -> ShrinkConfig:
    return config_of(
        ShrinkConfig,
        chip,
        kind,
        tile,
        block_r=block_r,
        splits=splits,
        launch_dependents=chip.has_pdl,
    )


def block_r_of(r: int, blocks_r: tuple[int, ...]) -> int:
    """Returns the smallest BLOCK_R that holds ``r`` rank rows, or the largest there is."""
    return next((block for block in blocks_r if r <= block), blocks_r[-1])


def chunk_r_of(r: int, blocks_r: tuple[int, ...]) -> int:
    """Returns BLOCK_R of a kernel that takes all ranks in one program, in chunks if need be."""
    if r <= blocks_r[-1]:
        return block_r_of(r, blocks_r)
    return max(block for block in blocks_r if block <= _MAX_CHUNK_R)


def hardest_ranks(blocks_r: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yields each BLOCK_R with a rank that takes it: one past all blocks for the chunk's."""
    beyond = 4 * blocks_r[-1]
    for block_r in blocks_r:
        yield block_r, beyond if block_r == chunk_r_of(beyond, blocks_r) else block_r


def cdiv(a: int, b: int) -> int:
    """Returns a / b rounded up (`triton.cdiv` takes 1.7 us a call on the host)."""
    return -(-a // b)
