"""Which config a launch takes (`choose`), and which plan makes a linear (`plan_of`).

Both are pure functions of plain values, asked for on every launch inside the opaque operators, and
remembered. Nothing depends on the mix of a mixed batch: configs follow from its rows, the layer's
sizes and the largest rank, plans from the number of slots too, so that one CUDA graph replays any
mix.

A launch is named by its kernel, or by a name of its own where the kernel does another job: dx of a
linear, or the forward of training, which have many rows, dropout, and factors as parameters lie.

In the batch-invariant mode nothing depends on the batch either. A launch takes what a batch of
`INVARIANT_ROWS` rows would take outside of the mode, so tile, instruction, splits of K and cache
hints follow from N, K, rank, dtype and chip alone. 64 rows are the fewest that Hopper's and
Blackwell's matrix instructions hold: a compromise that costs decode (tiles of 64 rows where 16
would do, so fewer programs) and prefill (64 rows where 128 or 256 columns more would reuse more).
The price is unmeasured.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastlora.kernels import measurements
from fastlora.kernels.chips import Chip, Row, Table
from fastlora.kernels.measurements import Measurement
from fastlora.kernels.table_amd import GFX942, GFX950
from fastlora.kernels.table_nvidia import SM_80, SM_86, SM_90, SM_100

# Each plane is read back by every column of linear's tiles, so the shrink splits no further.
MAX_SPLITS = 8
# Each plane of a linear is written and read back, 8 bytes an element of y.
MAX_WEIGHT_SPLITS = 4
# Siblings of one read of x in `lora_grad_a`, and the rank rows of all of them that a tile holds.
MAX_SIBLINGS = 4
_MAX_RANK_ROWS = 192
# Up to here a linear is bound by its weight's bytes; above, the library's GEMM is ahead of ours.
FUSED_MAX_ROWS = 64
# Up to so many adapters a row tile the epilogue of a mixed linear is short; more go by pieces.
FUSED_MAX_ADAPTERS = 4
# Rows of a piece in training.
TRAIN_PIECE_ROWS = 64
INVARIANT_ROWS = 64
# Rank rows of one dot in the mode: a block of one adapter, never two adapters side by side.
_INVARIANT_BLOCK_R = 16
# More columns than any BLOCK_R: the widest is taken.
_ALL_COLUMNS = 4096
# Ranks past a tile's largest BLOCK_R go in chunks of at most this many: the loop over chunks hoists
# its addresses into registers.
_MAX_CHUNK_R = 32
# Ranks from which two passes over dy are considered: below, a pass costs more than its planes.
_TWICE_FROM_RANK = 48
# Steps of a loop below which a split of it is not worth a program.
_MIN_STEPS = 2

# Kernels without a dot take one tile on every chip, in every dtype. `mixed_dora_scale` works by
# pieces: 32 elements a thread of 32 lanes.
_ANY_CHIP: Table = {
    ("lora_dropout", "any"): (Row(8, 0, 256, 4),),
    ("plane_sums", "any"): (Row(num_warps=4),),
    ("mixed_dora_scale", "any"): (
        Row(128, 64, 0, 8),
        Row(64, 128, 0, 8),
        Row(16, 256, 0, 4),
    ),
    ("mixed_rows_sort", "any"): (Row(num_warps=8),),
    ("mixed_lora_grad_reduce", "any"): (Row(32, 64, 0, 4, 1, (16,)),),
}
TABLES: dict[str, Table] = {
    "sm_80": {**SM_80, **_ANY_CHIP},
    "sm_86": {**SM_86, **_ANY_CHIP},
    "sm_90": {**SM_90, **_ANY_CHIP},
    "sm_100": {**SM_100, **_ANY_CHIP},
    "gfx942": {**GFX942, **_ANY_CHIP},
    "gfx950": {**GFX950, **_ANY_CHIP},
}
# By arch, where there are measurements: these, then the family's candidates. See `put_first`.
MEASURED: dict[str, Table] = {}
# The names of all launches.
LAUNCHES = tuple(dict.fromkeys(launch for launch, _ in TABLES["sm_90"]))
_KERNELS = {
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
_GRIDS = {
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
)
# Launches that tile rows as `piece_rows` says.
_BY_PIECES = ("mixed_lora_shrink", "mixed_lora_expand", "mixed_dora_scale")
# Kernels that take all ranks in one program, in chunks if need be.
_CHUNKED = ("lora_linear", "lora_expand", "mixed_lora_expand")
# Kernels of mixed batches with one BLOCK_R, the rank rows of one dot, for every rank.
_ANY_RANK = ("mixed_lora_linear", "mixed_lora_grad_reduce")


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

    @property
    def launch_options(self) -> dict[str, int]:
        """The keyword arguments of a launch that are no kernel arguments."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options


