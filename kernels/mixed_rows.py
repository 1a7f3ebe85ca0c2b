"""Shared functions of the kernels for mixed batches, for rows and for rank rows of many adapters.

Rows are in sorted positions (`fastlora.ops.rows`): x and y are gathered and scattered through
``order``, and s is at sorted positions. Addresses, ranks, and scalings of a module are read from
tables with one entry per slot. The rank of an adapter bounds every load.

In most kernels, a program has one piece, and therefore one adapter. In the epilogue of
`mixed_lora_linear` (`add_rank_rows`), the rank rows of all adapters in a tile of positions are side
by side as columns. A segment takes a multiple of 16 columns, so that 16 adjacent columns belong to
one adapter. Columns beyond its rank are masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastlora.kernels.philox import philox_keep_rows
from fastlora.kernels.rank_rows import sum_planes

# Adjacent columns that belong to one adapter: the K dimension of a tensor-core instruction.
COLUMNS: tl.constexpr = tl.constexpr(16)
# Slot of rows with an id out of range (`fastlora.ops.rows.INVALID_SLOT`).
INVALID_SLOT: tl.constexpr = tl.constexpr(-2)
# The shrink fills a row of s up to a multiple of this, so that 16 bytes of fp32 are one load.
S_COLUMNS: tl.constexpr = tl.constexpr(4)
# Read element by element: do not specialize kernels on the alignment of these addresses.
TABLES = [
    "order_ptr",
    "segment_of_ptr",
    "segment_slot_ptr",
    "piece_start_ptr",
    "lora_a_address_ptr",
    "lora_b_address_ptr",
    "lora_bias_address_ptr",
    "scale_address_ptr",
    "rank_ptr",
    "scaling_ptr",
    "slot_start_ptr",
    "seed_ptr",
    "threshold_ptr",
    "inv_keep_ptr",
    "offset_ptr",
    "bias_offset_ptr",
]
_TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


class RankRows(NamedTuple):
    """The rank rows of adapters by address: lora_a for a shrink, or lora_b to add to rows of y.

    Tables are ``[G, S]`` for the G modules of one launch, or ``[S]`` for one module. Factors are
    contiguous and begin at multiples of 16 bytes.

    Attributes:
        address: int64 address of lora_a ``[rank, K]`` or of lora_b.
        bias_address: int64 address of lora_bias, 0 for none; None if no adapter has one.
        rank: int32, 0 if the adapter does not adapt the module.
        scaling: fp32; None for 1.
        dtype: Dtype of the factors, which are cast to the dtype of the dots at the load.
        largest: Upper bound of the ranks.
        by_column: Whether lora_b is stored as ``[N, rank]`` rather than as rank rows ``[rank, N]``.
    """

    address: torch.Tensor
    bias_address: torch.Tensor | None
    rank: torch.Tensor
    scaling: torch.Tensor | None
    dtype: torch.dtype
    largest: int
    by_column: bool = False

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of a kernel that adds the rank rows."""
        return {
            "lora_b_address_ptr": self.address,
            "lora_bias_address_ptr": self.bias_address,
            "rank_ptr": self.rank,
            "scaling_ptr": self.scaling,
            "HAS_LORA_BIAS": self.bias_address is not None,
            "FACTOR_DTYPE": triton_dtype(self.dtype),
            "BY_COLUMN": self.by_column,
        }


class DropoutTables(NamedTuple):
    """Dropout of one module's adapters, by slot. An adapter without dropout has a threshold of 0.

    Attributes:
        seed: int64 ``[S]``.
        threshold: int32 ``[S]``, round(p * 65536).
        inv_keep: fp32 ``[S]``, 1 / (1 - p).
    """

    seed: torch.Tensor
    threshold: torch.Tensor
    inv_keep: torch.Tensor

    @staticmethod
    def arguments(
        tables: DropoutTables | None, rows: Sequence[torch.Tensor]
    ) -> dict[str, torch.Tensor | bool | None]:
        """Return the arguments of a kernel that may drop elements of sorted rows.

        A row's number among its adapter's rows is its position minus the slot_start of its slot.
        """
        found = (None,) * 4 if tables is None else (rows[3], *tables)
        names = ("slot_start_ptr", "seed_ptr", "threshold_ptr", "inv_keep_ptr")
        return {**dict(zip(names, found, strict=True)), "HAS_DROPOUT": tables is not None}


