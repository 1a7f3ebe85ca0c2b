"""Mixed batches: what the kernels share about the rows and the rank rows of many adapters.

Rows stand in sorted positions (`fastlora.ops.rows`): x and y are gathered and scattered
through ``order``, s lies at sorted positions. A module's addresses, ranks and scalings are read
from tables with one entry a slot; an adapter's own rank bounds every load.

A program of most kernels has one piece, and so one adapter. In the epilogue of `mixed_lora_linear`
(`add_rank_rows`) the rank rows of all adapters that a tile of positions holds stand side by side as
its columns: a segment takes a multiple of 16 columns, so that 16 neighbours belong to one adapter,
and what lies past its true rank is masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastlora.kernels.philox import philox_keep_rows
from fastlora.kernels.rank_rows import sum_planes

# Columns that belong to one adapter: the K of a tensor-core instruction.
COLUMNS: tl.constexpr = tl.constexpr(16)
# Slot of rows whose id is out of range (`fastlora.ops.rows.INVALID_SLOT`).
INVALID_SLOT: tl.constexpr = tl.constexpr(-2)
# Shrink fills a row of s up to a multiple of this, so that 16 bytes of fp32 are one load.
S_COLUMNS: tl.constexpr = tl.constexpr(4)
# Read by single elements: no compile of its own for an address that 16 does not divide.
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
    """Adapters' rank rows behind addresses: those of a shrink, or what adds them to rows of y.

    Tables are ``[G, S]`` for G modules of one launch, else those of one module, ``[S]``. Blocks lie
    at multiples of 16 bytes, contiguous.

    Attributes:
        address: int64, where lora_a ``[rank, K]`` lies, or lora_b.
        bias_address: int64, where lora_bias lies, 0 for none; None if no adapter has one.
        rank: int32, 0 where the adapter leaves the module alone.
        scaling: fp32; None for 1.
        dtype: Of what lies behind the addresses; it is cast to the dtype of the dots at the load.
        largest: No adapter has a larger rank.
        by_column: Whether lora_b lies as ``[N, rank]`` rather than as rank rows ``[rank, N]``.
    """

    address: torch.Tensor
    bias_address: torch.Tensor | None
    rank: torch.Tensor
    scaling: torch.Tensor | None
    dtype: torch.dtype
    largest: int
    by_column: bool = False

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of a kernel that adds them."""
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
    """Dropout of one module's adapters, by slot; an adapter without it has a threshold of 0.

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
        """Returns the arguments of a kernel that may drop elements of sorted rows.

        A row's number among those of its adapter is its position minus its slot's slot_start.
        """
        found = (None,) * 4 if tables is None else (rows[3], *tables)
        names = ("slot_start_ptr", "seed_ptr", "threshold_ptr", "inv_keep_ptr")
        return {**dict(zip(names, found, strict=True)), "HAS_DROPOUT": tables is not None}


def row_arguments(rows: Sequence[torch.Tensor], pieces: bool = True) -> dict[str, torch.Tensor]:
    """Returns the arguments by which a kernel finds its rows, with or without pieces.

    ``rows`` are int32 tensors, the first four those of `fastlora.ops.rows.Rows`: order ``[M]``,
    segment_of ``[M]``, segment_slot ``[segments]``, slot_start ``[S + 1]``, and pieces.
    """
    order, segment_of, segment_slot, _, starts = rows
    found = {"order_ptr": order, "segment_of_ptr": segment_of, "segment_slot_ptr": segment_slot}
    return {**found, "piece_start_ptr": starts} if pieces else found


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Returns Triton's name for the factors' dtype; `TypeError` for one that no kernel reads."""
    if dtype not in _TRITON_DTYPES:
        raise TypeError(f"factors have dtype {dtype}, expected float16, bfloat16 or float32")
    return _TRITON_DTYPES[dtype]


@triton.jit
def factor_pointer(address, dtype: tl.constexpr):
    """Returns addresses of factor blocks as pointers; a block starts at a multiple of 16 bytes."""
    pointer = tl.multiple_of(address, 16).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16)


@triton.jit
def load_piece(piece, piece_start_ptr, segment_of_ptr, segment_slot_ptr, M):
    """Returns (first_m, stop_m, slot): a piece's positions and adapter; -1 for one of no rows."""
    first_m = tl.load(piece_start_ptr + piece)
    stop_m = tl.load(piece_start_ptr + piece + 1)
    used = first_m < M
    segment = tl.load(segment_of_ptr + first_m, mask=used, other=0)
    slot = tl.load(segment_slot_ptr + segment, mask=used, other=-1)
    return first_m, stop_m, slot


