"""``ds = dy @ lora_b`` and ``d_lora_b = dy.T @ s`` of each row's own adapter, from one read of dy.

dy ``[M, N]`` in any order of rows; s ``[M, R]`` over sorted positions; lora_b ``[N, rank]`` of each
adapter, as its parameter lies, behind a table ``[S]``. A program owns BLOCK_N columns and a piece,
a run of rows of one adapter: d_lora_b stays in registers while it walks down these rows, and every
tile's share of ds goes out as it comes. Nothing is scaled, and shares are fp32 planes that
`mixed_lora_grad_reduce` sums in a fixed order: of ds ``[tiles of N, M, R]``, of d_lora_b
``[P, N, R]`` and, on request, of dy's columns ``[P, N]``. The plane of a piece is the number of its
run of ``rows`` positions plus its slot: both grow from piece to piece, so no two have the same.

Bytes moved, e and f an element of dy and of the factors: ``e M' N``, M' the rows with an adapter,
once for each BLOCK_R rank rows; ``e`` an element of s and ``f`` of lora_b, read once a tile of N
and once a piece; ``4 N / BLOCK_N`` an element of ds; and 4 an element of d_lora_b's planes, one for
each adapter in each run of rows.
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
    RankRows,
    factor_pointer,
    load_piece,
    round_up,
    row_arguments,
    triton_dtype,
)
from fastlora.kernels.row_sums import (
    add_row_sums,
    add_rows,
    store_sum,
    total_row_sums,
    zero_row_sums,
)
from fastlora.kernels.tables import KernelConfig, cdiv


# M and rows vary from call to call: no compile of its own for 1 or a multiple of 16.
@triton.jit(do_not_specialize=["M", "rows"], do_not_specialize_on_alignment=TABLES)
def _mixed_lora_grad_b_kernel(
    # tensors
    ds_ptr,
    d_lora_b_ptr,
    d_bias_ptr,
    dy_ptr,
    s_ptr,
    order_ptr,
    segment_of_ptr,
    segment_slot_ptr,
    piece_start_ptr,
    lora_b_address_ptr,
    rank_ptr,
    # scalars
    M,
    N,
    rows,
    # strides
    stride_dsp,
    stride_dsm,
    stride_dbp,
    stride_dbn,
    stride_dym,
    stride_dyn,
    stride_sm,
    # meta
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr,
    RANK_ROWS_FIRST: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    num_pid_n = tl.cdiv(N, BLOCK_N)
    piece = tl.program_id(0) // num_pid_n
    pid_n = tl.program_id(0) % num_pid_n
    first_r = tl.program_id(1) * BLOCK_R
    first_m, stop_m, slot = load_piece(piece, piece_start_ptr, segment_of_ptr, segment_slot_ptr, M)
    rank = tl.load(rank_ptr + slot, mask=slot >= 0, other=0)

    if rank > first_r:
        first_n = tl.cast(pid_n * BLOCK_N, tl.int64)
        offs_m = tl.arange(0, BLOCK_M)
        offs_n = tl.arange(0, BLOCK_N)
        offs_r = first_r + tl.arange(0, BLOCK_R)
        mask_n = offs_n < N - pid_n * BLOCK_N
        mask_r = offs_r < rank
        filled = offs_r < round_up(rank, S_COLUMNS)
        # b: [BLOCK_N, BLOCK_R], for all rows
        lora_b = factor_pointer(tl.load(lora_b_address_ptr + slot), FACTOR_DTYPE)
        b = tl.load(
            lora_b + (first_n + offs_n)[:, None] * rank + offs_r[None, :],
            mask=mask_n[:, None] & mask_r[None, :],
            other=0.0,
        ).to(dtype)

        dy_ptr += first_n * stride_dyn
        ds_ptr += tl.cast(pid_n, tl.int64) * stride_dsp
        if RANK_ROWS_FIRST:
            acc = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
        else:
            acc = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
        column_sums = zero_row_sums(BLOCK_N, BY_PRODUCT=False)
        for start in tl.range(first_m, stop_m, BLOCK_M):
            mask_m = offs_m < stop_m - start
            row = tl.load(order_ptr + start + offs_m, mask=mask_m, other=0).to(tl.int64)
            at = (start + offs_m).to(tl.int64)
            # dy: [BLOCK_M, BLOCK_N]
            dy = tl.load(
                dy_ptr + (row * stride_dym)[:, None] + offs_n[None, :] * stride_dyn,
                mask=mask_m[:, None] & mask_n[None, :],
                other=0.0,
            )
            # [BLOCK_M, BLOCK_N] x [BLOCK_N, BLOCK_R]
            ds = tl.dot(dy, b, input_precision=INPUT_PRECISION)
            ds_ptrs = ds_ptr + (at * stride_dsm)[:, None] + offs_r[None, :]
            tl.store(ds_ptrs, ds, mask=mask_m[:, None] & filled[None, :])
            if HAS_FACTORS:
                acc = add_rows(
                    acc,
                    dy,
                    s_ptr,
                    at * stride_sm,
                    offs_r,
                    mask_m,
                    mask_r,
                    RANK_ROWS_FIRST=RANK_ROWS_FIRST,
                    INPUT_PRECISION=INPUT_PRECISION,
                )
            if HAS_BIAS:
                column_sums = add_row_sums(column_sums, dy, BLOCK_M, BLOCK_N, BY_PRODUCT=False)

        plane = tl.cast(first_m // rows + slot, tl.int64)
        if HAS_FACTORS:
            d_lora_b_ptr += plane * stride_dbp + first_n * stride_dbn
            store_sum(
                d_lora_b_ptr, acc, offs_n * stride_dbn, offs_r, mask_n, mask_r, RANK_ROWS_FIRST
            )
        if HAS_BIAS:  # noqa: SIM102 - this one is decided at compile time
            if first_r == 0:
                # d_bias: [BLOCK_N]
                sums = total_row_sums(column_sums, BY_PRODUCT=False)
                tl.store(d_bias_ptr + plane * N + first_n + offs_n, sums, mask=mask_n)


@kept
def launch_mixed_lora_grad_b(
    ds: torch.Tensor,
    d_lora_b: torch.Tensor | None,
    d_bias: torch.Tensor | None,
    dy: torch.Tensor,
    s: torch.Tensor,
    rows: Sequence[torch.Tensor],
    up: RankRows,
    *,
    run: int,
    config: KernelConfig,
) -> None:
    """Writes planes of ``dy @ lora_b`` and of ``dy.T @ s``, each row's own adapter.

    Args:
        ds: fp32 ``[ceil(N / config.block_n), M, R]`` over sorted positions, contiguous; R a
            multiple of 4, no smaller than any rank. A row is written up to its adapter's rank, in
            fours; rows without an adapter are not.
        d_lora_b: fp32 ``[ceil(M / run) + S, N, R]``, contiguous, or None.
        d_bias: fp32 ``[ceil(M / run) + S, N]``, contiguous, for the sums of dy's columns, or None.
        dy: ``[M, N]``, any strides, 0 among them; its dtype is the dtype of the dots.
        s: ``[M, R]`` in dy's dtype over sorted positions, the last dimension contiguous.
        rows: Sorted, with ``Rows.pieces(run)``: as `row_arguments` takes them.
        up: By column; scalings and lora_bias are not read.
        run: Positions of one run.
        config: From `configs.choose`.
    """
    m, n = dy.shape
    if m == 0 or n == 0:
        return
    columns, ranks = cdiv(n, config.block_n), cdiv(max(up.largest, 1), config.block_r)
    grid = ((rows[-1].shape[0] - 1) * columns, ranks)
    launch(
        _mixed_lora_grad_b_kernel,
        grid,
        ds_ptr=ds,
        d_lora_b_ptr=d_lora_b,
        d_bias_ptr=d_bias,
        dy_ptr=dy,
        s_ptr=s,
        **row_arguments(rows),
        lora_b_address_ptr=up.address,
        rank_ptr=up.rank,
        M=m,
        N=n,
        rows=run,
        **strides("ds", "pm_", ds),
        **strides("db", "pn_", d_lora_b),
        **strides("dy", "mn", dy),
        **strides("s", "m_", s),
        **config.arguments("mnr"),
        HAS_FACTORS=d_lora_b is not None,
        HAS_BIAS=d_bias is not None,
        FACTOR_DTYPE=triton_dtype(up.dtype),
        RANK_ROWS_FIRST=config.rank_rows_first,
    )
