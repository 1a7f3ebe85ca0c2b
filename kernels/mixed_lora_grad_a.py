"""``d_lora_a = ds.T @ dropout(x)`` of every adapter with rows, for all modules fed by one x.

x ``[M, K]`` in any order of rows; ds ``[G, M, R]`` over sorted positions, one for each module. A
program owns BLOCK_K columns and a piece, a run of rows of one adapter: that adapter's rank rows of
all modules stand side by side as columns of one dot. Sums over a piece are fp32 planes
``[P, G, R, K]`` that `mixed_lora_grad_reduce` sums in a fixed order; a piece's plane is that of
`mixed_lora_grad_b`. Dropout, which every module has for itself, takes a launch for each.

Bytes moved, e an element of x and ds: ``e M' K``, M' the rows with an adapter, once for each
BLOCK_R columns; ``e`` an element of ds, read once a tile of K; and 4 an element of the planes, one
for each adapter in each run of rows.
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
    load_piece,
    round_up,
    row_arguments,
    sibling_columns,
)
from fastlora.kernels.philox import philox_keep_mask
from fastlora.kernels.row_sums import add_rows, store_sum
from fastlora.kernels.tables import KernelConfig, cdiv


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
        if HAS_DROPOUT:
            # The row's number among those of its adapter, whatever else is in the batch.
            before = tl.load(slot_start_ptr + slot)
            seed = tl.load(seed_ptr + slot)
            threshold = tl.load(threshold_ptr + slot)

        if RANK_ROWS_FIRST:
            acc = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
        else:
            acc = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)
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
            if HAS_DROPOUT:
                keep = philox_keep_mask(
                    seed, start - before, first_k, threshold, 0, BLOCK_M, BLOCK_K
                )
                x = tl.where(keep, x, 0.0)
            acc = add_rows(
                acc,
                x,
                ds_ptr,
                at * stride_dsm,
                offs_ds,
                mask_m,
                own,
                RANK_ROWS_FIRST=RANK_ROWS_FIRST,
                INPUT_PRECISION=INPUT_PRECISION,
            )

        if HAS_DROPOUT:
            acc *= tl.load(inv_keep_ptr + slot)
        d_lora_a_ptr += tl.cast(first_m // rows + slot, tl.int64) * stride_dap + first_k
        offs_r = tl.cast(sibling, tl.int64) * stride_dag + tl.cast(r, tl.int64) * stride_dar
        store_sum(d_lora_a_ptr, acc, offs_k, offs_r, mask_k, own, RANK_ROWS_FIRST)


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
