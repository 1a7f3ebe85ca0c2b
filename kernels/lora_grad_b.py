"""``ds = dy @ lora_b`` and ``d_lora_b = dy.T @ s``, scaled, from one read of dy.

dy ``[M, N]``, s ``[M, R]``, lora_b ``[N, R]``, ds ``[M, R]``, d_lora_b ``[N, R]``; on request also
the column sums of dy, ``[N]``. A program computes BLOCK_N columns over a range of rows. d_lora_b
stays in registers while the program walks down the rows, and each tile's contribution to ds is
stored immediately.

One adapter: ``ds = scaling * dy @ lora_b`` and ``d_lora_b = dy.T @ (scaling * s)``, with scaling
``[1]`` or ``[R]``. If Q programs share the columns and P the rows, they write fp32 partial sums
``[Q, M, R]`` and ``[P, N, R]``, which `plane_sums` adds in order. There are no atomics. For large
ranks, for which the partial sums of ds are larger than dy, a library product computes ds, and this
kernel computes the rest.

Bytes moved, for e bytes per element: ``e (M N + 2 M R + 2 N R)``, with dy read once per BLOCK_R
rank rows. With partial sums, ``4 Q M R`` replaces ``e M R``, and ``4 P N R`` replaces ``e N R``.

Mixed batch: each row has its own adapter. The rows of dy are in any order, s and ds are at sorted
positions, and a table ``[S]`` has the address of each adapter's lora_b ``[N, rank]`` in the layout
of a parameter. The range of rows is a piece, a run of rows of one adapter. Nothing is scaled. The
results are fp32 partial sums, which `mixed_lora_grad_reduce` adds in a fixed order: of ds
``[tiles of N, M, R]``, of d_lora_b ``[P, N, R]``, and on request of dy's columns ``[P, N]``. The
index of a piece's partial sum is the number of its run of ``rows`` positions, plus its slot. Both
grow from piece to piece, so no two pieces have the same index.

Bytes moved, for e bytes per element of dy and f per element of factors: ``e M' N`` for the M' rows
with an adapter, once for each BLOCK_R rank rows; ``e`` per element of s, read once per tile of N;
``f`` per element of lora_b, read once per piece; ``4 N / BLOCK_N`` per element of ds; and 4 per
element of the partial sums of d_lora_b, one for each adapter in each run of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastlora.kernels.arguments import strides
from fastlora.kernels.config_tables import KernelConfig, cdiv
from fastlora.kernels.launch import cached_launches, launch
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
    zero_sum,
)


@triton.jit
def _store_ds(
    ds_ptrs, dy, b, scale, mask_m, mask_r, ADDS: tl.constexpr, INPUT_PRECISION: tl.constexpr
):
    """Write a tile's contribution to ds, ``scale * dy @ b``, or ``dy @ b`` without a scale.

    With ``ADDS``, the contribution is added to what is there.
    """
    # [BLOCK_M, BLOCK_N] x [BLOCK_N, BLOCK_R]
    share = tl.dot(dy, b, input_precision=INPUT_PRECISION)
    if scale is not None:
        share *= scale[None, :]
    mask = mask_m[:, None] & mask_r[None, :]
    if ADDS:
        # ds: [BLOCK_M, BLOCK_R]
        share += tl.load(ds_ptrs, mask=mask, other=0.0)
    tl.store(ds_ptrs, share.to(ds_ptrs.dtype.element_ty), mask=mask)


# M varies between calls: do not specialize the kernel on 1 or multiples of 16.
@triton.jit(do_not_specialize=["M"])
def _lora_grad_b_kernel(
    # tensors
    ds_ptr,
    d_lora_b_ptr,
    d_bias_ptr,
    dy_ptr,
    s_ptr,
    lora_b_ptr,
    scaling_ptr,
    # scalars
    M,
    N,
    R,
    rows_per_split,
    # strides
    stride_dsp,
    stride_dsm,
    stride_dbp,
    stride_dbn,
    stride_dym,
    stride_dyn,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    stride_scaling,
    # meta
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_DS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANK_ROWS_FIRST: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    # How dy's columns are summed (`add_row_sums`). If they are summed in registers, acc's product
    # must finish in its own step: either the product of ds after it waits for it, or its result is
    # used there.
    BY_PRODUCT: tl.constexpr = not RANK_ROWS_FIRST and dtype != tl.float32
    EACH_STEP: tl.constexpr = HAS_BIAS and not (HAS_DS or RANK_ROWS_FIRST or BY_PRODUCT)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    num_pid_n = tl.cdiv(N, BLOCK_N)
    pid_n = pid % num_pid_n
    first_r = (pid // num_pid_n) * BLOCK_R
    first_m = split * rows_per_split
    first_n = tl.cast(pid_n * BLOCK_N, tl.int64)

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_r = first_r + tl.arange(0, BLOCK_R)
    mask_n = offs_n < N - pid_n * BLOCK_N
    mask_r = offs_r < R
    if HAS_DS:
        # b: [BLOCK_N, BLOCK_R], for all rows
        lora_b_ptr += first_n * stride_bn
        b = tl.load(
            lora_b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br,
            mask=mask_n[:, None] & mask_r[None, :],
            other=0.0,
        ).to(dtype)
        ds_ptr += tl.cast(pid_n, tl.int64) * stride_dsp + tl.cast(first_m, tl.int64) * stride_dsm
        offs_ds = offs_m[:, None] * stride_dsm + offs_r[None, :]
    # scale: [BLOCK_R]
    scale = tl.load(scaling_ptr + offs_r * stride_scaling, mask=mask_r, other=0.0)

    row = tl.cast(first_m, tl.int64)
    dy_ptr += row * stride_dym + first_n * stride_dyn
    s_ptr += row * stride_sm
    offs_dy = offs_m[:, None] * stride_dym + offs_n[None, :] * stride_dyn
    if RANK_ROWS_FIRST:
        scales = scale[:, None]
        offs_s = offs_m[None, :] * stride_sm + offs_r[:, None] * stride_sr
    else:
        scales = scale[None, :]
        offs_s = offs_m[:, None] * stride_sm + offs_r[None, :] * stride_sr
    acc = zero_sum(BLOCK_N, BLOCK_R, RANK_ROWS_FIRST)
    zeros = acc
    if HAS_BIAS:
        column_sums = zero_row_sums(BLOCK_N, BY_PRODUCT)
    for m in range(first_m, min(first_m + rows_per_split, M), BLOCK_M):
        mask_m = offs_m < M - m
        # dy: [BLOCK_M, BLOCK_N]
        dy = tl.load(dy_ptr + offs_dy, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        if HAS_DS and RANK_ROWS_FIRST:
            # First: it needs registers for dy, which are free again for the next product.
            _store_ds(ds_ptr + offs_ds, dy, b, scale, mask_m, mask_r, False, INPUT_PRECISION)
        if HAS_BIAS and BY_PRODUCT:
            column_sums = add_row_sums(column_sums, dy, BLOCK_M, BLOCK_N, BY_PRODUCT)
        start = zeros if EACH_STEP else acc
        if RANK_ROWS_FIRST:
            # s: [BLOCK_R, BLOCK_M]
            s = tl.load(s_ptr + offs_s, mask=mask_m[None, :] & mask_r[:, None], other=0.0)
            # [BLOCK_R, BLOCK_M] x [BLOCK_M, BLOCK_N]
            total = tl.dot(s, dy, start, input_precision=INPUT_PRECISION)
        else:
            # s: [BLOCK_M, BLOCK_R]
            s = tl.load(s_ptr + offs_s, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
            # [BLOCK_N, BLOCK_M] x [BLOCK_M, BLOCK_R]
            total = tl.dot(tl.trans(dy), s, start, input_precision=INPUT_PRECISION)
        acc = acc + total * scales if EACH_STEP else total
        if HAS_BIAS and not BY_PRODUCT:
            column_sums = add_row_sums(column_sums, dy, BLOCK_M, BLOCK_N, BY_PRODUCT)
        if HAS_DS and not RANK_ROWS_FIRST:
            # Last: waiting for this product also completes the earlier ones. If a product stayed in
            # flight across the loop's back edge, ptxas would serialize its instructions.
            _store_ds(ds_ptr + offs_ds, dy, b, scale, mask_m, mask_r, False, INPUT_PRECISION)
        if HAS_DS:
            ds_ptr += tl.cast(stride_dsm, tl.int64) * BLOCK_M
        dy_ptr += tl.cast(stride_dym, tl.int64) * BLOCK_M
        s_ptr += tl.cast(stride_sm, tl.int64) * BLOCK_M

    d_lora_b_ptr += tl.cast(split, tl.int64) * stride_dbp + first_n * stride_dbn
    if not EACH_STEP:
        acc *= scales
    store_sum(d_lora_b_ptr, acc, offs_n * stride_dbn, offs_r, mask_n, mask_r, RANK_ROWS_FIRST)
    if HAS_BIAS:  # noqa: SIM102 - this one is decided at compile time
        if first_r == 0:
            # d_bias: [BLOCK_N]
            d_bias_ptr += tl.cast(split, tl.int64) * N + first_n
            sums = total_row_sums(column_sums, BY_PRODUCT)
            tl.store(d_bias_ptr + offs_n, sums, mask=mask_n)


# M and rows vary between calls: do not specialize the kernel on 1 or multiples of 16.
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
    HAS_DS: tl.constexpr,
    ADDS_DS: tl.constexpr,
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
        if HAS_DS:
            # b: [BLOCK_N, BLOCK_R], for all rows
            lora_b = factor_pointer(tl.load(lora_b_address_ptr + slot), FACTOR_DTYPE)
            b = tl.load(
                lora_b + (first_n + offs_n)[:, None] * rank + offs_r[None, :],
                mask=mask_n[:, None] & mask_r[None, :],
                other=0.0,
            ).to(dtype)
            ds_ptr += tl.cast(pid_n, tl.int64) * stride_dsp

        dy_ptr += first_n * stride_dyn
        acc = zero_sum(BLOCK_N, BLOCK_R, RANK_ROWS_FIRST)
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
            if HAS_DS:
                ds_ptrs = ds_ptr + (at * stride_dsm)[:, None] + offs_r[None, :]
                _store_ds(ds_ptrs, dy, b, None, mask_m, filled, ADDS_DS, INPUT_PRECISION)
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

        partial = tl.cast(first_m // rows + slot, tl.int64)
        if HAS_FACTORS:
            d_lora_b_ptr += partial * stride_dbp + first_n * stride_dbn
            store_sum(
                d_lora_b_ptr, acc, offs_n * stride_dbn, offs_r, mask_n, mask_r, RANK_ROWS_FIRST
            )
        if HAS_BIAS:  # noqa: SIM102 - this one is decided at compile time
            if first_r == 0:
                # d_bias: [BLOCK_N]
                sums = total_row_sums(column_sums, BY_PRODUCT=False)
                tl.store(d_bias_ptr + partial * N + first_n + offs_n, sums, mask=mask_n)


@cached_launches
def launch_lora_grad_b(
    ds: torch.Tensor | None,
    d_lora_b: torch.Tensor,
    d_bias: torch.Tensor | None,
    dy: torch.Tensor,
    s: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    *,
    config: KernelConfig,
) -> None:
    """Write ``scaling * dy @ lora_b`` and ``dy.T @ (scaling * s)``, or their partial sums.

    Args:
        ds: ``[M, R]`` in dy's dtype if one program spans all columns, otherwise fp32 ``[Q, M, R]``
            with ``Q = ceil(N / config.block_n)``; contiguous. None if ds is computed elsewhere.
        d_lora_b: ``[N, R]``, any floating dtype, if ``config.splits == 1``, otherwise fp32
            ``[splits, N, R]``; contiguous.
        d_bias: fp32 ``[N]`` or ``[splits, N]``, contiguous, for the column sums of dy; or None.
        dy: ``[M, N]``, any strides, including 0. Its dtype is the dtype of the dots.
        s: ``[M, R]`` in dy's dtype, any strides.
        lora_b: ``[N, R]``, any strides, in dy's dtype or in a dtype that is cast to it at the load.
        scaling: fp32 ``[1]``, or ``[R]`` with one value per rank row.
        config: From `configs.choose`.
    """
    (m, n), r = dy.shape, lora_b.shape[1]
    if n == 0:
        return
    grid = (cdiv(n, config.block_n) * cdiv(r, config.block_r), config.splits)
    launch(
        _lora_grad_b_kernel,
        grid,
        ds_ptr=ds,
        d_lora_b_ptr=d_lora_b,
        d_bias_ptr=d_bias,
        dy_ptr=dy,
        s_ptr=s,
        lora_b_ptr=lora_b,
        scaling_ptr=scaling,
        M=m,
        N=n,
        R=r,
        rows_per_split=cdiv(cdiv(m, config.block_m), config.splits) * config.block_m,
        **strides("ds", "pm_", ds),
        **strides("db", "pn_", d_lora_b),
        **strides("dy", "mn", dy),
        **strides("s", "mr", s),
        **strides("b", "nr", lora_b),
        stride_scaling=0 if scaling.numel() == 1 else scaling.stride(0),
        **config.arguments("mnr"),
        HAS_DS=ds is not None,
        HAS_BIAS=d_bias is not None,
        RANK_ROWS_FIRST=config.rank_rows_first,
    )


@cached_launches
def launch_mixed_lora_grad_b(
    ds: torch.Tensor | None,
    d_lora_b: torch.Tensor | None,
    d_bias: torch.Tensor | None,
    dy: torch.Tensor,
    s: torch.Tensor,
    rows: Sequence[torch.Tensor],
    up: RankRows,
    *,
    run: int,
    config: KernelConfig,
    adds_ds: bool = False,
) -> None:
    """Write partial sums of ``dy @ lora_b`` and of ``dy.T @ s`` for each row's own adapter.

    Args:
        ds: fp32 ``[ceil(N / config.block_n), M, R]`` at sorted positions, contiguous. R is a
            multiple of 4 and at least the largest rank. A row is written up to its adapter's rank,
            rounded up to a multiple of 4. Rows without an adapter are not written. None if ds is
            computed elsewhere.
        d_lora_b: fp32 ``[ceil(M / run) + S, N, R]``, contiguous, or None.
        d_bias: fp32 ``[ceil(M / run) + S, N]``, contiguous, for the column sums of dy, or None.
        dy: ``[M, N]``, any strides, including 0. Its dtype is the dtype of the dots.
        s: ``[M, R]`` in dy's dtype at sorted positions, contiguous in the last dimension.
        rows: Sorted rows with ``Rows.pieces(run)``, as in `row_arguments`.
        up: The lora_b of all adapters, with ``by_column``. Scalings and lora_bias are not read.
        run: Number of positions in a run.
        config: From `configs.choose`.
        adds_ds: Whether to add to ds, which holds the partial sums of other columns.
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
        HAS_DS=ds is not None,
        ADDS_DS=adds_ds,
        HAS_FACTORS=d_lora_b is not None,
        HAS_BIAS=d_bias is not None,
        FACTOR_DTYPE=triton_dtype(up.dtype),
        RANK_ROWS_FIRST=config.rank_rows_first,
    )
