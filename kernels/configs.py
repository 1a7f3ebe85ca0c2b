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
from collections.abc import Sequence

import torch

from fastlora.kernels import measurements, row_files
from fastlora.kernels.chips import Chip, Row
from fastlora.kernels.tables import (
    CHUNKED,
    GRIDS,
    MAX_RANK_ROWS,
    MAX_SPLITS,
    MAX_WEIGHT_SPLITS,
    OF_DECODE,
    KernelConfig,
    cdiv,
    config_of_row,
    kernel_of,
    rows_of,
)

# Up to here a linear is bound by its weight's bytes; above, the library's GEMM is ahead of ours.
FUSED_MAX_ROWS = 64
# Up to so many adapters a row tile the epilogue of a mixed linear is short; more go by pieces.
FUSED_MAX_ADAPTERS = 4
# Rows of a piece in training.
TRAIN_PIECE_ROWS = 64
INVARIANT_ROWS = 64
# More columns than any BLOCK_R: the widest is taken.
_ALL_COLUMNS = 4096
# Ranks past a tile's largest BLOCK_R go in chunks of at most this many: the loop over chunks hoists
# its addresses into registers.
_MAX_CHUNK_R = 32
# Ranks from which two passes over dy are considered: below, a pass costs more than its planes.
_TWICE_FROM_RANK = 48
# Steps of a loop below which a split of it is not worth a program.
_MIN_STEPS = 2
# Bytes of an element of a coded weight, of 4 bits.
_CODED_WIDTH = 0.5
# Launches that tile rows as `piece_rows` says.
_BY_PIECES = ("mixed_lora_shrink", "mixed_lora_expand", "mixed_dora_scale")


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
        launch: One of the chip's table.
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
    kind, rows = rows_of(chip, launch, dtype, input_precision)
    if batch_invariant:
        m, r = INVARIANT_ROWS, _ALL_COLUMNS if launch == "mixed_lora_shrink" else r
    if launch in _BY_PIECES:
        rows = [row for row in rows if row.block_m == piece_rows(m)]
    measured = () if batch_invariant else _measured(rows, m, n, k, r)
    tiles = [row for row in measured if row.num_warps][:1] or bucket_of(m, rows)
    sizes, width = (m, n, k, r), 4 if dtype == torch.float32 else 2
    if launch in OF_DECODE and m <= FUSED_MAX_ROWS:
        of_weight = _CODED_WIDTH if launch.startswith("coded_") else width
        row, splits = _of_decode(chip, tiles, sizes, of_weight)
    else:
        row, splits = _on_grid(chip, launch, tiles, sizes, siblings, width)
    if row.splits or (batch_invariant and launch in OF_DECODE):
        splits = row.splits or 1
    block_r = block_r_of(kernel_of(launch), row, r, siblings)
    return config_of_row(chip, launch, kind, row, block_r, splits, siblings, batch_invariant)


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
      GEMM, shrink, and an in-place update. Over a coded weight, for which no library has a GEMM:
      the dense matrix first, and what its plan says; for a mixed batch a GEMM of ours.

    "fused" is for few rows, up to `FUSED_MAX_ROWS`, whose row tile
    can hold few adapters, up to `FUSED_MAX_ADAPTERS`: an epilogue goes through all of them one
    after the other.

    Args:
        chip: Where the launches run.
        launch: The launch of the plan "fused", one of `tables.PLANNED`.
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
    _, rows = rows_of(chip, launch, dtype, input_precision)
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


def _measured(rows: Sequence[Row], m: int, n: int, k: int, r: int) -> list[Row]:
    """Returns the measurements that cover a problem."""
    return [row for row in rows if row.is_measured and row.covers(m, n, k, r)]


def bucket_of(m: int, rows: Sequence[Row]) -> list[Row]:
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
    if kernel not in GRIDS:
        return rows[0], 1
    (first, second), split = GRIDS[kernel]
    m, n, k, r = mnkr
    sizes = {"m": m, "n": k if "grad_x" in launch else n, "k": k, "r": r}
    choices = []
    for index, row in enumerate(rows):
        block_r = block_r_of(kernel, row, r, siblings)
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
    chip: Chip, rows: Sequence[Row], mnkr: tuple[int, int, int, int], width: float
) -> tuple[Row, int]:
    """Returns the row of a linear that reads its weight once, and the splits of K.

    The widest tile that fills the chip. Where none does, programs of the narrowest share out K if
    its loads of weight keep the memory less than half busy: planes and their sum cost as well.
    ``width`` are the bytes of a weight's element.
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


def block_r_of(kernel: str, row: Row, r: int, siblings: int = 1) -> int:
    """Returns the smallest BLOCK_R of a row that holds ``r`` rank rows, or the largest there is."""
    blocks = row.blocks_r or (0,)
    if kernel == "lora_grad_a":
        blocks = tuple(b for b in blocks if siblings * b <= MAX_RANK_ROWS) or blocks[:1]
    if kernel in CHUNKED and r > blocks[-1]:
        return max(block for block in blocks if block <= _MAX_CHUNK_R)
    return next((block for block in blocks if r <= block), blocks[-1])


for _arch, _path in measurements.files():
    measurements.put_first(_arch, row_files.read(_path)[0], _path)
