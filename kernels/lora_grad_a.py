"""``d_lora_a = ds.T @ dropout(x)`` for modules with the same input x, from one read of x.

One adapter: x ``[M, K]``, ds ``[M, R]``, d_lora_a ``[R, K]``. Each of up to four modules of a
shared-input group has its own rank, seed, and dropout. A program computes BLOCK_K columns over a
range of rows. If P programs share the rows, each writes an fp32 partial sum of ``[P, R, K]``, and
`plane_sums` adds them in order. There are no atomics.

Bytes moved, for e bytes per element: ``e M K + sum over modules of e (M R + R K)``, with x read
once per BLOCK_R rank rows. With partial sums, ``4 P R K`` replaces ``e R K``. The masks are
computed, not read.

Mixed batch, for every adapter with rows: the rows of x are in any order, and ds ``[G, M, R]`` of
the modules is at sorted positions. A program computes BLOCK_K columns over a piece, a run of rows
of one adapter. The adapter's rank rows of all modules are side by side as columns of one dot. Sums
over a piece are fp32 partial sums ``[P, G, R, K]``, which `mixed_lora_grad_reduce` adds in a fixed
order. The index of a piece's partial sum is as in `lora_grad_b`. Each module has its own dropout,
so active dropout needs a launch per module.

Bytes moved, for e bytes per element of x and ds: ``e M' K`` for the M' rows with an adapter, once
for each BLOCK_R columns; ``e`` per element of ds, read once per tile of K; and 4 per element of the
partial sums, one for each adapter in each run of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastlora.kernels.arguments import numbered, strides
from fastlora.kernels.config_tables import KernelConfig, cdiv
from fastlora.kernels.launch import cached_launches, launch
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
    """Return acc plus ``dropout(x).T @ ds`` of a tile, without the factor ``1 / (1 - p)``.

    ``x [BLOCK_M, BLOCK_K]`` is already loaded. ``drop`` has the seed, the threshold, and the tile's
    first row and column in the mask. ds is as s in `add_rows`.
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


# M and the thresholds vary between calls: do not specialize on 1 or multiples of 16.
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
    NUM_MODULES: tl.constexpr,
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
    for i in tl.static_range(NUM_MODULES):
        seed = tl.cast(0, tl.int64)  # unused
        if HAS_DROPOUT:
            seed = tl.load(seeds_ptr + i)
        seeds += (seed,)
    accs = (zero_sum(BLOCK_K, BLOCK_R, RANK_ROWS_FIRST),) * NUM_MODULES
    for m in range(first_m, min(first_m + rows_per_split, M), BLOCK_M):
        mask_m = offs_m < M - m
        # x: [BLOCK_M, BLOCK_K]
        x = tl.load(x_ptr + offs_x, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        sums = ()
        for i in tl.static_range(NUM_MODULES):
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

    for i in tl.static_range(NUM_MODULES):
        # out: a partial sum of [P, R, K]
        out = outs[i] + (tl.cast(split, tl.int64) * ranks[i] + first_r) * K + first_k
        acc = accs[i] * tl.cast(inv_keeps[i], tl.float32)
        offs_r = tl.arange(0, BLOCK_R)
        mask_r = offs_r < ranks[i] - first_r
        store_sum(out, acc, offs_k, offs_r * K, mask_k, mask_r, RANK_ROWS_FIRST)


# M and rows vary between calls: do not specialize the kernel on 1 or multiples of 16.
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
        member, r, own, _ = sibling_columns(column, slot, rank_ptr, stride_table, G, G, BLOCK_R)
        r = tl.max_contiguous(tl.multiple_of(r, S_COLUMNS), S_COLUMNS)
        offs_ds = tl.cast(member, tl.int64) * stride_dsg + r
        x_ptr += tl.cast(first_k, tl.int64) * stride_xk
        before, seed, threshold = 0, 0, 0
        if HAS_DROPOUT:
            # The row's number among the adapter's rows, which no other row of the batch affects.
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
        offs_r = tl.cast(member, tl.int64) * stride_dag + tl.cast(r, tl.int64) * stride_dar
        store_sum(d_lora_a_ptr, acc, offs_k, offs_r, mask_k, own, RANK_ROWS_FIRST)


@cached_launches
def launch_lora_grad_a(
    outs: Sequence[torch.Tensor],
    x: torch.Tensor,
    ds: Sequence[torch.Tensor],
    *,
    seeds: torch.Tensor | None,
    dropout_p: Sequence[float],
    config: KernelConfig,
) -> None:
    """Write ``ds.T @ dropout(x)`` for each module, or its partial sums.

    Args:
        outs: For each of 1 to `MAX_GROUP_SIZE` modules ``[R, K]``, any floating dtype, if
            ``config.splits == 1``, otherwise fp32 ``[splits, R, K]``; contiguous.
        x: ``[M, K]``, any strides. Its dtype is the dtype of the dots.
        ds: For each module ``[M, R]`` in x's dtype, contiguous. R may differ.
        seeds: int64 device tensor with one seed per module, contiguous; None for no dropout.
        dropout_p: For each module, the probability of dropping an element of x, rounded to a
            multiple of 2**-16; read only if there are seeds.
        config: From `configs.choose`, for this number of modules.
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
        NUM_MODULES=config.group_size,
        HAS_DROPOUT=seeds is not None,
        RANK_ROWS_FIRST=config.rank_rows_first,
    )


@cached_launches
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
    """Write partial sums of ``ds.T @ dropout(x)`` for G modules and each row's own adapter.

    Args:
        d_lora_a: fp32 ``[ceil(M / run) + S, G, R, K]``, contiguous.
        x: ``[M, K]``, any strides. Its dtype is the dtype of the dots.
        ds: ``[G, M, R]`` in x's dtype at sorted positions, contiguous in the last dimension.
        rows: Sorted rows with ``Rows.pieces(run)``, as in `row_arguments`.
        rank: int32 ``[G, S]``, 0 if the adapter does not adapt the module.
        run: Number of positions in a run.
        max_columns: Upper bound of the rank rows of an adapter in all modules, where the rank in
            each module is rounded up to a multiple of 4.
        config: From `configs.choose`.
        dropout: Dropout of the only module (``G = 1``), or None for no dropout.
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
