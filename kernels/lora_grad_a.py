"""``d_lora_a = ds.T @ dropout(x)`` for modules that are fed by the same x, from one read of x.

One adapter: x ``[M, K]``, ds ``[M, R]``, d_lora_a ``[R, K]``; each of up to four siblings has a
rank, a seed and a dropout of its own. A program owns BLOCK_K columns and a range of rows; where
rows take P programs, each writes an fp32 plane of ``[P, R, K]``, summed in their order by
`plane_sums`. No atomics.

Bytes moved, e an element: ``e M K + sum over siblings of e (M R + R K)``, x read once per BLOCK_R
rank rows; with planes ``4 P R K`` in place of ``e R K``. The masks are computed, not read.

Mixed batch, every adapter with rows: x is in any order of rows, and ds ``[G, M, R]`` lies over
sorted positions, one for each module. A program owns BLOCK_K columns and a piece, a run of rows of
one adapter: that adapter's rank rows of all modules stand side by side as columns of one dot. Sums
over a piece are fp32 planes ``[P, G, R, K]`` that `mixed_lora_grad_reduce` sums in a fixed order; a
piece's plane is that of `lora_grad_b`. Dropout, which every module has for itself, takes a launch
for each.

Bytes moved, e an element of x and ds: ``e M' K``, M' the rows with an adapter, once for each
BLOCK_R columns; ``e`` an element of ds, read once a tile of K; and 4 an element of the planes, one
for each adapter in each run of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastlora.kernels.arguments import numbered, strides
from fastlora.kernels.launch import kept, launch
from fastlora.kernels.mixed_rows import (
    S_COLUMNS,
    TABLES,
    DropoutTables,
    load_piece,
    round_up,
    row_arguments,
    sibling_columns,
)
from fastlora.kernels.philox import philox_keep_mask
from fastlora.kernels.row_sums import add_rows, store_sum, zero_sum
from fastlora.kernels.tables import KernelConfig, cdiv


@triton.jit
def _add_tile(
    acc,
    x,
    drop,
    ds_ptr,
    offs_m,
    offs_r,
    mask_m,
    mask_r,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    RANK_ROWS_FIRST: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Returns acc plus ``dropout(x).T @ ds`` of a tile, without the factor ``1 / (1 - p)``.

    ``x [BLOCK_M, BLOCK_K]`` is loaded; ``drop`` is the seed, the threshold, and the tile's first
    row and column in the mask. ds is as s in `add_rows`.
    """
    if HAS_DROPOUT:
        seed, threshold, first_row, first_k = drop
        keep = philox_keep_mask(seed, first_row, first_k, threshold, 0, BLOCK_M, BLOCK_K)
        x = tl.where(keep, x, 0.0)
    return add_rows(
        acc,
        x,
        ds_ptr,
        offs_m,
        offs_r,
        mask_m,
        mask_r,
        RANK_ROWS_FIRST=RANK_ROWS_FIRST,
        INPUT_PRECISION=INPUT_PRECISION,
    )


