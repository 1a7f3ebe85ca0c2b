"""The tables of all chips, the launches that their rows belong to, and the config of a row.

The folder ``candidates`` has a file of rows (`row_files`) for each family of chips.
`fastlora.kernels.configs` chooses rows, and `fastlora.kernels.measurements` puts measured rows
first.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastlora.kernels import config_files
from fastlora.kernels.chips import Chip, ConfigRow, Table

# Every column of a linear's tiles reads each partial sum, so the shrink uses no more splits.
MAX_SPLITS = 8
# Each partial sum of a linear is written and read back, 8 bytes per element of y.
MAX_WEIGHT_SPLITS = 4
# Maximum bytes of the fp32 partial sums that one launch writes.
MAX_PARTIAL_BYTES = 256 * 2**20
# Maximum number of modules in one `lora_grad_a`, and of their rank rows in a tile.
MAX_GROUP_SIZE = 4
# Launches of 2 or 3 modules, such as gate|up and q|k|v, use the kernel for 3.
USUAL_GROUP_SIZE = 3
MAX_RANK_ROWS = 192
# Rank rows of one dot in the batch-invariant mode: a block of one adapter, never of two adapters.
INVARIANT_BLOCK_R = 16

# By arch, if there are measurements: these, followed by the family's candidates. See `put_first`.
MEASURED: dict[str, Table] = {}
_KERNELS = {
    "coded_lora_linear": "lora_linear",
    "coded_lora_grad_x": "lora_linear",
    "coded_mixed_lora_linear": "mixed_lora_linear",
    "dropout_lora_shrink": "lora_shrink",
    "lora_grad_x": "lora_linear",
    "lora_grad_x_add": "lora_expand",
    "mixed_lora_train_shrink": "mixed_lora_shrink",
    "mixed_lora_train_linear": "mixed_lora_linear",
    "mixed_lora_train_expand": "mixed_lora_expand",
    "mixed_lora_grad_x": "mixed_lora_linear",
    "mixed_lora_grad_x_add": "mixed_lora_expand",
}
# For each kernel, the axes of the output that its programs divide, and the axis of splits. Other
# kernels have a program for each piece of a mixed batch, or one tile for all problems.
GRIDS = {
    "lora_shrink": ("mr", "k"),
    "lora_linear": ("mn", ""),
    "lora_expand": ("mn", ""),
    "lora_grad_b": ("nr", "m"),
    "lora_grad_a": ("kr", "m"),
    "mixed_lora_linear": ("mn", ""),
}
# Launches that have plans: the launches of the plan "fused".
PLANNED = (
    "lora_linear",
    "lora_grad_x",
    "mixed_lora_linear",
    "mixed_lora_train_linear",
    "mixed_lora_grad_x",
    "coded_lora_linear",
    "coded_lora_grad_x",
    "coded_mixed_lora_linear",
)
# Launches in which programs share K if the chip is not full.
OF_DECODE = ("lora_linear", "coded_lora_linear")
# Decode linears that memory and the L2 cache limit: tensor cores compute their products, and their
# weights need no dequantization.
BY_BANDWIDTH = (("lora_linear", "half"), ("lora_linear", "tf32"))
# Kernels in which one program processes all ranks, in chunks if necessary.
CHUNKED = ("lora_linear", "lora_expand", "mixed_lora_expand")
# Kernels of mixed batches that use one BLOCK_R, the rank rows of a dot, for every rank.
ANY_RANK = ("mixed_lora_linear", "mixed_lora_grad_reduce")


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """How to launch a kernel: its tile, settings that follow from the problem, Triton's options.

    Attributes:
        block_m: The tile, with ``block_n``, ``block_k``, and ``block_r``: as in `chips.Row`.
        num_warps: Warps of a program.
        num_stages: Stages of the pipelined loop.
        max_registers: Limit of registers per thread; None to leave it to the compiler.
        input_precision: How fp32 dots round, "ieee" or "tf32"; "" for a kernel without a dot.
        group_m: Number of adjacent row tiles in the order of a linear's programs.
        splits: Number of programs that share a sum. Each has its own partial sum.
        group_size: Number of modules in one `lora_grad_a`.
        narrow_r: BLOCK_R of a mixed shrink if this many columns suffice.
        rank_rows_first: Whether tiles of a factor's gradient are ``[R, columns]``.
        launch_dependents: Whether a shrink allows the next launch to start early.
        batch_invariant: Whether a linear runs in the batch-invariant mode.
    """

    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    block_r: int = 0
    num_warps: int
    num_stages: int = 1
    max_registers: int | None = None
    input_precision: str = "ieee"
    group_m: int = 8
    splits: int = 1
    group_size: int = 1
    narrow_r: int = 0
    rank_rows_first: bool = False
    launch_dependents: bool = False
    batch_invariant: bool = False

    def arguments(self, axes: str) -> dict[str, Any]:
        """Return the arguments of a launch: the tile's sides of ``axes``, and Triton's options."""
        named = {f"BLOCK_{axis.upper()}": getattr(self, f"block_{axis}") for axis in axes}
        named |= {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.input_precision:
            named["INPUT_PRECISION"] = self.input_precision
        if self.max_registers is not None:
            named["maxnreg"] = self.max_registers
        return named


def kernel_of(launch: str) -> str:
    """Return the kernel that a launch runs."""
    return _KERNELS.get(launch, launch)


def is_valid(chip: Chip, launch: str, config: KernelConfig, width: int) -> bool:
    """Return whether ``config`` can run on ``chip`` with operands of ``width`` bytes per element.

    The sides of a dot must be powers of two, 16 or larger, and the loop's buffers must fit the
    chip's shared memory. Factors are counted as fp32, which they may be. The compiler's own use of
    shared memory is known only after compilation. The ahead-of-time test compares it with the
    limit.
    """
    m, n, k, r = config.block_m, config.block_n, config.block_k, config.block_r
    # Bytes of one step of the loop, and bytes that stay throughout the loop.
    step, resident = {
        "lora_shrink": (k * (m * width + r * 4), 0),
        "lora_linear": (k * (m + n) * width, 0),
        "lora_grad_b": (m * n * width, n * r * width),
        "lora_grad_a": (m * k * width, 0),
    }.get(kernel_of(launch).removeprefix("mixed_"), (0, 0))
    # A lower bound: Ampere and AMD keep the current stage in registers, but Hopper does not.
    buffers = max(config.num_stages - 1, 1) * step + resident
    sides = [side for side in (m, n, k, r, config.narrow_r) if side]
    least = 16 if config.input_precision else 1
    powers = all(side >= least and side & (side - 1) == 0 for side in sides)
    return powers and config.num_warps in (1, 2, 4, 8, 16) and buffers <= chip.shared_limit


def cuts_rows(launch: str) -> bool:
    """Return whether a launch has its own row tile. The host prepares pieces for others."""
    kernel = kernel_of(launch)
    return kernel == "mixed_lora_linear" or not kernel.startswith("mixed_")


def max_splits(launch: str) -> int:
    """Return the maximum number of programs that may share a sum of a launch."""
    if launch in OF_DECODE:
        return MAX_WEIGHT_SPLITS
    _, axis = GRIDS.get(kernel_of(launch), ("", ""))
    return {"": 1, "k": MAX_SPLITS, "m": 1024}[axis]


@functools.cache
def candidates_of(family: str) -> Table:
    """Return the shipped rows of a family: its file's, then those of the file that it is like.

    If a launch and kind is in the family's own file, the rows of the other file do not count.
    """
    entries, like = config_files.read(Path(__file__).parent / "candidates" / f"{family}.json")
    own: dict[tuple[str, str], tuple[ConfigRow, ...]] = {}
    for launch, kind, row in entries:
        own[launch, kind] = (*own.get((launch, kind), ()), row)
    return {**candidates_of(like), **own} if like else own


def table_of(chip: Chip) -> Table:
    """Return the chip's own table if it has measurements, otherwise its family's."""
    return MEASURED.get(chip.arch) or candidates_of(chip.family)


def rows_of(
    chip: Chip, launch: str, dtype: torch.dtype, input_precision: str
) -> tuple[str, Sequence[ConfigRow]]:
    """Return the kind of arithmetic, and the launch's rows in the chip's table."""
    table = table_of(chip)
    if (launch, "any") in table:
        kind = "any"
    elif dtype in (torch.float16, torch.bfloat16):
        kind = "half"
    elif dtype == torch.float32:
        kind = "tf32" if input_precision == "tf32" and (launch, "tf32") in table else "ieee"
    else:
        raise TypeError(f"x has dtype {dtype}, expected float16, bfloat16 or float32")
    return kind, table[launch, kind]


def config_of_row(
    chip: Chip,
    launch: str,
    kind: str,
    row: ConfigRow,
    block_r: int,
    splits: int = 1,
    group_size: int = 1,
    batch_invariant: bool = False,
) -> KernelConfig:
    """Return the config of a row, with the settings that follow from the chip and the problem."""
    kernel = kernel_of(launch)
    is_mixed, narrow_r = kernel.startswith("mixed_"), 0
    if kernel == "mixed_lora_shrink":
        narrow_r = block_r if batch_invariant else max(16, block_r // 4)
    if batch_invariant and kernel == "mixed_lora_linear":
        block_r = INVARIANT_BLOCK_R
    # Rank rows come second if tensor cores take at least 64 rows, because dy and x have more
    # columns than there are rank rows. Elsewhere, dy and x are not transposed for their dots. Only
    # then does Triton 3.9 copy them asynchronously there (sm_80, dy of 64 x 128: 15 copies of 3
    # stages instead of the 3 of s, and 118 registers instead of 148).
    is_factor_grad = kernel.removeprefix("mixed_") in ("lora_grad_b", "lora_grad_a")
    narrow_mma = not chip.has_wide_mma and (kind == "half" or not is_mixed)
    has_dot = kind != "any"
    return KernelConfig(
        block_m=row.block_m,
        block_n=row.block_n,
        block_k=row.block_k,
        block_r=block_r,
        num_warps=row.num_warps,
        num_stages=row.num_stages,
        max_registers=chip.max_registers if has_dot else None,
        input_precision=("tf32" if kind == "tf32" else "ieee") if has_dot else "",
        splits=splits,
        group_size=group_size,
        narrow_r=narrow_r,
        rank_rows_first=is_factor_grad and narrow_mma,
        launch_dependents=kernel in ("lora_shrink", "mixed_lora_shrink") and chip.has_pdl,
        batch_invariant=kernel in ("lora_linear", "mixed_lora_linear") and batch_invariant,
    )


def compiled_modules(count: int, alone: bool) -> int:
    """Return the number of modules that the kernel for ``count`` modules is compiled for.

    ``alone`` says whether a launch of one module needs the kernel for one module.
    """
    if count == 1 and alone:
        return 1
    return max(count, USUAL_GROUP_SIZE)


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up (`triton.cdiv` takes 1.7 us per call on the host)."""
    return -(-a // b)