def row_arguments(rows: Sequence[torch.Tensor], pieces: bool = True) -> dict[str, torch.Tensor]:
    """Return the arguments with which a kernel finds its rows, with or without pieces.

    ``rows`` are int32 tensors. The first four are those of `fastlora.ops.rows.Rows`: order ``[M]``,
    segment_of ``[M]``, segment_slot ``[segments]``, and slot_start ``[S + 1]``. Pieces follow.
    """
    order, segment_of, segment_slot, _, starts = rows
    found = {"order_ptr": order, "segment_of_ptr": segment_of, "segment_slot_ptr": segment_slot}
    return {**found, "piece_start_ptr": starts} if pieces else found


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return Triton's dtype of the factors; raise `TypeError` if no kernel supports it."""
    if dtype not in _TRITON_DTYPES:
        raise TypeError(f"factors have dtype {dtype}, expected float16, bfloat16 or float32")
    return _TRITON_DTYPES[dtype]


@triton.jit
def factor_pointer(address, dtype: tl.constexpr):
    """Return addresses of factors as pointers, known to the compiler as multiples of 16 bytes."""
    pointer = tl.multiple_of(address, 16).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16)


@triton.jit
def load_piece(piece, piece_start_ptr, segment_of_ptr, segment_slot_ptr, M):
    """Return (first_m, stop_m, slot) of a piece: its positions, and its slot, -1 if it is empty.

    The rows may be the first M rows of a larger batch. A piece that reaches beyond M has no slot.
    """
    first_m = tl.load(piece_start_ptr + piece)
    stop_m = tl.load(piece_start_ptr + piece + 1)
    used = first_m < M
    segment = tl.load(segment_of_ptr + first_m, mask=used, other=0)
    slot = tl.load(segment_slot_ptr + segment, mask=used, other=-1)
    return first_m, stop_m, slot