# M and the thresholds vary from call to call: no compile of its own for 1 or a multiple of 16.
@triton.jit(
    do_not_specialize=["M", "threshold", "threshold_1", "threshold_2", "threshold_3"],
)
def _lora_grad_a_kernel(
    # tensors
    out_ptr,
    out_1_ptr,
    out_2_ptr,
    out_3_ptr,
    x_ptr,
    ds_ptr,
    ds_1_ptr,
    ds_2_ptr,
    ds_3_ptr,
    seeds_ptr,
    # scalars
    M,
    K,
    R,
    R_1,
    R_2,
    R_3,
    rows_per_split,
    threshold,
    threshold_1,
    threshold_2,
    threshold_3,
    inv_keep,
    inv_keep_1,
    inv_keep_2,
    inv_keep_3,
    # strides
    stride_xm,
    stride_xk,
    # meta
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SIBLINGS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    RANK_ROWS_FIRST: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    split = tl.program_id(1)
    num_pid_k = tl.cdiv(K, BLOCK_K)
    first_k = (pid % num_pid_k) * BLOCK_K
    first_r = (pid // num_pid_k) * BLOCK_R
    first_m = split * rows_per_split

    offs_m = tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < K - first_k
    x_ptr += tl.cast(first_m, tl.int64) * stride_xm + tl.cast(first_k, tl.int64) * stride_xk
    offs_x = offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    outs = out_ptr, out_1_ptr, out_2_ptr, out_3_ptr
    shares = ds_ptr, ds_1_ptr, ds_2_ptr, ds_3_ptr
    ranks = R, R_1, R_2, R_3
    thresholds = threshold, threshold_1, threshold_2, threshold_3
    inv_keeps = inv_keep, inv_keep_1, inv_keep_2, inv_keep_3
    seeds = ()
    for i in tl.static_range(SIBLINGS):
        seed = tl.cast(0, tl.int64)  # which nobody uses
        if HAS_DROPOUT:
            seed = tl.load(seeds_ptr + i)
        seeds += (seed,)
    accs = (zero_sum(BLOCK_K, BLOCK_R, RANK_ROWS_FIRST),) * SIBLINGS
    for m in range(first_m, min(first_m + rows_per_split, M), BLOCK_M):
        mask_m = offs_m < M - m
        # x: [BLOCK_M, BLOCK_K]
        x = tl.load(x_ptr + offs_x, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        sums = ()
        for i in tl.static_range(SIBLINGS):
            offs_r = first_r + tl.arange(0, BLOCK_R)
            mask_r = offs_r < ranks[i]
            own = _add_tile(
                *(accs[i], x, (seeds[i], thresholds[i], m, first_k)),
                shares[i] + tl.cast(m, tl.int64) * ranks[i],
                *(offs_m * ranks[i], offs_r, mask_m, mask_r, BLOCK_M, BLOCK_K),
                *(HAS_DROPOUT, RANK_ROWS_FIRST, INPUT_PRECISION),
            )
            sums += (own,)
        accs = sums
        x_ptr += tl.cast(stride_xm, tl.int64) * BLOCK_M

    for i in tl.static_range(SIBLINGS):
        # out: a plane of [P, R, K]
        out = outs[i] + (tl.cast(split, tl.int64) * ranks[i] + first_r) * K + first_k
        acc = accs[i] * tl.cast(inv_keeps[i], tl.float32)
        offs_r = tl.arange(0, BLOCK_R)
        mask_r = offs_r < ranks[i] - first_r
        store_sum(out, acc, offs_k, offs_r * K, mask_k, mask_r, RANK_ROWS_FIRST)


# M and rows vary from call to call: no compile of its own for 1 or a multiple of 16.
@triton.jit(do_not_specialize=["M", "rows", "stride_table"], do_not_specialize_on_alignment=TABLES)
def _mixed_lora_grad_a_kernel(
    # tensors
    d_lora_a_ptr,
    x_ptr,
    ds_ptr,
    order_ptr,
    segment_of_ptr,
    segment_slot_ptr,
    piece_start_ptr,
    rank_ptr,
    slot_start_ptr,
    seed_ptr,
    threshold_ptr,
    inv_keep_ptr,
    # scalars
    M,
    K,
    rows,
    # strides
    stride_dap,
    stride_dag,
    stride_dar,
    stride_xm,
    stride_xk,
    stride_dsg,
    stride_dsm,
    stride_table,
    # meta
    G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    RANK_ROWS_FIRST: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    num_pid_k = tl.cdiv(K, BLOCK_K)
    piece = tl.program_id(0) // num_pid_k
    first_k = (tl.program_id(0) % num_pid_k) * BLOCK_K
    first_column = tl.program_id(1) * BLOCK_R
    first_m, stop_m, slot = load_piece(piece, piece_start_ptr, segment_of_ptr, segment_slot_ptr, M)
    columns = 0
    for g in tl.static_range(G):
        rank = tl.load(rank_ptr + g * stride_table + slot, mask=slot >= 0, other=0)
        columns += round_up(rank, S_COLUMNS)

    if columns > first_column:
        offs_m = tl.arange(0, BLOCK_M)
        offs_k = tl.arange(0, BLOCK_K)
        column = first_column + tl.arange(0, BLOCK_R)
        mask_k = offs_k < K - first_k
        sibling, r, own, _ = sibling_columns(column, slot, rank_ptr, stride_table, G, BLOCK_R)
        r = tl.max_contiguous(tl.multiple_of(r, S_COLUMNS), S_COLUMNS)
        offs_ds = tl.cast(sibling, tl.int64) * stride_dsg + r
        x_ptr += tl.cast(first_k, tl.int64) * stride_xk
        before, seed, threshold = 0, 0, 0
        if HAS_DROPOUT:
            # The row's number among those of its adapter, whatever else is in the batch.
            before = tl.load(slot_start_ptr + slot)
            seed = tl.load(seed_ptr + slot)
            threshold = tl.load(threshold_ptr + slot)

        acc = zero_sum(BLOCK_K, BLOCK_R, RANK_ROWS_FIRST)
        for start in tl.range(first_m, stop_m, BLOCK_M):
            mask_m = offs_m < stop_m - start
            row = tl.load(order_ptr + start + offs_m, mask=mask_m, other=0).to(tl.int64)
            at = (start + offs_m).to(tl.int64)
            # x: [BLOCK_M, BLOCK_K]
            x = tl.load(
                x_ptr + (row * stride_xm)[:, None] + offs_k[None, :] * stride_xk,
                mask=mask_m[:, None] & mask_k[None, :],
                other=0.0,
            )
            acc = _add_tile(
                *(acc, x, (seed, threshold, start - before, first_k), ds_ptr),
                *(at * stride_dsm, offs_ds, mask_m, own, BLOCK_M, BLOCK_K),
                *(HAS_DROPOUT, RANK_ROWS_FIRST, INPUT_PRECISION),
            )

        if HAS_DROPOUT:
            acc *= tl.load(inv_keep_ptr + slot)
        d_lora_a_ptr += tl.cast(first_m // rows + slot, tl.int64) * stride_dap + first_k
        offs_r = tl.cast(sibling, tl.int64) * stride_dag + tl.cast(r, tl.int64) * stride_dar
        store_sum(d_lora_a_ptr, acc, offs_k, offs_r, mask_k, own, RANK_ROWS_FIRST)


@kept
def launch_lora_grad_a(
    outs: Sequence[torch.Tensor],
    x: torch.Tensor,
    ds: Sequence[torch.Tensor],
    *,
    seeds: torch.Tensor | None,
    dropout_p: Sequence[float],
    config: KernelConfig,
) -> None:
    """Writes ``ds.T @ dropout(x)`` for each sibling, or its planes.

    Args:
        outs: For each of 1 to `MAX_SIBLINGS` siblings ``[R, K]``, any floating dtype, where
            ``config.splits == 1``, else fp32 ``[splits, R, K]``; contiguous.
        x: ``[M, K]``, any strides; its dtype is the dtype of the dots.
        ds: For each ``[M, R]`` in x's dtype, contiguous; R may differ.
        seeds: int64 device tensor, one for each sibling, contiguous; None for no dropout.
        dropout_p: For each the probability of dropping an element of x, a multiple of 2**-16
            after rounding; read only with seeds.
        config: From `configs.choose`, for so many siblings.
    """
    (m, k), count = x.shape, len(outs)
    if k == 0:
        return
    ranks = [own.shape[1] for own in ds]
    ps = [0.0] * count if seeds is None else dropout_p
    grid = (cdiv(k, config.block_k) * cdiv(max(ranks), config.block_r), config.splits)
    launch(
        _lora_grad_a_kernel,
        grid,
        **numbered("out{}_ptr", outs),
        x_ptr=x,
        **numbered("ds{}_ptr", ds),
        seeds_ptr=seeds,
        M=m,
        K=k,
        **numbered("R{}", ranks, 0),
        **numbered("threshold{}", [round(p * 65536) for p in ps], 0),
        **numbered("inv_keep{}", [1.0 / (1.0 - p) for p in ps], 1.0),
        rows_per_split=cdiv(cdiv(m, config.block_m), config.splits) * config.block_m,
        **strides("x", "mk", x),
        **config.arguments("mkr"),
        SIBLINGS=config.siblings,
        HAS_DROPOUT=seeds is not None,
        RANK_ROWS_FIRST=config.rank_rows_first,
    )


@kept
def launch_mixed_lora_grad_a(
    d_lora_a: torch.Tensor,
    x: torch.Tensor,
    ds: torch.Tensor,
    rows: Sequence[torch.Tensor],
    rank: torch.Tensor,
    *,
    run: int,
    max_columns: int,
    config: KernelConfig,
    dropout: DropoutTables | None = None,
) -> None:
    """Writes planes of ``ds.T @ dropout(x)`` for G modules, each row's own adapter.

    Args:
        d_lora_a: fp32 ``[ceil(M / run) + S, G, R, K]``, contiguous.
        x: ``[M, K]``, any strides; its dtype is the dtype of the dots.
        ds: ``[G, M, R]`` in x's dtype over sorted positions, the last dimension contiguous.
        rows: Sorted, with ``Rows.pieces(run)``: as `row_arguments` takes them.
        rank: int32 ``[G, S]``, 0 where the adapter leaves the module alone.
        run: Positions of one run.
        max_columns: No smaller than any adapter's ranks of all modules together, each in fours.
        config: From `configs.choose`.
        dropout: Of the one module, ``G = 1``; None for none.
    """
    m, k = x.shape
    if m == 0 or k == 0:
        return
    grid = ((rows[-1].shape[0] - 1) * cdiv(k, config.block_k), cdiv(max_columns, config.block_r))
    launch(
        _mixed_lora_grad_a_kernel,
        grid,
        d_lora_a_ptr=d_lora_a,
        x_ptr=x,
        ds_ptr=ds,
        **row_arguments(rows),
        rank_ptr=rank,
        M=m,
        K=k,
        rows=run,
        **strides("da", "pgr_", d_lora_a),
        **strides("x", "mk", x),
        **strides("ds", "gm_", ds),
        stride_table=rank.stride(0),
        G=rank.shape[0],
        **config.arguments("mkr"),
        **DropoutTables.arguments(dropout, rows),
        RANK_ROWS_FIRST=config.rank_rows_first,
    )
