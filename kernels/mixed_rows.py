"""Mixed batches: what the kernels share about the rows and the rank rows of many adapters.

Rows stand in sorted positions (`fastlora.row_groups`): x and y are gathered and scattered through
``order``, s lies at sorted positions. The rank rows of all adapters that a tile of positions holds
stand side by side as its columns: a segment takes a multiple of 16 columns, so that 16 neighbours
belong to one adapter, and what lies past its true rank is masked. A module's addresses, ranks and
scalings are read from tables with one entry a slot; an adapter's own rank bounds every load.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels.rank_rows import sum_planes

# Columns that belong to one adapter: the K of a tensor-core instruction.
COLUMNS: tl.constexpr = tl.constexpr(16)
# Slot of rows whose id is out of range (`fastlora.row_groups.INVALID_SLOT`).
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
    "rank_ptr",
    "scaling_ptr",
]
_TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


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
def round_up(value, to: tl.constexpr):
    """Returns the next multiple of ``to``, known as one to the compiler."""
    return tl.multiple_of((value + (to - 1)) // to * to, to)


@triton.jit
def add_rank_rows(
    acc,
    s_ptr,
    segment_of_ptr,
    segment_slot_ptr,
    lora_b_address_ptr,
    lora_bias_address_ptr,
    rank_ptr,
    scaling_ptr,
    first_m,
    first_n,
    M,
    N,
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
):
    """Returns acc ``[BLOCK_M, BLOCK_N]`` plus ``scaling * (s @ lora_b.T + lora_bias)`` of each row.

    For the tile of y at sorted position ``first_m`` and output ``first_n`` (int64). The rank rows
    of its segments stand side by side and go through one dot BLOCK_R columns at a time. Rows of an
    invalid id become NaN.

    With BATCH_INVARIANT, which takes BLOCK_R of one block, a dot holds one adapter's columns and
    leaves every other row of acc as it was: what a row adds up, in which order and from which place
    in a dot is then its adapter's alone. Otherwise a row's columns start wherever those of the
    segments before it end, and it lives through dots that are all zeros for it.
    """
    offs = tl.arange(0, BLOCK_M)
    row_segment = tl.load(segment_of_ptr + first_m + offs, mask=offs < M - first_m, other=-1)
    # A tile has at most as many segments as rows: [BLOCK_M] holds them all.
    first_segment = tl.load(segment_of_ptr + first_m)
    last_segment = tl.load(segment_of_ptr + min(first_m + BLOCK_M, M) - 1)
    mask = offs <= last_segment - first_segment
    slot = tl.load(segment_slot_ptr + first_segment + offs, mask=mask, other=-1)
    rows = tl.load(rank_ptr + slot, mask=slot >= 0, other=0)
    if HAS_LORA_BIAS:
        lora_bias = tl.load(lora_bias_address_ptr + slot, mask=slot >= 0, other=0)
        rows += (lora_bias != 0).to(tl.int32)
    blocks = (rows + (COLUMNS - 1)) // COLUMNS
    ends = tl.cumsum(blocks, axis=0)
    num_blocks = tl.sum(blocks, axis=0)

    s_ptr += tl.cast(first_m, tl.int64) * stride_sm
    for start in tl.range(0, num_blocks, BLOCK_R // COLUMNS, num_stages=1):
        segment, r, rank, scale, b = _load_chunk(
            segment_slot_ptr,
            lora_b_address_ptr,
            lora_bias_address_ptr,
            rank_ptr,
            scaling_ptr,
            first_segment,
            blocks,
            ends,
            num_blocks,
            start,
            first_n,
            N,
            BLOCK_N=BLOCK_N,
            BLOCK_R=BLOCK_R,
            HAS_LORA_BIAS=HAS_LORA_BIAS,
            FACTOR_DTYPE=FACTOR_DTYPE,
        )
        acc = _add_chunk(
            acc,
            s_ptr,
            row_segment,
            segment,
            r,
            rank,
            scale,
            b,
            planes,
            stride_sp,
            stride_sm,
            dtype=dtype,
            BLOCK_M=BLOCK_M,
            BLOCK_R=BLOCK_R,
            HAS_LORA_BIAS=HAS_LORA_BIAS,
            INPUT_PRECISION=INPUT_PRECISION,
            BATCH_INVARIANT=BATCH_INVARIANT,
        )

    # Invalid ids sort before all others.
    invalid = (row_segment == 0) & (tl.load(segment_slot_ptr) == INVALID_SLOT)
    return tl.where(invalid[:, None], float("nan"), acc)


@triton.jit
def _load_chunk(
    segment_slot_ptr,
    lora_b_address_ptr,
    lora_bias_address_ptr,
    rank_ptr,
    scaling_ptr,
    first_segment,
    blocks,
    ends,
    num_blocks,
    first_block,
    first_n,
    N,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_LORA_BIAS: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr,
):
    """Returns (segment, r, rank, scale, b): BLOCK_R of the tile's columns from a block on.

    Segment, rank row, its adapter's rank and scaling, all ``[BLOCK_R]``; lora_b
    ``[BLOCK_R, BLOCK_N]`` as it lies in memory, zeros past an adapter's rank. An adapter's
    lora_bias is its rank row ``r == rank``.
    """
    block = first_block + tl.arange(0, BLOCK_R // COLUMNS)
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
    scale = tl.load(scaling_ptr + slot, mask=inside, other=0.0)
    address = tl.load(lora_b_address_ptr + slot, mask=inside, other=0)
    mask_r = r < rank
    row = r
    if HAS_LORA_BIAS:
        lora_bias = tl.load(lora_bias_address_ptr + slot, mask=inside, other=0)
        is_bias = (r == rank) & (lora_bias != 0)
        address = tl.where(is_bias, lora_bias, address)
        row = tl.where(is_bias, 0, row)
        mask_r = mask_r | is_bias
    offs_n = tl.arange(0, BLOCK_N)
    b_ptrs = factor_pointer(address, FACTOR_DTYPE) + tl.cast(row, tl.int64) * N + first_n
    mask_b = mask_r[:, None] & (offs_n < N - first_n)[None, :]
    # b: [BLOCK_R, BLOCK_N]
    b = tl.load(b_ptrs[:, None] + offs_n[None, :], mask=mask_b, other=0.0)
    return segment, r, rank, scale, b


@triton.jit
def _columns_of(blocks, BLOCK_R: tl.constexpr):
    """Returns the value of each column's block, ``[BLOCK_R]``."""
    spread = tl.broadcast_to(blocks[:, None], (BLOCK_R // COLUMNS, COLUMNS))
    return tl.reshape(spread, (BLOCK_R,))


@triton.jit
def _add_chunk(
    acc,
    s_ptr,
    row_segment,
    segment,
    r,
    rank,
    scale,
    b,
    planes,
    stride_sp,
    stride_sm,
    dtype: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_LORA_BIAS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BATCH_INVARIANT: tl.constexpr,
):
    """Returns acc plus one chunk of `_load_chunk`, to own rows only.

    The dot runs over everybody's columns, so both operands are selected: s is zero where the row is
    not the column's own, and what is not finite in b is left out, then set in own rows.
    """
    offs_m = tl.arange(0, BLOCK_M)
    own = row_segment[:, None] == segment[None, :]
    s_ptrs = s_ptr + offs_m[:, None] * stride_sm + r[None, :]
    filled = r < round_up(rank, S_COLUMNS)
    mask = tl.max_constancy(own & filled[None, :], [1, S_COLUMNS])
    # s: [BLOCK_M, BLOCK_R]
    s = sum_planes(s_ptrs, mask, stride_sp, planes, BLOCK_M, BLOCK_R, 2)
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
    return acc
