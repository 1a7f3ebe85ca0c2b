"""The tables of all chips, what their rows are about, and the config that a row becomes.

The folder ``candidates`` holds a file of rows (`row_files`) for each family of chips.
`fastlora.kernels.configs` chooses rows; `fastlora.kernels.measurements` puts measured ones first.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastlora.kernels import row_files
from fastlora.kernels.chips import Chip, Row, Table

# Each plane is read back by every column of linear's tiles, so the shrink splits no further.
MAX_SPLITS = 8
# Each plane of a linear is written and read back, 8 bytes an element of y.
MAX_WEIGHT_SPLITS = 4
# Siblings of one read of x in `lora_grad_a`, and the rank rows of all of them that a tile holds.
MAX_SIBLINGS = 4
MAX_RANK_ROWS = 192
# Rank rows of one dot in the mode: a block of one adapter, never two adapters side by side.
INVARIANT_BLOCK_R = 16

# By arch, where there are measurements: these, then the family's candidates. See `put_first`.
MEASURED: dict[str, Table] = {}
_KERNELS = {
    "coded_lora_linear": "lora_linear",
    "coded_lora_grad_x": "lora_linear",
    "coded_mixed_lora_linear": "mixed_lora_linear",
    "lora_grad_x": "lora_linear",
    "lora_grad_x_add": "lora_expand",
    "mixed_lora_train_shrink": "mixed_lora_shrink",
    "mixed_lora_train_linear": "mixed_lora_linear",
    "mixed_lora_train_expand": "mixed_lora_expand",
    "mixed_lora_grad_x": "mixed_lora_linear",
    "mixed_lora_grad_x_add": "mixed_lora_expand",
}
# The axes of the output that a kernel's programs share out, and the axis that splits divide. The
# others have a program for each piece of a mixed batch, or one tile for every problem.
GRIDS = {
    "lora_shrink": ("mr", "k"),
    "lora_linear": ("mn", ""),
    "lora_expand": ("mn", ""),
    "lora_grad_b": ("nr", "m"),
    "lora_grad_a": ("kr", "m"),
    "mixed_lora_linear": ("mn", ""),
}
# Launches that plans are about: those of the plan "fused".
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
# Those that share out K where a chip is not full.
OF_DECODE = ("lora_linear", "coded_lora_linear")
# Kernels that take all ranks in one program, in chunks if need be.
CHUNKED = ("lora_linear", "lora_expand", "mixed_lora_expand")
# Kernels of mixed batches with one BLOCK_R, the rank rows of one dot, for every rank.
ANY_RANK = ("mixed_lora_linear", "mixed_lora_grad_reduce")


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """How a kernel is launched: its tile, what follows from the problem, and Triton's options.

    Attributes:
        block_m: The tile, with ``block_n``, ``block_k`` and ``block_r``: as in `chips.Row`.
        num_warps: Of one program.
        num_stages: Of the pipelined loop.
        max_registers: A thread's; None to leave it to the compiler.
        input_precision: How fp32 dots round, "ieee" or "tf32"; "" for a kernel without a dot.
        group_m: Row tiles side by side in the order of a linear's programs.
        splits: Programs that share a sum, each with a plane of its own.
        siblings: Modules of one read of x (`lora_grad_a`).
        narrow_r: BLOCK_R of the mixed shrink where so many columns suffice.
        rank_rows_first: Whether a factor's gradient is made in tiles of ``[R, columns]``.
        launch_dependents: Whether a shrink lets the next launch start early.
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
    siblings: int = 1
    narrow_r: int = 0
    rank_rows_first: bool = False
    launch_dependents: bool = False
    batch_invariant: bool = False

    def arguments(self, axes: str) -> dict[str, Any]:
        """Returns what a launch takes: the tile's sides of some axes, and Triton's options."""
        named = {f"BLOCK_{axis.upper()}": getattr(self, f"block_{axis}") for axis in axes}
        named |= {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.input_precision:
            named["INPUT_PRECISION"] = self.input_precision
        if self.max_registers is not None:
            named["maxnreg"] = self.max_registers
        return named


def kernel_of(launch: str) -> str:
    """Returns the kernel that a launch runs."""
    return _KERNELS.get(launch, launch)


def is_valid(chip: Chip, launch: str, config: KernelConfig, width: int) -> bool:
    """Whether ``config`` can run on ``chip`` with operands of ``width`` bytes an element.

    Sides of a dot are powers of two from 16 up, and the buffers of the loop fit the chip's shared
    memory, a factor counted as the fp32 that it may be. What the compiler adds to them is known
    only after it ran: the ahead-of-time test compares that with the limit.
    """
    m, n, k, r = config.block_m, config.block_n, config.block_k, config.block_r
    # Of one step of the loop, and of what stays through it.
    step, kept = {
        "lora_shrink": (k * (m * width + r * 4), 0),
        "lora_linear": (k * (m + n) * width, 0),
        "lora_grad_b": (m * n * width, n * r * width),
        "lora_grad_a": (m * k * width, 0),
    }.get(kernel_of(launch).removeprefix("mixed_"), (0, 0))
    # At least: Ampere and AMD keep the stage in use in registers, Hopper does not.
    buffers = max(config.num_stages - 1, 1) * step + kept
    sides = [side for side in (m, n, k, r, config.narrow_r) if side]
    least = 16 if config.input_precision else 1
    powers = all(side >= least and side & (side - 1) == 0 for side in sides)
    return powers and config.num_warps in (1, 2, 4, 8) and buffers <= chip.shared_limit


def cuts_rows(launch: str) -> bool:
    """Whether a launch's row tile is its own: the host makes pieces and runs for the others."""
    kernel = kernel_of(launch)
    return kernel == "mixed_lora_linear" or not kernel.startswith("mixed_")


def max_splits(launch: str) -> int:
    """Returns the most programs that may share a sum of a launch."""
    if launch in OF_DECODE:
        return MAX_WEIGHT_SPLITS
    _, axis = GRIDS.get(kernel_of(launch), ("", ""))
    return {"": 1, "k": MAX_SPLITS, "m": 1024}[axis]


@functools.cache
def candidates_of(family: str) -> Table:
    """Returns the shipped rows of a family: those of its file, then of the file that it is like.

    A launch and kind that stands in the family's own file does not count in the other one.
    """
    entries, like = row_files.read(Path(__file__).parent / "candidates" / f"{family}.json")
    own: dict[tuple[str, str], tuple[Row, ...]] = {}
    for launch, kind, row in entries:
        own[launch, kind] = (*own.get((launch, kind), ()), row)
    return {**candidates_of(like), **own} if like else own


def table_of(chip: Chip) -> Table:
    """Returns the chip's own table where it has measurements, else its family's."""
    return MEASURED.get(chip.arch) or candidates_of(chip.family)


def rows_of(
    chip: Chip, launch: str, dtype: torch.dtype, input_precision: str
) -> tuple[str, Sequence[Row]]:
    """Returns the kind of arithmetic, and the launch's rows of the chip's table."""
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
    row: Row,
    block_r: int,
    splits: int = 1,
    siblings: int = 1,
    batch_invariant: bool = False,
) -> KernelConfig:
    """Returns the config of a row, with what follows from the chip and the problem."""
    kernel = kernel_of(launch)
    is_mixed, narrow_r = kernel.startswith("mixed_"), 0
    if kernel == "mixed_lora_shrink":
        narrow_r = block_r if batch_invariant else max(16, block_r // 4)
    if batch_invariant and kernel == "mixed_lora_linear":
        block_r = INVARIANT_BLOCK_R
    # Rank rows come second where tensor cores take 64 rows at least: the columns of dy and x are
    # more than rank rows. Elsewhere dy and x meet their dots untransposed: only then does Triton
    # 3.9 copy them asynchronously there (sm_80, dy of 64 x 128: 15 copies of 3 stages instead of
    # the 3 of s, and 118 registers instead of 148).
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
        siblings=siblings,
        narrow_r=narrow_r,
        rank_rows_first=is_factor_grad and narrow_mma,
        launch_dependents=kernel in ("lora_shrink", "mixed_lora_shrink") and chip.has_pdl,
        batch_invariant=kernel in ("lora_linear", "mixed_lora_linear") and batch_invariant,
    )


def cdiv(a: int, b: int) -> int:
    """Returns a / b rounded up (`triton.cdiv` takes 1.7 us a call on the host)."""
    return -(-a // b)