@triton.jit
def round_up(value, to: tl.constexpr):
    """Returns the next multiple of ``to``, known as one to the compiler."""
    return tl.multiple_of((value + (to - 1)) // to * to, to)


@triton.jit
def add_rank_rows(
    acc,
    s_ptr,
    segments,
    tables,
    place,
    planes,
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
    """Returns acc ``[BLOCK_M, BLOCK_N]`` plus ``scaling * (s @ lora_b.T + lora_bias)`` of each row.

    For the tile of y at sorted position ``first_m`` and output ``first_n`` (int64). The rank rows
    of its segments stand side by side and go through one dot BLOCK_R columns at a time. Rows of an
    invalid id become NaN. Without a ``scaling_ptr`` the scaling is 1. With BY_COLUMN a lora_b lies
    as a parameter does, ``[N, rank]``.

    With BATCH_INVARIANT, which takes BLOCK_R of one block, a dot holds one adapter's columns and
    leaves every other row of acc as it was: what a row adds up, in which order and from which place
    in a dot is then its adapter's alone. Otherwise a row's columns start wherever those of the
    segments before it end, and it lives through dots that are all zeros for it.
    """
    segment_of_ptr, segment_slot_ptr = segments
    lora_b_address_ptr, lora_bias_address_ptr, rank_ptr, scaling_ptr = tables
    first_m, first_n, M, N = place
    offs = tl.arange(0, BLOCK_M)
    row_segment = tl.load(segment_of_ptr + first_m + offs, mask=offs < M - first_m, other=-1)
    # A tile has at most as many segments as rows: [BLOCK_M] holds them all.
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
        # Of each column its segment, rank row, adapter's rank and scaling, all [BLOCK_R].
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
        if HAS_LORA_BIAS:  # which is the rank row behind the others
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
        # b: [BLOCK_R, BLOCK_N], in its own dtype, zeros past an adapter's rank
        b = tl.load(b_ptrs, mask=mask_b, other=0.0)

        # The dot runs over everybody's columns, so both operands are selected: s is zero where the
        # row is not the column's own; what is not finite in b is left out, then set in own rows.
        offs_m = tl.arange(0, BLOCK_M)
        own = row_segment[:, None] == segment[None, :]
        s_ptrs = s_ptr + offs_m[:, None] * stride_sm + r[None, :]
        filled = r < round_up(rank, S_COLUMNS)
        mask_s = tl.max_constancy(own & filled[None, :], [1, S_COLUMNS])
        # s: [BLOCK_M, BLOCK_R]
        s = sum_planes(s_ptrs, mask_s, stride_sp, planes, BLOCK_M, BLOCK_R, 2)
        if HAS_LORA_BIAS:
            s = tl.where(own & (r == rank)[None, :], 1.0, s)
        scaled = (b.to(tl.float32) * scale[:, None]).to(dtype)
        finite = tl.abs(scaled.to(tl.float32)) < float("inf")
        clean = tl.where(finite, scaled, 0.0)
        # [BLOCK_M, BLOCK_R] x [BLOCK_R, BLOCK_N]
        added = tl.dot(s.to(dtype), clean, acc, input_precision=INPUT_PRECISION)
        if BATCH_INVARIANT:
            # Not left to arithmetic: -0.0 plus zeros is 0.0, and an instruction may round acc anew.
            added = tl.where(row_segment[:, None] == tl.max(segment, axis=0), added, acc)
        acc = added
        spoilt = tl.where(finite, 0, 1)
        if tl.max(tl.max(spoilt, axis=1), axis=0) != 0:  # rare
            for one in range(tl.min(segment, axis=0), tl.max(segment, axis=0) + 1):
                columns = tl.max(tl.where((segment == one)[:, None], spoilt, 0), axis=0)
                hit = (row_segment == one)[:, None] & (columns != 0)[None, :]
                acc = tl.where(hit, float("nan"), acc)

    # Invalid ids sort before all others.
    invalid = (row_segment == 0) & (tl.load(segment_slot_ptr) == INVALID_SLOT)
    return tl.where(invalid[:, None], float("nan"), acc)


@triton.jit
def _columns_of(blocks, BLOCK_R: tl.constexpr):
    """Returns the value of each column's block, ``[BLOCK_R]``."""
    spread = tl.broadcast_to(blocks[:, None], (BLOCK_R // COLUMNS, COLUMNS))
    return tl.reshape(spread, (BLOCK_R,))


@triton.jit
def drop_rows(
    acc, segments, drop, first_m, first_n, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Returns acc ``[BLOCK_M, BLOCK_N]`` after the dropout of each row's own adapter.

    For the tile at sorted position ``first_m`` and column ``first_n``. By selection, so that
    nothing of a dropped element is left; rows without an adapter stay.
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
    G: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Returns (sibling, r, own, filled) of columns ``[BLOCK_R]`` that hold G modules' rank rows.

    A slot's rank rows of all modules stand side by side, each module's filled up to fours: ``own``
    says which columns are rank rows, ``filled`` which are these or the filling.
    """
    sibling = tl.zeros((BLOCK_R,), dtype=tl.int32)
    r = column  # past the last one too, what a caller says of r's alignment holds
    own = column < 0
    filled = column < 0
    begin = 0
    for g in tl.static_range(G):
        rank = tl.load(rank_ptr + g * stride_table + slot)
        end = begin + round_up(rank, S_COLUMNS)
        here = (column >= begin) & (column < end)
        sibling = tl.where(here, g, sibling)
        r = tl.where(here, column - begin, r)
        own = own | (here & (column - begin < rank))
        filled = filled | here
        begin = end
    return sibling, r, own, filled
