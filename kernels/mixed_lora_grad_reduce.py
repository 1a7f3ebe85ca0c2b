"""Second stage of a mixed batch's gradients: sum partial sums in a fixed order, scale, round once.

The gradient of a factor is the sum of its adapter's partial sums, which `lora_grad_b` and
`lora_grad_a` wrote. There is one for each run of ``rows`` positions that has rows of the adapter.
An adapter without rows gets zeros. The same launch sums ds ``[M, R]`` over tiles of N. There are no
atomics, so results are bitwise reproducible.

Bytes moved: 4 per element of each partial sum, and every element of ds and of the gradients
written once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastlora.kernels.arguments import strides
from fastlora.kernels.config_tables import KernelConfig, cdiv
from fastlora.kernels.launch import cached_launches, launch
from fastlora.kernels.mixed_rows import S_COLUMNS, TABLES
from fastlora.kernels.rank_rows import sum_planes


# M, rows, and ds_planes vary between calls: do not specialize on 1 or multiples of 16.
@triton.jit(
    do_not_specialize=["M", "rows", "num_ds_partials", "stride_table"],
    do_not_specialize_on_alignment=TABLES,
)
def _mixed_lora_grad_reduce_kernel(
    # tensors
    out_ptr,
    partials_ptr,
    bias_partials_ptr,
    ds_ptr,
    ds_partials_ptr,
    segment_of_ptr,
    segment_slot_ptr,
    slot_start_ptr,
    offset_ptr,
    bias_offset_ptr,
    rank_ptr,
    scaling_ptr,
    # scalars
    M,
    L,
    R,
    rows,
    num_ds_partials,
    # strides
    stride_pp,
    stride_pg,
    stride_pl,
    stride_pr,
    stride_dsp,
    stride_table,
    # meta
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    HAS_DS: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    pid = tl.program_id(0)
    if HAS_DS:
        num_pid_m = tl.cdiv(M, BLOCK_M)
        if pid < num_pid_m:
            # scaling * dy @ lora_b of BLOCK_M sorted positions
            first_m = pid * BLOCK_M
            offs_m = tl.arange(0, BLOCK_M)
            mask_m = offs_m < M - first_m
            segment = tl.load(segment_of_ptr + first_m + offs_m, mask=mask_m, other=0)
            slot = tl.load(segment_slot_ptr + segment, mask=mask_m, other=-1)
            rank = tl.load(rank_ptr + slot, mask=slot >= 0, other=0)
            scale = tl.load(scaling_ptr + slot, mask=slot >= 0, other=0.0)
            filled = (rank + (S_COLUMNS - 1)) // S_COLUMNS * S_COLUMNS
            offs = (tl.cast(first_m, tl.int64) + offs_m)[:, None] * R
            for start in tl.range(0, tl.max(filled, axis=0), BLOCK_R, num_stages=1):
                r = start + tl.arange(0, BLOCK_R)
                mask = tl.max_constancy(r[None, :] < filled[:, None], [1, S_COLUMNS])
                # ds: [BLOCK_M, BLOCK_R]
                ds_partials_ptrs = ds_partials_ptr + offs + r[None, :]
                ds = sum_planes(
                    ds_partials_ptrs, mask, stride_dsp, num_ds_partials, BLOCK_M, BLOCK_R
                )
                ds = (ds * scale[:, None]).to(ds_ptr.dtype.element_ty)
                tl.store(ds_ptr + offs + r[None, :], ds, mask=mask)
        pid -= num_pid_m
    if pid >= 0:
        num_pid_l = tl.cdiv(L, BLOCK_L)
        slot = pid // num_pid_l
        first_l = tl.cast((pid % num_pid_l) * BLOCK_L, tl.int64)
        entry = tl.program_id(1) * stride_table + slot
        rank = tl.load(rank_ptr + entry)
        scale = 1.0
        if scaling_ptr is not None:
            scale = tl.load(scaling_ptr + entry)
        start = tl.load(slot_start_ptr + slot)
        stop = tl.load(slot_start_ptr + slot + 1)
        first = start // rows
        num_partials = tl.where(stop > start, (stop - 1) // rows + 1 - first, 0)
        partial = tl.cast(first + slot, tl.int64)
        offs_l = tl.arange(0, BLOCK_L)
        mask_l = offs_l < L - first_l
        if HAS_FACTORS:
            # For BLOCK_L rows of L, all rank rows: [L, rank] with BY_COLUMN, otherwise [rank, L].
            out = out_ptr + tl.load(offset_ptr + entry)
            partials_ptr += partial * stride_pp + tl.cast(tl.program_id(1), tl.int64) * stride_pg
            for start in tl.range(0, rank, BLOCK_R, num_stages=1):
                r = start + tl.arange(0, BLOCK_R)
                mask = mask_l[:, None] & (r < rank)[None, :]
                offs_p = (first_l + offs_l)[:, None] * stride_pl + r[None, :] * stride_pr
                # total: [BLOCK_L, BLOCK_R]
                total = sum_planes(
                    partials_ptr + offs_p, mask, stride_pp, num_partials, BLOCK_L, BLOCK_R
                )
                if BY_COLUMN:
                    offs = (first_l + offs_l)[:, None] * rank + r[None, :]
                else:
                    offs = (first_l + offs_l)[:, None] + tl.cast(r, tl.int64)[None, :] * L
                tl.store(out + offs, (total * scale).to(out_ptr.dtype.element_ty), mask=mask)
        if HAS_BIAS:
            bias_offset = tl.load(bias_offset_ptr + entry)
            if bias_offset >= 0:
                bias_partials_ptr += partial * L + first_l
                total = tl.zeros((BLOCK_L,), dtype=tl.float32)
                for _ in tl.range(0, num_partials, num_stages=1):
                    # d_bias: [BLOCK_L]
                    total += tl.load(bias_partials_ptr + offs_l, mask=mask_l, other=0.0)
                    bias_partials_ptr += L
                total = (total * scale).to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + bias_offset + first_l + offs_l, total, mask=mask_l)


@cached_launches
def launch_mixed_lora_grad_reduce(
    out: torch.Tensor | None,
    partials: torch.Tensor | None,
    rows: Sequence[torch.Tensor],
    rank: torch.Tensor,
    scaling: torch.Tensor | None,
    offset: torch.Tensor | None,
    *,
    m: int,
    columns: int,
    run: int,
    by_column: bool,
    config: KernelConfig,
    bias_partials: torch.Tensor | None = None,
    bias_offset: torch.Tensor | None = None,
    ds: torch.Tensor | None = None,
    ds_partials: torch.Tensor | None = None,
) -> None:
    """Write every adapter's gradient of one factor, for G modules, and ds.

    Args:
        out: One buffer for all gradients, in the factors' dtype; None to compute ds alone.
        partials: Partial sums, fp32 ``[P, G, R, L]``, any strides. d_lora_b has ``[P, N, R]``,
            passed as a view of this shape.
        rows: Sorted rows, as in the launch that wrote the partial sums.
        rank: int32 ``[G, S]``.
        scaling: fp32 ``[G, S]``; None for 1.
        offset: int64 ``[G, S]``, the offset of each slot's gradient in ``out``.
        m: Number of rows of the batch.
        columns: L, the dimension of the factor other than the rank.
        run: Number of positions in a run, as in the launch that wrote the partial sums.
        by_column: Whether a gradient is ``[L, rank]`` (lora_b) rather than ``[rank, L]`` (lora_a).
        config: From `configs.choose`.
        bias_partials: Partial sums of lora_bias, fp32 ``[P, L]``, contiguous; None for none.
        bias_offset: int64 ``[G, S]``, the offset of each slot's gradient of lora_bias in ``out``,
            or -1 for an adapter without one.
        ds: ``[M, R]``, contiguous, for one module (``G = 1``). A row is written up to its adapter's
            rank, rounded up to a multiple of 4. None to compute no ds.
        ds_partials: Partial sums of ds, fp32 ``[tiles, M, R]``.
    """
    (modules, slots), (_, segment_of, segment_slot, slot_start, _) = rank.shape, rows
    factors = 0 if out is None else slots * cdiv(columns, config.block_n)
    programs = factors + (0 if ds is None else cdiv(m, config.block_m))
    if programs == 0:
        return
    launch(
        _mixed_lora_grad_reduce_kernel,
        (programs, modules),
        out_ptr=out,
        partials_ptr=partials,
        bias_partials_ptr=bias_partials,
        ds_ptr=ds,
        ds_partials_ptr=ds_partials,
        segment_of_ptr=segment_of,
        segment_slot_ptr=segment_slot,
        slot_start_ptr=slot_start,
        offset_ptr=offset,
        bias_offset_ptr=bias_offset,
        rank_ptr=rank,
        scaling_ptr=scaling,
        M=m,
        L=columns,
        R=0 if ds is None else ds.shape[1],
        rows=run,
        num_ds_partials=0 if ds_partials is None else ds_partials.shape[0],
        **strides("p", "pgrl", partials),
        **strides("ds", "p__", ds_partials),
        stride_table=rank.stride(0),
        **config.arguments("mr"),
        BLOCK_L=config.block_n,
        BY_COLUMN=by_column,
        HAS_DS=ds is not None,
        HAS_FACTORS=partials is not None,
        HAS_BIAS=bias_partials is not None,
    )