@functools.lru_cache(maxsize=16384)
def choose(
    chip: Chip,
    launch: str,
    dtype: torch.dtype,
    *,
    m: int = 0,
    n: int = 0,
    k: int = 0,
    r: int = 0,
    siblings: int = 1,
    input_precision: str = "ieee",
    batch_invariant: bool = False,
) -> KernelConfig:
    """Returns the config of a launch. A size that a kernel does not depend on may be left out.

    A measured row goes first (`chips.Row`). Else it is the widest tile of m's bucket that fills the
    chip: three in four of its processors get a program, and what streams x has loads enough on
    their way. A sum over a long axis is split into the fewest parts that fill it, and the K of a
    decode's linear where the narrowest tile does not. Of `lora_grad_b`'s tiles it is the one with
    the fewest bytes of planes, since the columns of dy share ds as the rows share d_lora_b.

    Args:
        chip: Where the launch runs.
        launch: One of `LAUNCHES`.
        dtype: Of x, y or dy.
        m: Rows.
        n: The layer's N, also where the launch makes dx.
        k: The layer's K.
        r: Rank; the largest of siblings. For a mixed batch the largest of its adapters, and for its
            shrink and d_lora_a the rank rows of an adapter in all modules of the launch.
        siblings: Modules of one `lora_grad_a`.
        input_precision: "ieee" or "tf32"; matters for fp32 only.
        batch_invariant: Whether the config may not depend on ``m``.

    Raises:
        ValueError: There is no table for the chip.
        TypeError: The kernel has a dot and takes no such dtype.
    """
    kind, rows = _rows_of(chip, launch, dtype, input_precision)
    if batch_invariant:
        m, r = INVARIANT_ROWS, _ALL_COLUMNS if launch == "mixed_lora_shrink" else r
    if launch in _BY_PIECES:
        rows = [row for row in rows if row.block_m == piece_rows(m)]
    measured = () if batch_invariant else _measured(rows, m, n, k, r)
    tiles = [row for row in measured if row.num_warps][:1] or _bucket(m, rows)
    sizes, width = (m, n, k, r), 4 if dtype == torch.float32 else 2
    if launch == "lora_linear" and m <= FUSED_MAX_ROWS:
        row, splits = _of_decode(chip, tiles, sizes, width)
    else:
        row, splits = _on_grid(chip, launch, tiles, sizes, siblings, width)
    if row.splits or (batch_invariant and launch == "lora_linear"):
        splits = row.splits or 1
    block_r = _block_r(kernel_of(launch), row, r, siblings)
    return _config(chip, launch, kind, row, block_r, splits, siblings, batch_invariant)


@functools.lru_cache(maxsize=16384)
def plan_of(
    chip: Chip,
    launch: str,
    dtype: torch.dtype,
    *,
    m: int,
    n: int,
    k: int,
    r: int,
    slots: int = 1,
    input_precision: str = "ieee",
) -> str:
    """Returns which launches make a linear: a measured plan, else that of the sizes.

    - ``fused``: shrink, then one Triton GEMM with the LoRA term in its epilogue.
    - ``split``: shrink, an update, and the library's GEMM on top; for a mixed batch the library's
      GEMM, shrink, and an in-place update.

    "fused" is for few rows, up to `FUSED_MAX_ROWS`, whose row tile
    can hold few adapters, up to `FUSED_MAX_ADAPTERS`: an epilogue goes through all of them one
    after the other.

    Args:
        chip: Where the launches run.
        launch: The launch of the plan "fused": "lora_linear", "lora_grad_x", "mixed_lora_linear",
            "mixed_lora_train_linear" or "mixed_lora_grad_x".
        dtype: Of x or dy.
        m: Rows.
        n: The layer's N, also for a dx.
        k: The layer's K.
        r: Rank; the largest in a mixed batch.
        slots: Adapters that a mixed batch may have.
        input_precision: As in `choose`.

    Raises:
        ValueError: There is no table for the chip.
        TypeError: The kernels take no such dtype.
    """
    _, rows = _rows_of(chip, launch, dtype, input_precision)
    found = next((row.plan for row in _measured(rows, m, n, k, slots * r) if row.plan), None)
    if found:
        return found
    # Up to 64 rows one tile has them all.
    few = m <= FUSED_MAX_ROWS and min(m, slots) <= FUSED_MAX_ADAPTERS
    return "fused" if few else "split"


