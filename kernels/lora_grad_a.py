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

from fastlora.kernels.launch import kept, launch
from fastlora.kernels.philox import philox_keep_mask
from fastlora.kernels.tables import MAX_SIBLINGS, KernelConfig, cdiv


@triton.jit
def _load_seed(seeds_ptr, i: tl.constexpr, SIBLINGS: tl.constexpr, HAS_DROPOUT: tl.constexpr):
    """Returns the seed of sibling ``i``, or a number that nobody uses."""
    seed = tl.cast(0, tl.int64)
    if HAS_DROPOUT and i < SIBLINGS:
        seed = tl.load(seeds_ptr + i)
    return seed


@triton.jit
def _add_rows(
    acc,
    x,
    ds_ptr,
    seed,
    m,
    M,
    first_k,
    first_r,
    R,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    RANK_ROWS_FIRST: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Adds ``dropout(x).T @ ds`` of one sibling, not rescaled, to its sum and returns that.

    The sum is ``[BLOCK_K, BLOCK_R]``, or with RANK_ROWS_FIRST ``[BLOCK_R, BLOCK_K]``.
    """
    offs_m = tl.arange(0, BLOCK_M)
    offs_r = first_r + tl.arange(0, BLOCK_R)
    mask_m = offs_m < M - m
    mask_r = offs_r < R
    ds_ptr += tl.cast(m, tl.int64) * R
    if HAS_DROPOUT:
        keep = philox_keep_mask(seed, m, first_k, threshold, 0, BLOCK_M, BLOCK_K)
        x = tl.where(keep, x, 0.0)
    if RANK_ROWS_FIRST:
        # ds: [BLOCK_R, BLOCK_M]
        ds = tl.load(
            ds_ptr + offs_m[None, :] * R + offs_r[:, None],
            mask=mask_m[None, :] & mask_r[:, None],
            other=0.0,
        )
        # [BLOCK_R, BLOCK_M] x [BLOCK_M, BLOCK_K]
        acc = tl.dot(ds, x, acc, input_precision=INPUT_PRECISION)
    else:
        # ds: [BLOCK_M, BLOCK_R]
        ds = tl.load(
            ds_ptr + offs_m[:, None] * R + offs_r[None, :],
            mask=mask_m[:, None] & mask_r[None, :],
            other=0.0,
        )
        # [BLOCK_K, BLOCK_M] x [BLOCK_M, BLOCK_R]
        acc = tl.dot(tl.trans(x), ds, acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit
def _store_sum(
    out_ptr,
    acc,
    split,
    first_k,
    first_r,
    K,
    R,
    inv_keep,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_ROWS_FIRST: tl.constexpr,
):
    """Writes one sibling's sum, rescaled, to its plane of ``[P, R, K]``."""
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    mask_k = offs_k < K - first_k
    mask_r = offs_r < R - first_r
    out_ptr += (tl.cast(split, tl.int64) * R + first_r) * K + first_k
    out = (acc * tl.cast(inv_keep, tl.float32)).to(out_ptr.dtype.element_ty)
    if RANK_ROWS_FIRST:
        # out: [BLOCK_R, BLOCK_K]
        tl.store(
            out_ptr + offs_k[None, :] + offs_r[:, None] * K,
            out,
            mask=mask_k[None, :] & mask_r[:, None],
        )
    else:
        # out: [BLOCK_K, BLOCK_R]
        tl.store(
            out_ptr + offs_k[:, None] + offs_r[None, :] * K,
            out,
            mask=mask_k[:, None] & mask_r[None, :],
        )


# M and the thresholds vary from call to call: no compile of its own for 1 or a multiple of 16.
@triton.jit(
    do_not_specialize=["M", "threshold_0", "threshold_1", "threshold_2", "threshold_3"],
)
def _lora_grad_a_kernel(
    # tensors
    out_0_ptr,
    out_1_ptr,
    out_2_ptr,
    out_3_ptr,
    x_ptr,
    ds_0_ptr,
    ds_1_ptr,
    ds_2_ptr,
    ds_3_ptr,
    seeds_ptr,
    # scalars
    M,
    K,
    R_0,
    R_1,
    R_2,
    R_3,
    rows_per_split,
    threshold_0,
    threshold_1,
    threshold_2,
    threshold_3,
    inv_keep_0,
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
    seed_0 = _load_seed(seeds_ptr, 0, SIBLINGS, HAS_DROPOUT)
    seed_1 = _load_seed(seeds_ptr, 1, SIBLINGS, HAS_DROPOUT)
    seed_2 = _load_seed(seeds_ptr, 2, SIBLINGS, HAS_DROPOUT)
    seed_3 = _load_seed(seeds_ptr, 3, SIBLINGS, HAS_DROPOUT)
    if RANK_ROWS_FIRST:
        acc_0 = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    else:
        acc_0 = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)
    acc_1 = acc_0
    acc_2 = acc_0
    acc_3 = acc_0
    for m in range(first_m, min(first_m + rows_per_split, M), BLOCK_M):
        # x: [BLOCK_M, BLOCK_K]
        x = tl.load(x_ptr + offs_x, mask=(offs_m < M - m)[:, None] & mask_k[None, :], other=0.0)
        acc_0 = _add_rows(
            acc_0, x, ds_0_ptr, seed_0, m, M, first_k, first_r, R_0, threshold_0,
            BLOCK_M, BLOCK_K, BLOCK_R, HAS_DROPOUT, RANK_ROWS_FIRST, INPUT_PRECISION,
        )  # fmt: skip
        if SIBLINGS > 1:
            acc_1 = _add_rows(
                acc_1, x, ds_1_ptr, seed_1, m, M, first_k, first_r, R_1, threshold_1,
                BLOCK_M, BLOCK_K, BLOCK_R, HAS_DROPOUT, RANK_ROWS_FIRST, INPUT_PRECISION,
            )  # fmt: skip
        if SIBLINGS > 2:
            acc_2 = _add_rows(
                acc_2, x, ds_2_ptr, seed_2, m, M, first_k, first_r, R_2, threshold_2,
                BLOCK_M, BLOCK_K, BLOCK_R, HAS_DROPOUT, RANK_ROWS_FIRST, INPUT_PRECISION,
            )  # fmt: skip
        if SIBLINGS > 3:
            acc_3 = _add_rows(
                acc_3, x, ds_3_ptr, seed_3, m, M, first_k, first_r, R_3, threshold_3,
                BLOCK_M, BLOCK_K, BLOCK_R, HAS_DROPOUT, RANK_ROWS_FIRST, INPUT_PRECISION,
            )  # fmt: skip
        x_ptr += tl.cast(stride_xm, tl.int64) * BLOCK_M

    _store_sum(
        out_0_ptr, acc_0, split, first_k, first_r, K, R_0, inv_keep_0,
        BLOCK_K, BLOCK_R, RANK_ROWS_FIRST,
    )  # fmt: skip
    if SIBLINGS > 1:
        _store_sum(
            out_1_ptr, acc_1, split, first_k, first_r, K, R_1, inv_keep_1,
            BLOCK_K, BLOCK_R, RANK_ROWS_FIRST,
        )  # fmt: skip
    if SIBLINGS > 2:
        _store_sum(
            out_2_ptr, acc_2, split, first_k, first_r, K, R_2, inv_keep_2,
            BLOCK_K, BLOCK_R, RANK_ROWS_FIRST,
        )  # fmt: skip
    if SIBLINGS > 3:
        _store_sum(
            out_3_ptr, acc_3, split, first_k, first_r, K, R_3, inv_keep_3,
            BLOCK_K, BLOCK_R, RANK_ROWS_FIRST,
        )  # fmt: skip


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
        config: From `grad_a_config`, for so many siblings.
    """
    (m, k), count = x.shape, len(outs)
    if k == 0:
        return
    named: dict[str, object] = {}
    largest = 0
    for i in range(MAX_SIBLINGS):
        used = i < count
        p = dropout_p[i] if used and seeds is not None else 0.0
        r = ds[i].shape[1] if used else 0
        largest = max(largest, r)
        named[f"out_{i}_ptr"] = outs[i] if used else None
        named[f"ds_{i}_ptr"] = ds[i] if used else None
        named[f"R_{i}"] = r
        named[f"threshold_{i}"] = round(p * 65536)
        named[f"inv_keep_{i}"] = 1.0 / (1.0 - p)
    grid = (cdiv(k, config.block_k) * cdiv(largest, config.block_r), config.splits)
    launch(
        _lora_grad_a_kernel,
        grid,
        **named,
        x_ptr=x,
        seeds_ptr=seeds,
        M=m,
        K=k,
        rows_per_split=cdiv(cdiv(m, config.block_m), config.splits) * config.block_m,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        SIBLINGS=config.siblings,
        HAS_DROPOUT=seeds is not None,
        RANK_ROWS_FIRST=config.rank_rows_first,
        INPUT_PRECISION=config.input_precision,
        **config.launch_options,
    )
