"""``s = dropout(x) @ lora_a.T`` with each row's own adapter, for all modules fed by one x.

x ``[M, K]`` in any order of rows, lora_a ``[rank, K]`` of each adapter and module behind tables
``[G, S]``; s are fp32 planes ``[splits, G, M, R]`` over sorted positions, one a split of K, which
`mixed_lora_linear` and `mixed_lora_expand` sum in their order. A row of s is written up to its
adapter's rank, in fours; rows without an adapter are not written. Dropout, which every module has
for itself, takes a launch for each.

Bytes moved, e and f an element of x and of the factors: ``e M' K``, M' the rows with an adapter,
once for each BLOCK_R columns; ``f K`` a rank row of every adapter present, read once a piece; and
``4 splits`` an element of s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastlora.kernels.arguments import strides
from fastlora.kernels.launch import kept, launch
from fastlora.kernels.mixed_rows import (
    S_COLUMNS,
    TABLES,
    DropoutTables,
    RankRows,
    factor_pointer,
    load_piece,
    round_up,
    row_arguments,
    sibling_columns,
    triton_dtype,
)
from fastlora.kernels.philox import philox_keep_mask
from fastlora.kernels.tables import KernelConfig, cdiv


@triton.jit
def _shrink_columns(
    start,
    tensors,
    rows,
    sizes,
    drop,
    strides,
    G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Writes BLOCK_R columns of s: the modules' rank rows side by side, each module's in fours."""
    s_ptr, x_ptr, lora_a_address_ptr, rank_ptr = tensors
    slot, offs_xm, mask_m = rows
    first_k, last_k, K, R = sizes
    first_row, seed, threshold, inv_keep = drop
    stride_sg, stride_sm, stride_xk, stride_table = strides
    offs_m = tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    column = start + tl.arange(0, BLOCK_R)
    sibling, r, mask_a, mask_s = sibling_columns(column, slot, rank_ptr, stride_table, G, BLOCK_R)
    address = tl.load(lora_a_address_ptr + sibling * stride_table + slot, mask=mask_s, other=0)
    a_ptrs = factor_pointer(address, FACTOR_DTYPE) + tl.cast(r, tl.int64) * K + first_k
    a_ptrs = a_ptrs[None, :] + offs_k[:, None]
    offs_x = offs_xm[:, None] + offs_k[None, :] * stride_xk
    x_ptr += tl.cast(first_k, tl.int64) * stride_xk

    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(first_k, last_k, BLOCK_K):
        mask_xk = mask_m[:, None]
        mask_ak = mask_a[None, :]
        if not EVEN_K:
            mask_k = offs_k < K - k
            mask_xk = mask_xk & mask_k[None, :]
            mask_ak = mask_ak & mask_k[:, None]
        # x: [BLOCK_M, BLOCK_K], a: [BLOCK_K, BLOCK_R]
        x = tl.load(x_ptr + offs_x, mask=mask_xk, other=0.0)
        a = tl.load(a_ptrs, mask=mask_ak, other=0.0)
        if HAS_DROPOUT:
            keep = philox_keep_mask(seed, first_row, k, threshold, 0, BLOCK_M, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        # [BLOCK_M, BLOCK_K] x [BLOCK_K, BLOCK_R]
        acc = tl.dot(x, a.to(x.dtype), acc, input_precision=INPUT_PRECISION)
        x_ptr += tl.cast(stride_xk, tl.int64) * BLOCK_K
        a_ptrs += BLOCK_K

    if HAS_DROPOUT:
        acc *= inv_keep
    # s: [BLOCK_M, BLOCK_R]
    r = tl.max_contiguous(tl.multiple_of(r, S_COLUMNS), S_COLUMNS)
    # A rank table may come to hold more than s was allocated for, under a graph captured before.
    mask_s = mask_s & (r < R)
    offs_s = tl.cast(sibling, tl.int64) * stride_sg + r
    s_ptrs = s_ptr + offs_m[:, None] * stride_sm + offs_s[None, :]
    tl.store(s_ptrs, acc.to(s_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_s[None, :])


# M varies from call to call: no compile of its own for 1 or a multiple of 16.
@triton.jit(do_not_specialize=["M", "stride_table"], do_not_specialize_on_alignment=TABLES)
def _mixed_lora_shrink_kernel(
    # tensors
    s_ptr,
    x_ptr,
    order_ptr,
    segment_of_ptr,
    segment_slot_ptr,
    piece_start_ptr,
    lora_a_address_ptr,
    rank_ptr,
    slot_start_ptr,
    seed_ptr,
    threshold_ptr,
    inv_keep_ptr,
    # scalars
    M,
    K,
    R,
    k_per_split,
    # strides
    stride_sp,
    stride_sg,
    stride_sm,
    stride_xm,
    stride_xk,
    stride_table,
    # meta
    G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NARROW_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    LAUNCH_DEPENDENTS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    if LAUNCH_DEPENDENTS:
        tl.extra.cuda.gdc_launch_dependents()
    split = tl.program_id(1)
    first_m, stop_m, slot = load_piece(
        tl.program_id(0), piece_start_ptr, segment_of_ptr, segment_slot_ptr, M
    )
    columns = 0
    for g in tl.static_range(G):
        rank = tl.load(rank_ptr + g * stride_table + slot, mask=slot >= 0, other=0)
        columns += round_up(rank, S_COLUMNS)

    if columns > 0:
        offs_m = tl.arange(0, BLOCK_M)
        mask_m = offs_m < stop_m - first_m
        offs_xm = tl.load(order_ptr + first_m + offs_m, mask=mask_m, other=0).to(tl.int64)
        offs_xm *= stride_xm
        first_k = split * k_per_split
        last_k = min(first_k + k_per_split, K)
        first_row, seed, threshold, inv_keep = 0, 0, 0, 1.0
        if HAS_DROPOUT:
            # The row's number among those of its adapter, whatever else is in the batch.
            first_row = first_m - tl.load(slot_start_ptr + slot)
            seed = tl.load(seed_ptr + slot)
            threshold = tl.load(threshold_ptr + slot)
            inv_keep = tl.load(inv_keep_ptr + slot)
        s_ptr += tl.cast(split, tl.int64) * stride_sp + tl.cast(first_m, tl.int64) * stride_sm
        tensors = s_ptr, x_ptr, lora_a_address_ptr, rank_ptr
        rows = slot, offs_xm, mask_m
        sizes = first_k, last_k, K, R
        drop = first_row, seed, threshold, inv_keep
        strides = stride_sg, stride_sm, stride_xk, stride_table
        if columns <= NARROW_R:
            _shrink_columns(
                *(0, tensors, rows, sizes, drop, strides),
                *(G, BLOCK_M, NARROW_R, BLOCK_K, EVEN_K),
                *(FACTOR_DTYPE, HAS_DROPOUT, INPUT_PRECISION),
            )
        else:
            for start in tl.range(0, columns, BLOCK_R, num_stages=1):
                _shrink_columns(
                    *(start, tensors, rows, sizes, drop, strides),
                    *(G, BLOCK_M, BLOCK_R, BLOCK_K, EVEN_K),
                    *(FACTOR_DTYPE, HAS_DROPOUT, INPUT_PRECISION),
                )


@kept
def launch_mixed_lora_shrink(
    s: torch.Tensor,
    x: torch.Tensor,
    rows: Sequence[torch.Tensor],
    down: RankRows,
    *,
    config: KernelConfig,
    dropout: DropoutTables | None = None,
) -> None:
    """Writes each row's ``dropout(x) @ lora_a.T`` for G modules, one plane a split of K.

    Args:
        s: fp32, or in x's dtype if there is one split, ``[splits, G, M, R]``, the last dimension
            contiguous and R a multiple of 4 that is no smaller than any rank; what a larger rank
            has past R is not written.
        x: ``[M, K]``, any strides.
        rows: Sorted, with ``Rows.pieces(config.block_m)``: as `row_arguments` takes them.
        down: Of the G modules, in tables ``[G, S]``.
        config: From `configs.choose`.
        dropout: Of the one module, ``G = 1``; None for none.
    """
    m, k = x.shape
    if m == 0:
        return
    splits = s.shape[0]
    launch(
        _mixed_lora_shrink_kernel,
        (rows[-1].shape[0] - 1, splits),
        s_ptr=s,
        x_ptr=x,
        **row_arguments(rows),
        lora_a_address_ptr=down.address,
        rank_ptr=down.rank,
        M=m,
        K=k,
        R=s.shape[3],
        k_per_split=cdiv(cdiv(k, config.block_k), splits) * config.block_k,
        **strides("s", "pgm_", s),
        **strides("x", "mk", x),
        stride_table=down.rank.stride(0),
        G=down.rank.shape[0],
        **config.arguments("mkr"),
        NARROW_R=config.narrow_r,
        EVEN_K=k % config.block_k == 0,
        FACTOR_DTYPE=triton_dtype(down.dtype),
        **DropoutTables.arguments(dropout, rows),
        LAUNCH_DEPENDENTS=config.launch_dependents,
    )
