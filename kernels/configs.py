"""The choice of the config of a launch (`choose`) and of the plan of a linear layer (`plan_of`).

Both are pure functions of plain values. The opaque operators call them for every launch, and their
results are cached. Nothing depends on the adapters of a mixed batch's rows: configs follow from the
number of rows, the sizes of the layer, and the largest rank, and plans also from the number of
slots. Therefore one CUDA graph can be replayed for any mix.

A launch has the name of its kernel, or a name of its own if the kernel does another job: dx of a
linear layer, a shrink with dropout (the masks take most of its instructions), or a mixed batch's
forward pass in training, which has many rows, dropout, and factors in the layout of parameters.

In the batch-invariant mode, configs do not depend on the batch either. A launch gets the config
that a batch of `INVARIANT_ROWS` rows would get outside of the mode, so that tile, instruction,
splits of K, and cache hints follow from N, K, rank, dtype, and chip alone. 64 rows are the smallest
number for the matrix instructions of Hopper and Blackwell. This compromise makes decode slower
(tiles of 64 rows where 16 would suffice, and therefore fewer programs), and also prefill (64 rows,
where 128 or 256 would reuse more of the weight). The cost has not been measured.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastlora.kernels import config_files, measurements
from fastlora.kernels.chips import INNER_SUM_S, LAUNCH_S, Chip, ConfigRow
from fastlora.kernels.config_tables import (
    BY_BANDWIDTH,
    CHUNKED,
    GRIDS,
    MAX_PARTIAL_BYTES,
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

# Up to this many rows, the weight's bytes limit a linear layer. Beyond, the library's GEMM is
# faster than Triton's.
FUSED_MAX_ROWS = 64
# With up to this many adapters per row tile, the epilogue of a mixed linear is short. With more
# adapters, the expand works on pieces.
FUSED_MAX_ADAPTERS = 4
# Rows of a piece in training.
TRAIN_PIECE_ROWS = 64
INVARIANT_ROWS = 64
# More columns than any BLOCK_R, so that the widest is chosen.
_ALL_COLUMNS = 4096
# Ranks larger than a tile's largest BLOCK_R are processed in chunks of at most this many rank rows,
# because the compiler hoists the addresses of the chunk loop into registers.
_MAX_CHUNK_R = 32
# Smallest rank for which two passes over dy are considered. For smaller ranks, a pass costs more
# than its partial sums.
_TWICE_FROM_RANK = 48
# A loop is not split into parts with fewer steps than this.
_MIN_STEPS = 2
# Bytes per element of a 4-bit quantized weight.
_QUANTIZED_WIDTH = 0.5
# Time of a launch besides its loads and stores (an assumption).
_LAUNCH_SECONDS = 2e-6
# Time of a program of a linear besides its loop (an assumption): about 1,000 instructions in code
# compiled for sm_90, at 3 cycles each and 1.7 GHz.
_PROGRAM_SECONDS = 1.8e-6
# A tile or a split must be faster by more than this share to replace a wider tile.
_LEAST_GAIN = 0.01
# Launches with row tiles from `piece_rows`.
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
    group_size: int = 1,
    input_precision: str = "ieee",
    batch_invariant: bool = False,
) -> KernelConfig:
    """Return the config of a launch. Sizes that do not matter for the kernel may be left out.

    A measured row takes precedence (`chips.Row`). Otherwise the choice is the widest tile for m
    that fills the chip: at least three quarters of the processors get a program, and a kernel that
    streams x has enough loads in flight. A sum over a long axis is split into the smallest number
    of parts that fills the chip. For a decode's linear, the choice is the tile and the number of
    splits of K with the shortest estimated time, if the chip's bandwidths are known; otherwise, K
    is split only if the narrowest tile does not fill the chip. For `lora_grad_b`, the tile with the
    fewest bytes of partial sums is chosen, because the columns of dy share ds just as the rows
    share d_lora_b.

    Args:
        chip: The chip of the launch.
        launch: A launch of the chip's table.
        dtype: Dtype of x, y, or dy.
        m: Number of rows.
        n: The layer's N, also if the launch computes dx.
        k: The layer's K.
        r: Rank, or the largest rank of the modules or adapters. For the shrink and d_lora_a of a
            mixed batch, it is the number of rank rows of an adapter in all modules of the launch.
        group_size: Number of modules in one `lora_grad_a`.
        input_precision: "ieee" or "tf32"; matters for fp32 only.
        batch_invariant: Whether the config must not depend on ``m``.

    Raises:
        ValueError: There is no table for the chip.
        TypeError: The kernel has a dot and does not support the dtype.
    """
    kind, rows = rows_of(chip, launch, dtype, input_precision)
    if batch_invariant:
        m, r = INVARIANT_ROWS, _ALL_COLUMNS if launch == "mixed_lora_shrink" else r
    if launch in _BY_PIECES:
        rows = [row for row in rows if row.block_m == piece_rows(m)]
    measured = () if batch_invariant else _measured(rows, m, n, k, r, group_size)
    tiles = [row for row in measured if row.num_warps][:1] or bucket_of(m, rows)
    sizes, width = (m, n, k, r), 4 if dtype == torch.float32 else 2
    if launch in OF_DECODE and m <= FUSED_MAX_ROWS:
        most = 1 if batch_invariant else MAX_WEIGHT_SPLITS
        bandwidths = chip.bandwidths if (launch, kind) in BY_BANDWIDTH else None
        of_weight = _QUANTIZED_WIDTH if launch.startswith("coded_") else width
        row, splits = _of_decode(chip, bandwidths, tiles, sizes, of_weight, most)
    else:
        row, splits = _on_grid(chip, launch, tiles, sizes, group_size, width)
    splits = row.splits or splits
    if not batch_invariant:
        splits = _splits_that_fit(kernel_of(launch), splits, sizes, group_size)
    block_r = block_r_of(kernel_of(launch), row, r, group_size)
    return config_of_row(chip, launch, kind, row, block_r, splits, group_size, batch_invariant)


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
    """Return the plan of a linear layer, which says what to launch: measured, or chosen by size.

    - ``fused``: shrink, then one Triton GEMM with the LoRA term in its epilogue.
    - ``split``: shrink, then an update, then the library's GEMM added to it. In a mixed batch: the
      library's GEMM, then shrink, then an in-place update. No library has a GEMM for a quantized
      weight. Such a weight is dequantized first, and then the plan of the dense weight applies; in
      a mixed batch, fastlora's own GEMM runs.

    "fused" is for up to `FUSED_MAX_ROWS` rows, and for row tiles with up to `FUSED_MAX_ADAPTERS`
    adapters, because an epilogue processes all adapters of its tile one after the other.

    Args:
        chip: The chip of the launches.
        launch: The launch of the plan "fused", one of `tables.PLANNED`.
        dtype: Dtype of x or dy.
        m: Number of rows.
        n: The layer's N, also for dx.
        k: The layer's K.
        r: Rank, or the largest rank in a mixed batch.
        slots: Number of adapters that a mixed batch may have.
        input_precision: As in `choose`.

    Raises:
        ValueError: There is no table for the chip.
        TypeError: The kernels do not support the dtype.
    """
    _, rows = rows_of(chip, launch, dtype, input_precision)
    found = next((row.plan for row in _measured(rows, m, n, k, slots * r) if row.plan), None)
    if found:
        return found
    # Up to 64 rows fit one tile.
    few = m <= FUSED_MAX_ROWS and min(m, slots) <= FUSED_MAX_ADAPTERS
    return "fused" if few else "split"


def reads_twice(config: KernelConfig, m: int, n: int, r: int, width: int) -> bool:
    """Return whether d_lora_b and ds are computed in two passes over dy ``[M, N]``.

    One pass writes and reads a partial sum of ds for each tile of N, 8 bytes per element. For large
    ranks, this is more than a second read of dy, with ``width`` bytes per element. For many rows
    and columns, it is more memory than a launch may use.
    """
    partials = cdiv(n, config.block_n)
    if partials == 1:
        return False
    of_b = config.splits * n * (r + 1) if config.splits > 1 else 0
    too_large = 4 * (partials * m * r + of_b) > MAX_PARTIAL_BYTES
    return too_large or (r >= _TWICE_FROM_RANK and 8 * partials * r >= width * n)


class GradBPass(NamedTuple):
    """A launch of `mixed_lora_grad_b`.

    Attributes:
        first, stop: The columns of dy that it reads.
        with_ds: Whether it writes partial sums of ds.
        with_factors: Whether it writes partial sums of the factors' gradients.
    """

    first: int
    stop: int
    with_ds: bool
    with_factors: bool


def mixed_grad_b_passes(
    config: KernelConfig, m: int, n: int, r: int, runs: int, with_factors: bool
) -> list[GradBPass]:
    """Return the launches that read dy ``[M, N]`` of a mixed batch.

    One launch reads all columns if its partial sums fit `MAX_PARTIAL_BYTES`. Otherwise, launches
    for ds come first. They read adjacent columns, and each adds to the partial sums of the one
    before. Launches for the gradients of the factors follow.

    Args:
        config: Config of `mixed_lora_grad_b`.
        m: Number of rows.
        n: Number of columns.
        r: Largest rank.
        runs: Number of partial sums of each factor's gradient.
        with_factors: Whether the gradients of the factors are computed.
    """
    block = config.block_n
    of_ds, of_factors = 4 * m * r, 4 * runs * block * (r + 1) * with_factors
    if cdiv(n, block) * (of_ds + of_factors) <= MAX_PARTIAL_BYTES:
        return [GradBPass(0, n, True, with_factors)]
    passes = []
    for size, with_ds in ((of_ds, True), (of_factors, False)):
        step = max(MAX_PARTIAL_BYTES // max(size, 1), 1) * block
        if with_ds or with_factors:
            starts = range(0, n, step)
            passes += [GradBPass(a, min(a + step, n), with_ds, not with_ds) for a in starts]
    return passes


def sums_s_once(
    chip: Chip, m: int, r: int, splits: int, column_tiles: int, y_bytes: int = 0
) -> bool:
    """Return whether a launch of its own adds the partial sums of s before an expand reads s.

    Otherwise, each column tile of the expand reads the partial sums and adds them. That is faster
    if these loads take less time than the launch.

    Args:
        chip: The chip of the launches.
        m: Number of rows.
        r: Rank of a module, or the largest rank in a mixed batch.
        splits: Number of partial sums.
        column_tiles: Number of column tiles of the expand, in all modules.
        y_bytes: Bytes of y that the expand reads. The partial sums are loaded while it waits for y.
            On some chips, it is a programmatic dependent of the shrink, unless a sum is in between.
    """
    if splits == 1 or m <= FUSED_MAX_ROWS:
        return False
    memory, l2 = chip.rates
    loads = column_tiles * splits * 4 * m * r / l2 - y_bytes / memory
    return INNER_SUM_S + max(loads, 0.0) > (LAUNCH_S if y_bytes else chip.sum_launch_s)


def piece_rows(m: int, batch_invariant: bool = False) -> int:
    """Return the row tile of the kernels that work on pieces, for a mixed batch of ``m`` rows.

    It is small compared to the batch, because a piece has rows of one adapter only.
    """
    if batch_invariant:
        m = INVARIANT_ROWS
    if m <= 128:
        return 16
    return 64 if m <= 2048 else 128


def run_rows(chip: Chip, m: int, columns: int, block_m: int) -> int:
    """Return the number of positions in a run, a multiple of the tile's rows that fills the chip.

    Kernels that sum over the rows of a mixed batch work on runs of sorted positions.

    Args:
        chip: The chip of the launch.
        m: Number of rows of the batch. May be symbolic, because a compiled graph serves any number
            of rows.
        columns: Number of programs that share a row of dy or x.
        block_m: Rows of the launch's tile.
    """
    # Three quarters of the chip's processors, as in the choice of a tile.
    wanted = cdiv(3 * chip.num_sms, 4 * max(columns, 1))
    steps = torch.sym_max(cdiv(m, block_m), 1)
    runs = torch.sym_max(torch.sym_min(wanted, steps // _MIN_STEPS), 1)
    return cdiv(steps, runs) * block_m


def _splits_that_fit(
    kernel: str, splits: int, mnkr: tuple[int, int, int, int], group_size: int
) -> int:
    """Return the number of splits, halved until their partial sums fit `MAX_PARTIAL_BYTES`."""
    m, n, k, r = mnkr
    elements = {
        "lora_shrink": m * r,
        "lora_linear": m * n,
        "lora_grad_b": n * (r + 1),
        "lora_grad_a": group_size * r * k,
    }.get(kernel, 0)
    while splits > 1 and 4 * splits * elements > MAX_PARTIAL_BYTES:
        splits //= 2
    return splits


def _measured(
    rows: Sequence[ConfigRow], m: int, n: int, k: int, r: int, group_size: int = 1
) -> list[ConfigRow]:
    """Return the measurements that cover a problem."""
    return [row for row in rows if row.is_measured and row.covers(m, n, k, r, group_size)]


def bucket_of(m: int, rows: Sequence[ConfigRow]) -> list[ConfigRow]:
    """Return the candidates for m rows.

    Up to 64 rows, the tile covers all of them. For more rows, 64-row tiles are also candidates,
    because they give more programs.
    """
    candidates = [row for row in rows if not row.is_measured]
    sizes = [row.block_m for row in candidates]
    bucket = min((size for size in sizes if m <= size), default=max(sizes))
    return [row for row in candidates if min(bucket, 64) <= row.block_m <= bucket]


def _on_grid(
    chip: Chip,
    launch: str,
    rows: Sequence[ConfigRow],
    mnkr: tuple[int, int, int, int],
    group_size: int,
    width: int,
) -> tuple[ConfigRow, int]:
    """Return the best row for the problem, and the number of splits of its sums."""
    kernel = kernel_of(launch)
    if kernel not in GRIDS:
        return rows[0], 1
    (first, second), split = GRIDS[kernel]
    m, n, k, r = mnkr
    sizes = {"m": m, "n": k if "grad_x" in launch else n, "k": k, "r": r}
    choices = []
    if kernel == "lora_expand":
        rows = [row for row in rows if _suits_rank(row, r)] or rows
    for index, row in enumerate(rows):
        block_r = block_r_of(kernel, row, r, group_size)
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
            partials = shared + (splits * sizes[first] if splits > 1 else 0)
            cost = (tiles["r"], not _fills(chip, splits * programs, loads), partials)
        else:
            # The first candidate that fills the chip, or else the last one. Among those that read x
            # equally often, a candidate that needs no partial sums comes first.
            idle = not _fills(chip, (MAX_SPLITS if split else 1) * programs, loads)
            reads, partials = (tiles["r"], splits > 1) if split and not idle else (0, 0)
            cost = (idle, -index if idle else reads, partials)
        choices.append((cost, index, row, splits))
    _, _, row, splits = min(choices)
    return row, splits


def _suits_rank(row: ConfigRow, r: int) -> bool:
    """Return whether a tile of an expand is for rank ``r``.

    A tile without chunks is for ranks that fill more than half of a BLOCK_R.
    """
    return has_chunks(row) or row.blocks_r[0] < 2 * r <= 2 * row.blocks_r[-1]


def _of_decode(
    chip: Chip,
    bandwidths: tuple[float, float, float] | None,
    rows: Sequence[ConfigRow],
    mnkr: tuple[int, int, int, int],
    width: float,
    most: int,
) -> tuple[ConfigRow, int]:
    """Return the row of a linear that reads its weight once, and the number of splits of K.

    The choice is the widest tile, with its fewest splits, that `_decode_seconds` puts within
    `_LEAST_GAIN` of the fastest. All numbers of rows that one tile covers get the same choice, so
    that they run the same kernel.

    Args:
        chip: The chip of the launch.
        bandwidths: The chip's, or None if they are unknown or do not limit the launch. Then
            `_widest_that_fills` chooses.
        rows: The measured row, or the candidates from the widest tile to the narrowest.
        mnkr: M, N, K, and the rank.
        width: Bytes per element of the weight.
        most: The largest number of splits.
    """
    if rows[0].is_measured:
        return rows[0], 1
    if bandwidths is None:
        return _widest_that_fills(chip, rows, mnkr, width, most)
    _, n, k, r = mnkr
    wanted = chip.bytes_in_flight
    choices = [
        (_decode_seconds(bandwidths, wanted, row, splits, n, k, r, width), row, splits)
        for row in rows
        for splits in (1, 2, 4)
        if splits == 1 or splits <= min(most, cdiv(k, row.block_k) // _MIN_STEPS)
    ]
    limit = (1 + _LEAST_GAIN) * min(seconds for seconds, _, _ in choices)
    return next((row, splits) for seconds, row, splits in choices if seconds <= limit)


def _decode_seconds(
    bandwidths: tuple[float, float, float],
    bytes_in_flight: int,
    row: ConfigRow,
    splits: int,
    n: int,
    k: int,
    r: int,
    width: float,
) -> float:
    """Return the estimated time of a linear with one full tile of rows, in seconds.

    The estimate is the time of the launches plus the longest of three times: of the distinct bytes
    through memory, at the share of its bandwidth that the loads in flight reach; of all loads and
    stores through the L2 cache; and of one program. Each tile of columns loads x and the partial
    sums of the shrink. Partial sums of y are written, read, and added by another launch.
    """
    memory, l2, program = bandwidths
    m, columns = row.block_m, max(cdiv(n, row.block_n), 1)
    x, weight, lora_b = width * m * k, width * n * k, width * n * r
    s, y = 4 * MAX_SPLITS * m * r, width * m * n
    partials = 4 * splits * m * n if splits > 1 else 0
    stored = partials or y
    step, steps = width * row.block_k * (m + row.block_n), cdiv(cdiv(k, row.block_k), splits)
    in_flight = columns * splits * max(row.num_stages - 1, 1) * step
    share = min(in_flight / bytes_in_flight, 1)
    work = max(
        (x + weight + lora_b + s) / (share * memory) + stored / memory,
        (columns * (x + s) + weight + splits * lora_b + stored) / l2,
        _PROGRAM_SECONDS + steps * step / program,
    )
    if not partials:
        return _LAUNCH_SECONDS + work
    return 2 * _LAUNCH_SECONDS + work + (partials + y) / memory


def _widest_that_fills(
    chip: Chip,
    rows: Sequence[ConfigRow],
    mnkr: tuple[int, int, int, int],
    width: float,
    most: int,
) -> tuple[ConfigRow, int]:
    """Return the widest row that fills the chip, or the narrowest row, and its splits of K.

    Programs of the narrowest tile share K as long as their weight loads keep the memory less than
    half busy, because partial sums cost time as well.
    """
    m, n, k, _ = mnkr
    for row in rows:
        programs = cdiv(m, row.block_m) * cdiv(n, row.block_n)
        if _fills(chip, programs):
            return row, 1
    most, splits = min(most, cdiv(k, row.block_k) // _MIN_STEPS), 1
    loads = programs * _in_flight("lora_linear", row) * width
    wanted = min(chip.bytes_in_flight, n * k * width)
    while 2 * splits * loads <= wanted and 2 * splits <= most:
        splits *= 2
    return row, splits


def _fills(chip: Chip, programs: int, loads: int = 0) -> bool:
    """Return whether enough programs run, with enough loads in flight, to fill the chip.

    Three quarters of the processors must get a program.

    ``loads`` is the number of bytes that a program has in flight, or 0 if it does not matter.
    """
    return 4 * programs >= 3 * chip.num_sms and (
        not loads or programs * loads >= chip.bytes_in_flight
    )


def _in_flight(kernel: str, row: ConfigRow) -> int:
    """Return the number of elements that a program of a streaming kernel has in flight, or 0."""
    tile = {
        "lora_shrink": row.block_m * row.block_k,
        "lora_grad_a": row.block_m * row.block_k,
        "lora_linear": row.block_n * row.block_k,
    }.get(kernel, 0)
    return max(row.num_stages - 1, 1) * tile


def has_chunks(row: ConfigRow) -> bool:
    """Return whether a tile has a BLOCK_R for the chunks of large ranks."""
    return row.blocks_r[0] <= _MAX_CHUNK_R


def block_r_of(kernel: str, row: ConfigRow, r: int, group_size: int = 1) -> int:
    """Return the smallest BLOCK_R of a row that holds ``r`` rank rows, or the largest available."""
    blocks = row.blocks_r or (0,)
    if kernel == "lora_grad_a":
        blocks = tuple(b for b in blocks if group_size * b <= MAX_RANK_ROWS) or blocks[:1]
    if kernel in CHUNKED and r > blocks[-1]:
        return max(block for block in blocks if block <= _MAX_CHUNK_R)
    return next((block for block in blocks if r <= block), blocks[-1])


for _arch, _path in measurements.files():
    measurements.put_first(_arch, config_files.read(_path)[0], _path)