@triton.jit
def round_up(value, to: tl.constexpr):
    """Return the next multiple of ``to``, which the compiler knows as one."""
    return tl.multiple_of((value + (to - 1)) // to * to, to)


@triton.jit
def add_rank_rows(
    acc,
    s_ptr,
    segments,
    tables,
    place,
    num_partials,
    stride_sp,
    stride_sm,
    dtype: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_LORA_BIAS: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BATCH_INVARIANT: tl.constexpr = False,
    BY_COLUMN: tl.constexpr = False,
):
    """Return acc ``[BLOCK_M, BLOCK_N]`` plus ``scaling * (s @ lora_b.T + lora_bias)`` of each row.

    The tile of y begins at sorted position ``first_m`` and output ``first_n`` (int64). The rank
    rows of its segments are side by side and go through one dot, BLOCK_R columns at a time. Rows of
    an invalid id become NaN. Without a ``scaling_ptr``, the scaling is 1. With BY_COLUMN, lora_b
    has the layout of a parameter, ``[N, rank]``.

    BATCH_INVARIANT requires a BLOCK_R of one block. A dot then has the columns of one adapter, and
    the other rows of acc do not change. The terms of a row, their order, and their places in a dot
    therefore depend on its adapter only. Otherwise, the first column of a row depends on the
    segments before its own, and the row takes part in dots with zeros only.
    """
    segment_of_ptr, segment_slot_ptr = segments
    lora_b_address_ptr, lora_bias_address_ptr, rank_ptr, scaling_ptr = tables
    first_m, first_n, M, N = place
    offs = tl.arange(0, BLOCK_M)
    row_segment = tl.load(segment_of_ptr + first_m + offs, mask=offs < M - first_m, other=-1)
    # A tile has at most as many segments as rows, so [BLOCK_M] has room for all of them.
    first_segment = tl.load(segment_of_ptr + first_m)
    last_segment = tl.load(segment_of_ptr + min(first_m + BLOCK_M, M) - 1)
    mask = offs <= last_segment - first_segment
    slots = tl.load(segment_slot_ptr + first_segment + offs, mask=mask, other=-1)
    rows = tl.load(rank_ptr + slots, mask=slots >= 0, other=0)
    if HAS_LORA_BIAS:
        biases = tl.load(lora_bias_address_ptr + slots, mask=slots >= 0, other=0)
        rows += (biases != 0).to(tl.int32)
    blocks = (rows + (COLUMNS - 1)) // COLUMNS
    ends = tl.cumsum(blocks, axis=0)
    num_blocks = tl.sum(blocks, axis=0)

    s_ptr += tl.cast(first_m, tl.int64) * stride_sm
    for start in tl.range(0, num_blocks, BLOCK_R // COLUMNS, num_stages=1):
        # For each column its segment, rank row, the adapter's rank, and its scaling, all [BLOCK_R].
        block = start + tl.arange(0, BLOCK_R // COLUMNS)
        # done: [BLOCK_M, BLOCK_R / COLUMNS], the segments that end before this block
        done = ends[:, None] <= block[None, :]
        segment = first_segment + tl.sum(done.to(tl.int32), axis=0)
        begin = tl.sum(tl.where(done, blocks[:, None], 0), axis=0)
        segment = _columns_of(segment, BLOCK_R)
        r = _columns_of((block - begin) * COLUMNS, BLOCK_R) + tl.arange(0, BLOCK_R) % COLUMNS
        r = tl.max_contiguous(tl.multiple_of(r, COLUMNS), COLUMNS)
        segment = tl.max_constancy(segment, COLUMNS)
        inside = _columns_of(block, BLOCK_R) < num_blocks
        slot = tl.load(segment_slot_ptr + segment, mask=inside, other=0)
        rank = tl.load(rank_ptr + slot, mask=inside, other=0)
        if scaling_ptr is None:
            scale = tl.full((BLOCK_R,), 1.0, dtype=tl.float32)
        else:
            scale = tl.load(scaling_ptr + slot, mask=inside, other=0.0)
        address = tl.load(lora_b_address_ptr + slot, mask=inside, other=0)
        mask_r = r < rank
        row = r
        width = rank
        if HAS_LORA_BIAS:  # the bias is one more rank row
            lora_bias = tl.load(lora_bias_address_ptr + slot, mask=inside, other=0)
            is_bias = (r == rank) & (lora_bias != 0)
            address = tl.where(is_bias, lora_bias, address)
            row = tl.where(is_bias, 0, row)
            width = tl.where(is_bias, 1, width)
            mask_r = mask_r | is_bias
        offs_n = tl.arange(0, BLOCK_N)
        if BY_COLUMN:
            b_ptrs = factor_pointer(address, FACTOR_DTYPE) + row
            b_ptrs = b_ptrs[:, None] + (first_n + offs_n)[None, :] * width[:, None]
        else:
            b_ptrs = factor_pointer(address, FACTOR_DTYPE) + tl.cast(row, tl.int64) * N + first_n
            b_ptrs = b_ptrs[:, None] + offs_n[None, :]
        mask_b = mask_r[:, None] & (offs_n < N - first_n)[None, :]
        # b: [BLOCK_R, BLOCK_N] in its own dtype, with zeros beyond an adapter's rank
        b = tl.load(b_ptrs, mask=mask_b, other=0.0)

        # The dot has columns of several adapters, so both operands are selected. s is zero in
        # columns of other adapters. Non-finite elements of b are left out here, and set in the
        # adapter's rows later.
        offs_m = tl.arange(0, BLOCK_M)
        own = row_segment[:, None] == segment[None, :]
        s_ptrs = s_ptr + offs_m[:, None] * stride_sm + r[None, :]
        filled = r < round_up(rank, S_COLUMNS)
        mask_s = tl.max_constancy(own & filled[None, :], [1, S_COLUMNS])
        # s: [BLOCK_M, BLOCK_R]
        s = sum_planes(s_ptrs, mask_s, stride_sp, num_partials, BLOCK_M, BLOCK_R, 2)
        if HAS_LORA_BIAS:
            s = tl.where(own & (r == rank)[None, :], 1.0, s)
        scaled = (b.to(tl.float32) * scale[:, None]).to(dtype)
        finite = tl.abs(scaled.to(tl.float32)) < float("inf")
        clean = tl.where(finite, scaled, 0.0)
        # [BLOCK_M, BLOCK_R] x [BLOCK_R, BLOCK_N]
        added = tl.dot(s.to(dtype), clean, acc, input_precision=INPUT_PRECISION)
        if BATCH_INVARIANT:
            # Arithmetic would not be exact: -0.0 plus zeros is 0.0, and an instruction may round
            # acc again.
            added = tl.where(row_segment[:, None] == tl.max(segment, axis=0), added, acc)
        acc = added
        spoilt = tl.where(finite, 0, 1)
        if tl.max(tl.max(spoilt, axis=1), axis=0) != 0:  # rare
            for one in range(tl.min(segment, axis=0), tl.max(segment, axis=0) + 1):
                columns = tl.max(tl.where((segment == one)[:, None], spoilt, 0), axis=0)
                hit = (row_segment == one)[:, None] & (columns != 0)[None, :]
                acc = tl.where(hit, float("nan"), acc)

    row_slot = tl.load(segment_slot_ptr + row_segment, mask=row_segment >= 0, other=0)
    invalid = row_slot == INVALID_SLOT
    return tl.where(invalid[:, None], float("nan"), acc)


@triton.jit
def _columns_of(blocks, BLOCK_R: tl.constexpr):
    """Return the value of each column's block, ``[BLOCK_R]``."""
    spread = tl.broadcast_to(blocks[:, None], (BLOCK_R // COLUMNS, COLUMNS))
    return tl.reshape(spread, (BLOCK_R,))


@triton.jit
def drop_rows(
    acc, segments, drop, first_m, first_n, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Return acc ``[BLOCK_M, BLOCK_N]`` after the dropout of each row's own adapter.

    The tile begins at sorted position ``first_m`` and column ``first_n``. Elements are selected
    rather than multiplied, so that nothing of a dropped element remains. Rows without an adapter do
    not change.
    """
    segment_of_ptr, segment_slot_ptr = segments
    slot_start_ptr, seed_ptr, threshold_ptr, inv_keep_ptr = drop
    position = first_m + tl.arange(0, BLOCK_M)
    inside = position < M
    segment = tl.load(segment_of_ptr + position, mask=inside, other=0)
    slot = tl.load(segment_slot_ptr + segment, mask=inside, other=-1)
    row = position - tl.load(slot_start_ptr + slot, mask=slot >= 0, other=0)
    seed = tl.load(seed_ptr + slot, mask=slot >= 0, other=0)
    threshold = tl.load(threshold_ptr + slot, mask=slot >= 0, other=0)
    inv_keep = tl.load(inv_keep_ptr + slot, mask=slot >= 0, other=1.0)
    keep = philox_keep_rows(seed[:, None], row, first_n, threshold[:, None], 0, BLOCK_M, BLOCK_N)
    return tl.where(keep, acc * inv_keep[:, None], 0.0)


@triton.jit
def sibling_columns(
    column,
    slot,
    rank_ptr,
    stride_table,
    modules,
    G: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return (member, r, own, filled) of columns ``[BLOCK_R]`` with the rank rows of all modules.

    There are at most G modules. The rank rows of a slot in all modules are side by side, and each
    module is filled up to a multiple of 4 columns. ``member`` is the module and ``r`` the rank row
    of a column. ``own`` says which columns are rank rows, and ``filled`` also includes the filling.
    """
    member = tl.zeros((BLOCK_R,), dtype=tl.int32)
    r = column  # beyond the last one too, so that callers can rely on r's alignment
    own = column < 0
    filled = column < 0
    begin = 0
    for g in tl.static_range(G):
        rank = tl.load(rank_ptr + g * stride_table + slot, mask=g < modules, other=0)
        end = begin + round_up(rank, S_COLUMNS)
        here = (column >= begin) & (column < end)
        member = tl.where(here, g, member)
        r = tl.where(here, column - begin, r)
        own = own | (here & (column - begin < rank))
        filled = filled | here
        begin = end
    return member, r, own, filled
