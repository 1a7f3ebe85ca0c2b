"""``d_lora_a = ds.T @ dropout(x)`` for up to four siblings from one read of x.

x ``[M, K]``, ds ``[M, R]``, d_lora_a ``[R, K]``; every sibling, a projection fed by the same x, has
a rank, a seed and a dropout of its own. A program owns BLOCK_K columns and a range of rows; where
rows take P programs, each writes an fp32 plane of ``[P, R, K]``, summed in their order by
`plane_sums`. No atomics.

Bytes moved, e an element: ``e M K + sum over siblings of e (M R + R K)``, x read once per BLOCK_R
rank rows; with planes ``4 P R K`` in place of ``e R K``. The masks are computed, not read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastlora.kernels.arguments import numbered, strides
from fastlora.kernels.launch import kept, launch
from fastlora.kernels.philox import philox_keep_mask
from fastlora.kernels.row_sums import add_rows, store_sum
from fastlora.kernels.tables import KernelConfig, cdiv


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
    if RANK_ROWS_FIRST:
        acc = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)
    accs = (acc,) * SIBLINGS
    for m in range(first_m, min(first_m + rows_per_split, M), BLOCK_M):
        mask_m = offs_m < M - m
        # x: [BLOCK_M, BLOCK_K]
        x = tl.load(x_ptr + offs_x, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        sums = ()
        for i in tl.static_range(SIBLINGS):
            offs_r = first_r + tl.arange(0, BLOCK_R)
            mask_r = offs_r < ranks[i]
            share = shares[i] + tl.cast(m, tl.int64) * ranks[i]
            dropped = x
            if HAS_DROPOUT:
                keep = philox_keep_mask(seeds[i], m, first_k, thresholds[i], 0, BLOCK_M, BLOCK_K)
                dropped = tl.where(keep, x, 0.0)
            own = add_rows(
                accs[i],
                dropped,
                share,
                offs_m * ranks[i],
                offs_r,
                mask_m,
                mask_r,
                RANK_ROWS_FIRST=RANK_ROWS_FIRST,
                INPUT_PRECISION=INPUT_PRECISION,
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