def reads_twice(config: KernelConfig, n: int, r: int, width: int) -> bool:
    """Whether d_lora_b and ds go in two passes over dy ``[M, N]``.

    One pass leaves a plane of ds for each tile of N, written and read, 8 bytes an element: at large
    ranks that is more than another read of dy, of ``width`` bytes an element.
    """
    planes = cdiv(n, config.block_n)
    return r >= _TWICE_FROM_RANK and planes > 1 and 8 * planes * r >= width * n


def piece_rows(m: int, batch_invariant: bool = False) -> int:
    """Returns the row tile of the kernels that work by pieces, for a mixed batch of ``m`` rows.

    Small against the batch, since a piece holds rows of one adapter only.
    """
    if batch_invariant:
        m = INVARIANT_ROWS
    if m <= 128:
        return 16
    return 64 if m <= 2048 else 128


def run_rows(chip: Chip, m: int, columns: int, block_m: int) -> int:
    """Returns the positions of a run: a multiple of the tile's rows, as many as fill the chip.

    The kernels that sum over the rows of a mixed batch work on runs of sorted positions.

    Args:
        chip: Where the launch runs.
        m: Rows of the batch; also symbolic, since a compiled graph serves any number of rows.
        columns: Programs that share a row of dy or x.
        block_m: Rows of the launch's tile.
    """
    # Three in four of the chip's processors, as a tile's choice asks for.
    wanted = cdiv(3 * chip.num_sms, 4 * max(columns, 1))
    steps = torch.sym_max(cdiv(m, block_m), 1)
    runs = torch.sym_max(torch.sym_min(wanted, steps // _MIN_STEPS), 1)
    return cdiv(steps, runs) * block_m


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


def put_first(arch: str, measured: Sequence[Measurement], source: object) -> None:
    """Puts measurements in front of all rows of an arch, and of no other one.

    What `choose` and `plan_of` answered before, and launches that were kept, stay as they are.

    Args:
        arch: As in `Chip`.
        measured: The rows, in the order in which they are asked.
        source: Where they come from, for the error.

    Raises:
        ValueError: A row is none that the arch can run, or there are no configs for the arch.
    """
    chip = Chip(arch, 1)
    table = dict(_table(chip))
    for number, measurement in reversed(list(enumerate(measured))):
        if fault := fault_of(chip, measurement):
            raise ValueError(f"{source}, row {number}: {fault}")
        key = measurement.launch, measurement.kind
        table[key] = (measurement.row, *table[key])
    MEASURED[arch] = table


def fault_of(chip: Chip, measured: Measurement) -> str:
    """Returns why a measurement cannot stand in the chip's table, or ""."""
    launch, kind, row = measured
    candidates = [r for r in _table(chip).get((launch, kind), ()) if not r.is_measured]
    if not candidates:
        return f"there is no launch {launch!r} of the kind {kind!r}"
    if not row.is_measured:
        return "it says for no problem, expected max_m, n, k or max_r"
    if row.plan:
        fits = launch in PLANNED and not row.num_warps
        return "" if fits else f"{launch} has no plan, or the row has a tile as well"
    sides = ("block_m", "block_n", "block_k", "blocks_r")
    if any(bool(getattr(row, side)) != bool(getattr(candidates[0], side)) for side in sides):
        return f"the tile of {launch} has other sides, as in {candidates[0]}"
    sizes = {r.block_m for r in candidates}
    if not cuts_rows(launch) and row.block_m not in sizes:
        return f"block_m is {row.block_m}, expected one of {sorted(sizes)}"
    if row.splits > max_splits(launch):
        return f"splits is {row.splits}, expected at most {max_splits(launch)}"
    if not row.num_stages:
        return "num_stages is 0"
    width = 2 if kind == "half" else 4
    for block_r in row.blocks_r or (0,):
        if not is_valid(chip, launch, _config(chip, launch, kind, row, block_r), width):
            return f"{launch} cannot run as {row} on {chip.arch}"
    return ""


def cuts_rows(launch: str) -> bool:
    """Whether a launch's row tile is its own: the host makes pieces and runs for the others."""
    kernel = kernel_of(launch)
    return kernel == "mixed_lora_linear" or not kernel.startswith("mixed_")


def max_splits(launch: str) -> int:
    """Returns the most programs that may share a sum of a launch."""
    if launch == "lora_linear":
        return MAX_WEIGHT_SPLITS
    _, axis = _GRIDS.get(kernel_of(launch), ("", ""))
    return {"": 1, "k": MAX_SPLITS, "m": 1024}[axis]


class Shipped(NamedTuple):
    """One config that a launch may take: the launch, x's dtype, a rank that takes it."""

    kernel: str
    dtype: torch.dtype
    r: int
    config: KernelConfig


def all_shipped(chip: Chip) -> Iterator[Shipped]:
    """Yields every config that a launch may take on ``chip``, each once, with the hardest rank.

    Splits change the grid only, so the most splits of a shrink and a gradient without them stand
    for all; the most siblings stand for fewer. A BLOCK_R that also serves as the chunk of larger
    ranks comes with such a rank.
    """
    made = []
    for (launch, kind), rows in _table(chip).items():
        splits = MAX_SPLITS if launch == "lora_shrink" else 1
        for row in (row for row in rows if row.num_warps):
            for block_r, r in _hardest_ranks(kernel_of(launch), row):
                siblings = _most_siblings(row, block_r) if launch == "lora_grad_a" else 1
                config = _config(chip, launch, kind, row, block_r, splits, siblings)
                made += [Shipped(launch, dtype, r, config) for dtype in _dtypes(launch, kind)]
    yield from dict.fromkeys(made)


def all_invariant_shipped(chip: Chip) -> Iterator[Shipped]:
    """Yields every config that a launch may take in the batch-invariant mode.

    Those of a single adapter are of rank 16: of other ranks they differ by a cache hint from what
    `all_shipped` yields.
    """
    for (launch, kind), rows in TABLES[chip.family].items():
        if launch == "mixed_lora_shrink":
            rows = tuple(row for row in rows if row.block_m == piece_rows(INVARIANT_ROWS))
        elif launch not in ("lora_linear", "mixed_lora_linear"):
            continue
        for row in _bucket(INVARIANT_ROWS, rows):
            kernel, (dtype,) = kernel_of(launch), _dtypes(launch, kind)
            rank = row.blocks_r[-1] if launch == "mixed_lora_shrink" else _INVARIANT_BLOCK_R
            block_r = _block_r(kernel, row, rank)
            config = _config(chip, launch, kind, row, block_r, batch_invariant=True)
            yield Shipped(launch, dtype, 64 if kernel in _ANY_RANK else rank, config)


def _table(chip: Chip) -> Table:
    """Returns the chip's own table where it has measurements, else its family's."""
    return MEASURED.get(chip.arch) or TABLES[chip.family]


def _rows_of(
    chip: Chip, launch: str, dtype: torch.dtype, input_precision: str
) -> tuple[str, Sequence[Row]]:
    """Returns the kind of arithmetic, and the launch's rows of the chip's table."""
    table = _table(chip)
    if (launch, "any") in table:
        kind = "any"
    elif dtype in (torch.float16, torch.bfloat16):
        kind = "half"
    elif dtype == torch.float32:
        kind = "tf32" if input_precision == "tf32" and (launch, "tf32") in table else "ieee"
    else:
        raise TypeError(f"x has dtype {dtype}, expected float16, bfloat16 or float32")
    return kind, table[launch, kind]


def _measured(rows: Sequence[Row], m: int, n: int, k: int, r: int) -> list[Row]:
    """Returns the measurements that cover a problem."""
    return [row for row in rows if row.is_measured and row.covers(m, n, k, r)]


def _bucket(m: int, rows: Sequence[Row]) -> list[Row]:
    """Returns the candidates for m rows.

    Up to 64 rows the tile covers all of them; beyond, 64-row tiles are the way to more programs.
    """
    candidates = [row for row in rows if not row.is_measured]
    sizes = [row.block_m for row in candidates]
    bucket = min((size for size in sizes if m <= size), default=max(sizes))
    return [row for row in candidates if min(bucket, 64) <= row.block_m <= bucket]


def _on_grid(
    chip: Chip,
    launch: str,
    rows: Sequence[Row],
    mnkr: tuple[int, int, int, int],
    siblings: int,
    width: int,
) -> tuple[Row, int]:
    """Returns the row that serves the problem best, and the splits of its sums."""
    kernel = kernel_of(launch)
    if kernel not in _GRIDS:
        return rows[0], 1
    (first, second), split = _GRIDS[kernel]
    m, n, k, r = mnkr
    sizes = {"m": m, "n": k if "grad_x" in launch else n, "k": k, "r": r}
    choices = []
    for index, row in enumerate(rows):
        block_r = _block_r(kernel, row, r, siblings)
        blocks = {"m": row.block_m, "n": row.block_n, "k": row.block_k, "r": block_r}
        tiles = {axis: cdiv(sizes[axis], block) for axis, block in blocks.items() if block}
        programs, splits = tiles[first] * tiles[second], 1
        most = tiles[split] // _MIN_STEPS if split else 1
        if split == "k":
            most = min(most, MAX_SPLITS)
        loads = _in_flight(kernel, row) * width if split else 0
        while not _fills(chip, splits * programs, loads) and 2 * splits <= most:
            splits *= 2
        if split == "m":
            shared = m * tiles[first] if kernel == "lora_grad_b" and tiles[first] > 1 else 0
            planes = shared + (splits * sizes[first] if splits > 1 else 0)
            cost = (tiles["r"], not _fills(chip, splits * programs, loads), planes)
        else:
            # The first that fills the chip, or else the last one.
            idle = not _fills(chip, (MAX_SPLITS if split else 1) * programs, loads)
            cost = (0, idle, -index if idle else 0)
        choices.append((cost, index, row, splits))
    _, _, row, splits = min(choices)
    return row, splits


def _of_decode(
    chip: Chip, rows: Sequence[Row], mnkr: tuple[int, int, int, int], width: int
) -> tuple[Row, int]:
    """Returns the row of a linear that reads its weight once, and the splits of K.

    The widest tile that fills the chip. Where none does, programs of the narrowest share out K if
    its loads of weight keep the memory less than half busy: planes and their sum cost as well.
    """
    m, n, k, _ = mnkr
    for row in rows:
        programs = cdiv(m, row.block_m) * cdiv(n, row.block_n)
        if _fills(chip, programs) or row.is_measured:
            return row, 1
    most, splits = min(MAX_WEIGHT_SPLITS, cdiv(k, row.block_k) // _MIN_STEPS), 1
    loads = programs * _in_flight("lora_linear", row) * width
    wanted = min(chip.bytes_in_flight, n * k * width)
    while 2 * splits * loads <= wanted and 2 * splits <= most:
        splits *= 2
    return row, splits


def _fills(chip: Chip, programs: int, loads: int = 0) -> bool:
    """Whether three in four of the chip's processors get a program, and the memory enough loads.

    ``loads`` are the bytes that a program has on their way; 0 where that does not decide.
    """
    return 4 * programs >= 3 * chip.num_sms and (
        not loads or programs * loads >= chip.bytes_in_flight
    )


def _in_flight(kernel: str, row: Row) -> int:
    """Returns the elements that a program has on their way, of what the kernel streams; or 0."""
    tile = {
        "lora_shrink": row.block_m * row.block_k,
        "lora_grad_a": row.block_m * row.block_k,
        "lora_linear": row.block_n * row.block_k,
    }.get(kernel, 0)
    return max(row.num_stages - 1, 1) * tile


def _block_r(kernel: str, row: Row, r: int, siblings: int = 1) -> int:
    """Returns the smallest BLOCK_R of a row that holds ``r`` rank rows, or the largest there is."""
    blocks = row.blocks_r or (0,)
    if kernel == "lora_grad_a":
        blocks = tuple(b for b in blocks if siblings * b <= _MAX_RANK_ROWS) or blocks[:1]
    if kernel in _CHUNKED and r > blocks[-1]:
        return max(block for block in blocks if block <= _MAX_CHUNK_R)
    return next((block for block in blocks if r <= block), blocks[-1])


def _hardest_ranks(kernel: str, row: Row) -> Iterator[tuple[int, int]]:
    """Yields each BLOCK_R with a rank that takes it: one past all blocks for the chunk's."""
    for block_r in row.blocks_r or (0,):
        beyond = 4 * row.blocks_r[-1] if kernel in _CHUNKED else 0
        if kernel in _ANY_RANK:
            yield block_r, 64
        else:
            yield (
                block_r,
                beyond if beyond and block_r == _block_r(kernel, row, beyond) else block_r,
            )


def _most_siblings(row: Row, block_r: int) -> int:
    """Returns the most siblings that one launch with this BLOCK_R may have."""
    narrowest = block_r == row.blocks_r[0]
    return MAX_SIBLINGS if narrowest else min(MAX_SIBLINGS, _MAX_RANK_ROWS // block_r)


def _dtypes(launch: str, kind: str) -> tuple[torch.dtype, ...]:
    """Returns the dtypes of x that the ahead-of-time test compiles for a kind of arithmetic."""
    if kind != "any":
        return (torch.bfloat16 if kind == "half" else torch.float32,)
    # Sums of fp32 planes read no x, nor does what sorts rows.
    reads_no_x = launch in ("plane_sums", "mixed_lora_grad_reduce", "mixed_rows_sort")
    return (torch.bfloat16,) if reads_no_x else (torch.bfloat16, torch.float32)


def _config(
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
        block_r = _INVARIANT_BLOCK_R
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


for _arch, _path in measurements.files():
    put_first(_arch, measurements.read(_path), _path)
